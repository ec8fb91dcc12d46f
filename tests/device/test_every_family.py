"""Every family on the second device, from calibration to the reloaded export, with the methods that it can break, and some with
five: the CPU's numbers, and there.

The way is `device_chain.chain`; run as a script it prints the shares that are held here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from device_chain import CHAINS, REFUSED, STAGES, TWO, Recordings, chain, config_of, judges_at
from newer_pipelines import NEWER
from operations import counted

from ditbench.harness.common.errors import UserError

RELOADED = (
    "rtn",
    "svdquant",
)  # exported and loaded: plain codes; folds and a low-rank branch; the newer families' folds
# Of a stage's floating-point operations, what has to run on the second device. Nothing counts that only moves or draws.
LEAST = dict.fromkeys(STAGES, 0.99)
# Of two experts twice the weights are looked through on the CPU, and their scheduler is asked, for as many calls.
OF_TWO = LEAST | {"reload": 0.98, "quantize": 0.95}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("chains")
    with judges_at(folder / "judges"):
        yield folder


@pytest.fixture(scope="module")
def recordings() -> Recordings:
    return {}


@pytest.mark.parametrize(("family", "method"), CHAINS)
def test_a_family_with_a_method_runs_on_the_device_with_the_cpus_numbers(
    family, method, second, folder, recordings, tmp_path
):
    far_config = config_of(family, method, "second_device", folder)
    if (family, method) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family, method]):
            chain(far_config, recordings, counted())
        return
    near = chain(config_of(family, method, "cpu", folder), recordings, counted())
    with counted() as ops:
        far = chain(far_config, recordings, ops, tmp_path / "export" if method in RELOADED or family in NEWER else None)

    assert near.codes and near.codes.keys() == far.codes.keys()
    assert all(torch.equal(codes, far.codes[name]) for name, codes in near.codes.items())
    torch.testing.assert_close(far.latents, near.latents, rtol=0, atol=1e-5)
    assert int((far.pixels.int() - near.pixels.int()).abs().max()) <= 1 and near.pixels.float().std() > 1
    close = 1e-4 if torch.equal(far.pixels, near.pixels) else 1e-3  # a pixel at a tie moves what a judge says of 16×16
    assert far.values == pytest.approx(near.values, rel=close, abs=1e-5)
    np.testing.assert_allclose(far.errors, near.errors, rtol=1e-4)
    if far.reloaded is not None:
        torch.testing.assert_close(far.reloaded, near.latents, rtol=0, atol=1e-5)
    assert far.efficiency["kind"] == "simulated"
    assert (far.efficiency["device"], far.efficiency["threads"]) == ("a second device made of the CPU", None)
    for stage in ops.stages():
        least = (OF_TWO if family == TWO else LEAST).get(stage, 0.0)
        assert ops.share_on_second_device(stage) >= least, f"{stage}\n{ops.report()}"
    assert ops.stages() >= {"quantize", "generate", "evaluate", "layer errors"}
