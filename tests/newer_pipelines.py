"""Small random pipelines of the families of 2025 and 2026, built from their real classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ditbench.harness.models.base  # noqa: F401  before diffusers, in a script too: it stands in for what torchvision lacks

# isort: split
import diffusers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from generic_pipelines import chroma, flow, flux2_klein, hidream, qwen_image, qwen_vl, z_image
from small_pipelines import SMALL_TEXT, clip, image_vae, lively, t5
from transformers import Gemma2Config, Gemma2Model, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from ditbench.harness.zoo.captioned import tokenizer


def short_texts(pipeline: type) -> None:
    """Of the 1,985 tokens that HunyuanVideo-1.5 pads every text to, wherever it is made, 28 are left: tests are to be fast."""
    made = pipeline.__init__

    @functools.wraps(made)
    def with_short_texts(self: Any, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        self.tokenizer_max_length, self.tokenizer_2_max_length, self.vision_num_semantic_tokens = 16, 8, 4

    pipeline.__init__ = with_short_texts


short_texts(diffusers.HunyuanVideo15Pipeline)


def hunyuan_video15() -> Any:
    """Its text begins behind the 108 tokens that the system's message takes with the real words."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=SMALL_TEXT, image_embed_dim=8, rope_axes_dim=(2, 4, 4),
        target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, spatial_compression_ratio=16,
    )  # fmt: skip
    words = tokenizer()
    words.chat_template = "{{ 'red ' * 108 }}{% for message in messages[1:] %}{{ message.content }}{% endfor %}"
    config = Qwen2_5_VLTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(words), rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )  # fmt: skip
    return diffusers.HunyuanVideo15Pipeline(
        transformer=lively(transformer), vae=vae, scheduler=flow(shift=5.0), text_encoder=Qwen2_5_VLTextModel(config),
        tokenizer=words, text_encoder_2=t5()["text_encoder"], tokenizer_2=tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip


def sana_video() -> Any:
    """One wide head: linear attention divides by a sum over its channels, which few of them may leave near zero."""
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=1, attention_head_dim=48, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=24, cross_attention_dim=48, caption_channels=16,
        sample_size=8, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    words = tokenizer()
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return diffusers.SanaVideoPipeline(
        transformer=lively(transformer), vae=vae, scheduler=flow(shift=8.0), tokenizer=words,
        text_encoder=Gemma2Model(config),
    )  # fmt: skip


def kandinsky5_transformer(**more: Any) -> Any:
    return lively(
        diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, model_dim=24, ff_dim=32,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4), **more,
        )
    )  # fmt: skip


def kandinsky5() -> Any:
    """Videos. What its pipeline says before the prompt fills the 128 tokens that it leaves out, with these words too."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    return diffusers.Kandinsky5T2VPipeline(
        transformer=kandinsky5_transformer(visual_cond=True), vae=vae, scheduler=flow(shift=5.0), **qwen_vl(),
        text_encoder_2=clip(False, 77), tokenizer_2=tokenizer(),
    )  # fmt: skip


def kandinsky5_t2i() -> Any:
    """Its pipeline counts on a VAE that makes a pixel of eight."""
    vae = image_vae(4, block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    return diffusers.Kandinsky5T2IPipeline(
        transformer=kandinsky5_transformer(), vae=vae, scheduler=flow(shift=3.0), **qwen_vl(), text_encoder_2=clip(False, 77),
        tokenizer_2=tokenizer(),
    )  # fmt: skip


def ltx2() -> Any:
    """A stream of sound half as wide as the video's."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_type="split",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1, video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=4, connector_rope_base_seq_len=32, rope_type="split",
    )  # fmt: skip
    words = tokenizer()
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return diffusers.LTX2Pipeline(
        transformer=lively(transformer), vae=vae, audio_vae=audio_vae, vocoder=vocoder, connectors=connectors, scheduler=flow(),
        tokenizer=words, text_encoder=Gemma2Model(config),
    )  # fmt: skip


NEWER: dict[str, Callable[[], Any]] = {
    "flux2": flux2_klein, "qwen_image": qwen_image, "z_image": z_image,
    "hunyuan_video15": hunyuan_video15,
    "chroma": chroma,
    "sana_video": sana_video,
    "kandinsky5": kandinsky5, "kandinsky5_t2i": kandinsky5_t2i, "ltx2": ltx2,
    "hidream": hidream,
}  # fmt: skip
NEWER_SIZES: dict[str, dict[str, int]] = {
    "flux2": {"height": 16, "width": 16},
    "qwen_image": {"height": 32, "width": 32},
    "z_image": {"height": 16, "width": 16},
    "chroma": {"height": 16, "width": 16},
    "sana_video": {"height": 32, "width": 32, "num_frames": 5},
    "hunyuan_video15": {"height": 32, "width": 32, "num_frames": 5},
    "kandinsky5": {"height": 32, "width": 32, "num_frames": 5},
    "kandinsky5_t2i": {"height": 32, "width": 32},
    "hidream": {"height": 256, "width": 256},
    "ltx2": {"height": 32, "width": 32, "num_frames": 5},
}
OF_FAMILY = {"kandinsky5_t2i": "kandinsky5"}  # a second pipeline of a family
CONFIGURATIONS = {
    "flux2": "flux.2-klein-4b", "qwen_image": "qwen-image", "z_image": "z-image-turbo", "chroma": "chroma1-hd",
    "hunyuan_video15": "hunyuan-video-1.5-480p", "sana_video": "sana-video-2b-480p",
    "kandinsky5": "kandinsky-5-t2v-lite-5s", "kandinsky5_t2i": "kandinsky-5-t2i-lite",
    "ltx2": "ltx-2", "hidream": "hidream-i1-full",
}  # fmt: skip
DRAWN = {  # of one sample: height and width, or frames, height and width
    "flux2": (16, 16), "qwen_image": (32, 32), "z_image": (16, 16), "hunyuan_video15": (5, 32, 32), "chroma": (16, 16), "sana_video": (5, 32, 32),
    "kandinsky5": (5, 32, 32), "kandinsky5_t2i": (32, 32), "ltx2": (5, 32, 32), "hidream": (256, 256),
}  # fmt: skip
NEWER_DRAWN_AS_VIDEO = tuple(name for name, shape in DRAWN.items() if len(shape) == 3)


def family_of(name: str) -> str:
    return OF_FAMILY.get(name, name)
