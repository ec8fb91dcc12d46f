"""Small random pipelines of every family, built from its real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ditbench.harness.models.base  # noqa: F401  before diffusers, in a script too: it stands in for what torchvision lacks

# isort: split
import diffusers
import torch
from torch import nn
from transformers import (  # fmt: skip
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from ditbench.harness.models.families.opensora.pipeline import OpenSoraPipeline
from ditbench.harness.models.families.opensora.stdit3 import STDiT3
from ditbench.harness.models.families.opensora.vae import OpenSoraVAE
from ditbench.harness.zoo.captioned import tokenizer

SMALL_TEXT = 24


def t5(width: int = SMALL_TEXT) -> dict[str, Any]:
    words = tokenizer()
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0
    )
    return {"tokenizer": words, "text_encoder": T5EncoderModel(config)}


def image_vae(channels: int = 4, **more: Any) -> diffusers.AutoencoderKL:
    levels = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    return diffusers.AutoencoderKL(**levels | {"latent_channels": channels, "norm_num_groups": 4, "sample_size": 16} | more)  # fmt: skip


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


def clip(projected: bool, tokens: int = 16) -> CLIPTextModel | CLIPTextModelWithProjection:
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=tokens, eos_token_id=1, bos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=lively(transformer), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(4, shift_factor=0.06), text_encoder=clip(True), tokenizer=tokenizer(), text_encoder_2=clip(True),
        tokenizer_2=tokenizer(), text_encoder_3=t5(32)["text_encoder"], tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=SMALL_TEXT, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=lively(transformer), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False), text_encoder=clip(False),
        tokenizer=tokenizer(), text_encoder_2=t5()["text_encoder"], tokenizer_2=tokenizer(),
    )  # fmt: skip


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    words = tokenizer()
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.SanaPipeline(
        transformer=lively(transformer), vae=vae, scheduler=scheduler, tokenizer=words, text_encoder=Gemma2Model(config)
    )


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=SMALL_TEXT, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.WanPipeline(transformer=lively(transformer), vae=vae, scheduler=scheduler, **t5())


def wan_of_two_experts() -> Any:
    """As Wan 2.2 A14B is saved: one transformer for high noise, one for low."""
    first, second = wan(), wan()
    for parameter in second.transformer.parameters():
        parameter.data = parameter.data.flip(0)  # other weights
    parts = first.components | {"transformer_2": second.transformer}
    return diffusers.WanPipeline(**parts, boundary_ratio=0.85)


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
        caption_channels=SMALL_TEXT,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXPipeline(transformer=lively(transformer), vae=vae, scheduler=scheduler, **t5())


def hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    words = tokenizer()
    llama = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        transformer=lively(transformer), vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=LlamaModel(llama), tokenizer=words, text_encoder_2=clip(False, 77), tokenizer_2=tokenizer(),
    )  # fmt: skip


def latte() -> Any:
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32,
        attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=SMALL_TEXT,
        video_length=3,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    return diffusers.LattePipeline(transformer=lively(transformer), vae=image_vae(), scheduler=scheduler, **t5())


def hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=2, hidden_size=16,
        in_channels=4, cross_attention_dim=16, cross_attention_dim_t5=SMALL_TEXT, pooled_projection_dim=16,
        activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    words = tokenizer()
    bert = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        transformer=lively(transformer), vae=image_vae(), scheduler=diffusers.DDPMScheduler(),
        text_encoder=BertModel(bert), tokenizer=words, text_encoder_2=t5()["text_encoder"], tokenizer_2=tokenizer(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )  # fmt: skip
    words = tokenizer()
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=lively(transformer), vae=image_vae(4, shift_factor=0.06), tokenizer=words,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=Gemma2Model(config),
    )  # fmt: skip


SMALL_STDIT3: dict[str, Any] = {
    "hidden_size": 16, "depth": 2, "num_heads": 2, "caption_channels": SMALL_TEXT, "model_max_length": 12, "mlp_ratio": 2.0,
    "input_sq_size": 16,
}  # fmt: skip
SMALL_VAE: dict[str, Any] = {
    "spatial": {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 4,
    },
    "filters": 4, "num_res_blocks": 1, "channel_multipliers": (1, 2, 2), "temporal_downsample": (True, True),
    "num_groups": 2,
}  # fmt: skip


def opensora() -> Any:
    """Its usual 9 frames are 3 latent ones; 10 pixels make an odd 5 latent columns, which patches of 2 do not fill."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    transformer, vae = lively(STDiT3(**SMALL_STDIT3)), OpenSoraVAE(**SMALL_VAE)
    return OpenSoraPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **t5())


SMALL: dict[str, Callable[[], Any]] = {
    "pixart": pixart, "cogvideox": cogvideox, "sd3": sd3, "flux": flux, "sana": sana, "wan": wan, "ltx": ltx,
    "hunyuan_video": hunyuan_video, "hunyuan_dit": hunyuan_dit, "lumina2": lumina2, "latte": latte, "generic": sd3,
    "opensora": opensora,
}  # fmt: skip
SIZES: dict[str, dict[str, int]] = {
    "flux": {"height": 16, "width": 16},
    "sana": {"height": 32, "width": 32},
    "hunyuan_video": {"height": 16, "width": 16, "num_frames": 9},
    "wan": {"height": 16, "width": 16, "num_frames": 5},
    "ltx": {"height": 32, "width": 32, "num_frames": 9},
    "opensora": {"height": 16, "width": 10, "num_frames": 9},
}
