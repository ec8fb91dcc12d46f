"""The latents that a protocol gives: what is read from a file, and what is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from ditbench.harness.common.errors import UserError
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.noise import GIVEN, read_noise


@pytest.mark.parametrize("ending", [".pt", ".npy"])
def test_a_file_of_torch_or_numpy_is_read_into_float32_with_its_hash(ending, tmp_path):
    latents = torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"latents{ending}"
    if ending == ".pt":
        torch.save(latents.bfloat16(), path)  # as MLPerf's of Wan 2.2 is
    else:
        np.save(path, latents.numpy())
    noise = read_noise(path)
    assert noise.kind == GIVEN and noise.latents.dtype == torch.float32 and noise.latents.shape == (1, 4, 3, 2)
    torch.testing.assert_close(noise.latents, latents.bfloat16().float() if ending == ".pt" else latents)
    assert noise.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(2, 4, 3, 3), r"\(1, …\), came torch.float32 \(2, 4, 3, 3\)"),
        (torch.zeros(1, 4, 3, 3, dtype=torch.int64), "came torch.int64"),
        (torch.full((1, 4, 3, 3), float("nan")), "NaN or infinity"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, "came dict"),
        (b"<html>404</html>", "expected a tensor of latents"),
    ],
)
def test_what_is_no_latent_of_one_sample_is_refused_in_a_line(content, said, tmp_path):
    path = tmp_path / "latents.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=said) as refused:
        read_noise(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["shard", "none/latents.pt", "latents.txt"])
def test_a_name_that_is_none_says_what_there_is(name, tmp_path):
    with pytest.raises(UserError, match=r"expected own, shared, or a file \(.pt or .npy\)"):
        read_noise(tmp_path / name)


def test_every_part_of_what_is_drawn_begins_with_it(tmp_path):
    torch.save(torch.zeros(1, 2, 2, 2), tmp_path / "latents.pt")
    noise = read_noise(tmp_path / "latents.pt")
    assert Conditions((0, 0, 0), noise=noise).rows(1, 2).noise is noise
