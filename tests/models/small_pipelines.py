"""Small random pipelines of every family, built from its real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from harness.models.zoo.tiny_t2i import tokenizer

SMALL_TEXT = 24


def t5() -> dict[str, Any]:
    words = tokenizer()
    config = T5Config(
        vocab_size=len(words), d_model=SMALL_TEXT, d_kv=8, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0
    )
    return {"tokenizer": words, "text_encoder": T5EncoderModel(config)}


def image_vae(channels: int = 4, **more: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=4, sample_size=16, **more,
    )  # fmt: skip


def lively(transformer: nn.Module) -> nn.Module:
    """Weights drawn large enough that every part of the model changes the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32,
        sample_size=8, patch_size=2, caption_channels=SMALL_TEXT, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(transformer=lively(transformer), vae=image_vae(), scheduler=scheduler, **t5())


def cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=SMALL_TEXT, num_layers=2, sample_width=4, sample_height=4, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return diffusers.CogVideoXPipeline(transformer=lively(transformer), vae=vae, scheduler=scheduler, **t5())


SMALL: dict[str, Callable[[], Any]] = {"pixart": pixart, "cogvideox": cogvideox}
