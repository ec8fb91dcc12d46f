"""A VAE decodes whole, sliced or in tiles, as memory allows; what was done is said, and the VAE is left as it was."""

from __future__ import annotations

import ditbench.harness.models.base  # noqa: F401  before diffusers

# isort: split
import pytest
import torch
from diffusers import AutoencoderKL

from ditbench.harness.models import decoding
from ditbench.harness.models.decoding import decode_bytes, decode_within_memory, decoded, forget_decoding


@pytest.fixture
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        return AutoencoderKL(
            block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16, **blocks
        ).eval()


LATENTS = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def through(vae, room: int = 10**9, seen: list | None = None):
    """Its decode, which holds at most `room` latents' pixels at a time."""
    inner = vae.decoder.forward

    def narrow(z, *args, **kwargs):
        if seen is not None:
            seen.append(tuple(z.shape))
        if z.shape[0] * z.shape[-1] * z.shape[-2] > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(z, *args, **kwargs)

    vae.decoder.forward = narrow
    try:
        with torch.no_grad():
            return decode_within_memory(vae, vae.decode, LATENTS).sample
    finally:
        vae.decoder.forward = inner


def test_what_fits_is_decoded_whole(vae):
    with torch.no_grad():
        assert torch.equal(through(vae), vae.decode(LATENTS).sample)
    assert decoded(vae) == {"vae": "whole"}


def test_a_batch_that_runs_out_is_decoded_one_by_one_with_the_same_pixels(vae):
    whole = through(vae)
    torch.testing.assert_close(through(vae, room=256), whole, rtol=1e-4, atol=1e-5)
    assert decoded(vae) == {"vae": "sliced", "because": "whole ran out of memory"}
    assert not vae.use_slicing and not vae.use_tiling


def test_one_sample_that_runs_out_is_decoded_in_tiles_and_that_is_remembered(vae):
    whole, seen = through(vae), []
    assert through(vae, room=100).shape == whole.shape
    assert decoded(vae)["vae"] == "tiled" and not vae.use_tiling
    through(vae, room=100, seen=seen)
    assert all(shape[-1] * shape[-2] <= 100 for shape in seen), "it was tried whole again"
    forget_decoding(vae)
    assert decoded(vae) == {}


def test_what_does_not_fit_in_tiles_either_is_the_callers(vae):
    with pytest.raises(torch.OutOfMemoryError):
        through(vae, room=1)
    assert not vae.use_slicing and not vae.use_tiling


def test_what_would_not_fit_into_free_memory_is_not_tried_whole(vae, monkeypatch):
    seen = []
    monkeypatch.setattr(decoding, "free_memory", lambda device: decode_bytes(vae, LATENTS[:1]) * 2)
    through(vae, seen=seen)
    assert [shape[0] for shape in seen] == [1, 1, 1] and decoded(vae)["vae"] == "sliced"
    assert decoded(vae)["because"].startswith("an estimate of")
    forget_decoding(vae)
    monkeypatch.setattr(decoding, "free_memory", lambda device: decode_bytes(vae, LATENTS[:1]))
    through(vae)
    assert decoded(vae)["vae"] == "tiled"


def test_other_errors_pass(vae):
    with pytest.raises(RuntimeError, match="channels"), torch.no_grad():
        decode_within_memory(vae, vae.decode, torch.zeros(1, 5, 4, 4))
