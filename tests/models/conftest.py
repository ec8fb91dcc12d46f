"""A tiny latent-space pipeline: a real DiT transformer with learned variance and a real AutoencoderKL."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.families import dit


@pytest.fixture(scope="session")
def latent_pipe() -> DiTPipeline:
    """1000 classes, since DiTPipeline writes its null class as 1000; 4 → 8 channels as in DiT-XL; 8×8 latents, 16×16 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = DiTPipeline(transformer.eval().requires_grad_(False), vae.eval().requires_grad_(False), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def latent_model(latent_pipe) -> LoadedModel:
    return LoadedModel(ModelSpec("tiny-latent-dit", "dit", source="."), latent_pipe, dit)


@pytest.fixture(scope="session")
def latent_folder(latent_pipe, tmp_path_factory):
    """The pipeline as diffusers saves it. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("weights") / "tiny-latent-dit"
    latent_pipe.save_pretrained(folder)
    return folder
