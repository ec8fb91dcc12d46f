"""Small random pipelines that run through the family `generic`, each built from its real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ditbench.harness.models.base  # noqa: F401  before diffusers, in a script too: it stands in for what torchvision lacks

# isort: split
import diffusers
from small_pipelines import SMALL_TEXT, clip, image_vae, lively, t5
from transformers import (  # fmt: skip
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from ditbench.harness.zoo.captioned import tokenizer

CHAT = "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>{% endfor %}"


def chat_tokenizer() -> Any:
    """Words, with the template of a chat around them."""
    words = tokenizer()
    words.chat_template = CHAT
    return words


def flow(**more: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(transformer=lively(transformer), vae=vae, scheduler=flow(), **qwen_vl())


def qwen_vl() -> dict[str, Any]:
    words = tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(words),
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        hidden_size=16, vocab_size=len(words),
    )  # fmt: skip
    return {"tokenizer": words, "text_encoder": Qwen2_5_VLForConditionalGeneration(config)}


def qwen3(layers: int, width: int, vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=width, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, vocab_size=vocabulary, max_position_embeddings=512,
    )  # fmt: skip


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.fill_(1.0)  # diffusers leaves them uninitialized
    words = chat_tokenizer()
    return diffusers.ZImagePipeline(
        transformer=lively(transformer), vae=image_vae(4, shift_factor=0.1159, scaling_factor=0.3611), scheduler=flow(),
        tokenizer=words, text_encoder=Qwen3Model(qwen3(2, 16, len(words))),
    )  # fmt: skip


def hidream() -> Any:
    """Four experts of which each token reads two; T5's and Llama's widths are those of their encoders."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=16, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[SMALL_TEXT, 16], text_emb_dim=32, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(128, 128), llama_layers=(0, 1),
    )  # fmt: skip
    words = tokenizer()
    llama = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return diffusers.HiDreamImagePipeline(
        transformer=lively(transformer), scheduler=flow(), vae=image_vae(4, shift_factor=0.1159, mid_block_add_attention=False),
        text_encoder=clip(True, 128), tokenizer=words, text_encoder_2=clip(True, 128), tokenizer_2=tokenizer(),
        text_encoder_3=t5()["text_encoder"], tokenizer_3=tokenizer(), text_encoder_4=LlamaForCausalLM(llama),
        tokenizer_4=tokenizer(),
    )  # fmt: skip


def allegro() -> Any:
    """Its VAE decodes whole tiles only, of 24 frames and at least 121 pixels."""
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2, sample_width=8,
        cross_attention_dim=24, sample_height=8, sample_frames=8, caption_channels=SMALL_TEXT,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_size=128,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    return diffusers.AllegroPipeline(transformer=lively(transformer), vae=vae, scheduler=scheduler, **t5())


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=SMALL_TEXT, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        transformer=lively(transformer), scheduler=flow(), image_encoder=None, feature_extractor=None,
        vae=image_vae(4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False), **t5(),
    )  # fmt: skip


def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=SMALL_TEXT, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    words = tokenizer()
    config = UMT5Config(
        vocab_size=len(words), d_model=SMALL_TEXT, d_kv=8, num_heads=2, d_ff=32, num_layers=1, dropout_rate=0.0
    )
    return diffusers.AuraFlowPipeline(
        transformer=lively(transformer), vae=image_vae(), scheduler=flow(), tokenizer=words,
        text_encoder=UMT5EncoderModel(config),
    )  # fmt: skip


def mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        qk_norm="rms_norm", text_embed_dim=SMALL_TEXT, time_embed_dim=4, activation_fn="swiglu",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    scheduler = flow(invert_sigmas=True)
    return diffusers.MochiPipeline(transformer=lively(transformer), vae=vae, scheduler=scheduler, **t5())


def cogview4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    words = tokenizer()
    config = GlmConfig(
        hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=len(words), pad_token_id=0,
    )  # fmt: skip
    scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear")  # fmt: skip
    return diffusers.CogView4Pipeline(
        transformer=lively(transformer), vae=image_vae(), scheduler=scheduler, tokenizer=words,
        text_encoder=GlmModel(config),
    )  # fmt: skip


def flux2_klein() -> Any:
    """Its text is three of Qwen3's layers, up to the 27th, side by side."""
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    words = chat_tokenizer()
    return diffusers.Flux2KleinPipeline(
        transformer=lively(transformer), vae=vae, scheduler=flow(), tokenizer=words, is_distilled=False,
        text_encoder=Qwen3ForCausalLM(qwen3(27, 8, len(words))),
    )  # fmt: skip


GENERIC: dict[str, Callable[[], Any]] = {
    "qwen_image": qwen_image, "z_image": z_image, "hidream": hidream, "allegro": allegro, "chroma": chroma,
    "aura_flow": aura_flow, "mochi": mochi, "cogview4": cogview4, "flux2_klein": flux2_klein,
}  # fmt: skip
GENERIC_SIZES: dict[str, dict[str, int]] = {name: {"height": 16, "width": 16} for name in GENERIC} | {
    "qwen_image": {"height": 32, "width": 32},
    "allegro": {"height": 128, "width": 128, "num_frames": 24},
    "mochi": {"height": 32, "width": 32, "num_frames": 7},
}
