"""Every text-told family from the command line to its record, with its real configuration and a small random checkpoint.

In bfloat16, as the real checkpoints are configured: what the families' own tests in float32 cannot see.
"""

from __future__ import annotations

import json
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_pipelines import SIZES, SMALL
from torch import nn

from ditbench.harness.cli import main
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.loading import load_model
from ditbench.harness.records.drawn_samples import samples_of
from ditbench.harness.records.record import read

CONFIGURATIONS = {
    "pixart": "pixart-alpha-xl-2-512", "sd3": "sd3.5-medium", "flux": "flux.1-dev", "sana": "sana-1600m-1024",
    "hunyuan_dit": "hunyuan-dit-1.2", "lumina2": "lumina-image-2", "latte": "latte-1", "cogvideox": "cogvideox-2b",
    "wan": "wan2.1-t2v-1.3b", "ltx": "ltx-video", "hunyuan_video": "hunyuan-video", "opensora": "opensora-1.2",
    "generic": "sd3-medium",
}  # fmt: skip
DRAWN = {  # of one sample: height and width, or frames, height and width
    "pixart": (16, 16), "sd3": (16, 16), "flux": (16, 16), "sana": (32, 32), "hunyuan_dit": (16, 16),
    "lumina2": (16, 16), "latte": (3, 16, 16), "cogvideox": (8, 32, 32), "wan": (5, 16, 16), "ltx": (9, 32, 32),
    "hunyuan_video": (9, 16, 16), "opensora": (9, 16, 10), "generic": (16, 16),
}  # fmt: skip
NOT_IN_LINE = ("generic", "hunyuan_dit")  # no method that works block by block
N = 3  # in batches of two: the last one has one sample


def skipped(family: str) -> str:
    """The end of some layers' names."""
    return "kv_linear" if family == "opensora" else "to_v"


@pytest.fixture(scope="module", params=sorted(SMALL))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(family) / "checkpoint"
    SMALL[family]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(family, checkpoint) -> LoadedModel:
    """The checkpoint in float32, for its structure."""
    return load_model(ModelSpec(f"small-{family}", family, source=str(checkpoint), size=SIZES.get(family)))


@pytest.fixture(scope="module")
def run(family, checkpoint):
    """run("name=…", …) → (exit code, the record that was written, its folder); each run is done once."""

    @cache
    def once(*arguments: str) -> SimpleNamespace:
        size = ",".join(f"{name}:{pixels}" for name, pixels in SIZES.get(family, {}).items())
        code = main([
            "run", f"model={CONFIGURATIONS[family]}", f"model.family={family}", f"model.name=small-{family}",
            f"model.source={checkpoint}",
            "model.revision=null", "model.size=" + (f"{{{size}}}" if size else "null"), f"protocol.n={N}",
            "protocol.steps=2", "protocol.prompts=shapes", "calibration.n=3", "calibration.batch_size=2",
            "calibration.prompts=shapes-calibration", "generate.batch_size=2", "generate.noise_floor_seeds=0",
            "metrics.names=[psnr,sqnr,collapse]", "metrics.resamples=5", "measure.samples=1", "measure.repeats=1",
            "measure.warmup=0", "tracker=none", f"results_dir={checkpoint.parent}", *arguments,
        ])  # fmt: skip
        name = arguments[0].removeprefix("name=")
        *_, path = sorted(checkpoint.parent.glob(f"runs/{name}/*/record.json"), key=lambda path: path.stat().st_mtime)
        return SimpleNamespace(code=code, record=json.loads(path.read_text()), folder=path.parent)

    return once


@pytest.fixture(scope="module")
def eight(family, run):
    """A method that folds."""
    return run("name=eight", "method=smoothquant", "bits=w8a8")


@pytest.fixture(scope="module")
def four(family, run):
    """A method that works block by block, where the family allows it."""
    method = "rtn" if family in NOT_IN_LINE else "gptq"
    return run("name=four", f"method={method}", "bits=w4a4", f"protocol.skip=[{skipped(family)}]")


def test_both_runs_end_well_with_their_labels(family, eight, four):
    for done, label in ((eight, "W8A8"), (four, "W4A4")):
        assert done.code == 0 and done.record["status"] == "ok", done.record["error"]
        assert done.record["bits"]["label"] == label
        assert done.record["model"] == f"small-{family}"
        assert done.record["config"]["model"]["dtype"] == "bfloat16"


def test_the_skip_list_stays_in_float_and_everything_else_in_the_blocks_does_not(family, model, eight, four):
    everything = {n for n, m in model.transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for done, skip in ((eight, ()), (four, (skipped(family),))):
        wanted = set(model.target(skip=skip).layers)
        assert set(done.record["layers"]) == wanted
        assert set(done.record["bits"]["float_layers"]) == everything - wanted
    assert any(name.endswith(skipped(family)) for name in four.record["bits"]["float_layers"])
    assert any(name.endswith(skipped(family)) for name in eight.record["layers"])


def test_effective_weight_bits_are_those_of_the_stored_bytes(model, four):
    """By hand: codes in whole groups of eight, one float32 scale per output channel, 16 bits for what stays in float."""
    layers = {n: m for n, m in model.transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    bits = values = 0
    for name, module in layers.items():
        rows, width = module.weight.flatten(1).shape
        values += rows * width
        bits += rows * (-(-width // 8) * 8 * 4 + 32) if name in four.record["layers"] else rows * width * 16
    assert four.record["bits"]["weight_bits_effective"] == pytest.approx(bits / values, rel=1e-9)


def test_effective_bits_lie_between_the_label_and_float(eight, four):
    for done, bits in ((eight, 8), (four, 4)):
        found = done.record["bits"]
        assert bits < found["weight_bits_effective"] < 16 and bits < found["act_bits_effective"] < 16
        assert bits < found["weight_bits_quantized_layers"] < 2 * bits + 8
        assert 0 < found["mac_share_quantized"] < 1


def test_samples_have_their_shape_and_prompts(family, eight, four):
    for done in (eight, four):
        samples = samples_of(read(done.folder / "record.json"))
        pixels = samples.pixels[:].numpy()
        assert pixels.shape == (N, *DRAWN[family], 3) and pixels.dtype == np.uint8 and pixels.std() > 1
        assert len({prompt.text for prompt in samples.prompts}) == N
        animated = {"animation", "float_animation"} if len(DRAWN[family]) == 3 else set()
        assert animated == {name for name in done.record["artifacts"] if "animation" in name}
        assert all((done.folder / name).stat().st_size > 0 for name in done.record["artifacts"].values())


def test_eight_bits_are_closer_to_the_float_model_than_four(eight, four):
    sqnr, worse = (done.record["metrics"]["sqnr"]["value"] for done in (eight, four))
    assert math.isfinite(sqnr) and worse < sqnr
    for done in (eight, four):
        assert all(entry["status"] == "ok" and entry["n"] == N for entry in done.record["metrics"].values())


def test_every_layer_has_its_error_and_more_bits_a_smaller_one(eight, four):
    for done, bits in ((eight, 8), (four, 4)):
        layers = done.record["layers"]
        assert {(entry["weight_bits"], entry["act_bits"]) for entry in layers.values()} == {(bits, bits)}
        assert all(0 < entry["sqnr_db"] < 90 for entry in layers.values())
    shared = set(eight.record["layers"]) & set(four.record["layers"])
    means = [np.mean([done.record["layers"][name]["sqnr_db"] for name in shared]) for done in (eight, four)]
    assert means[0] > means[1] + 10, "four bits less are 24 dB, less what GPTQ gets back"


def test_simulated_runs_have_no_latency_and_measured_ones_do(eight, four):
    for done in (eight, four):
        efficiency = done.record["efficiency"]
        assert (efficiency["latency_ms"] is None) == (efficiency["kind"] == "simulated")
        assert efficiency["model_bytes"] < efficiency["baseline_model_bytes"]


def test_a_blockwise_method_runs_or_is_a_failed_run_that_says_why(family, run, four):
    if family not in NOT_IN_LINE:
        assert four.record["method"] == "gptq" and four.record["status"] == "ok"
        return
    done = run("name=refused", "method=gptq", "bits=w4a4")
    assert done.code == 3 and done.record["status"] == "failed"
    assert "block by block cannot be used with this model" in done.record["error"]
