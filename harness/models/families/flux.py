"""FLUX.1 (Black Forest Labs, 2024): MMDiT double blocks, then single blocks that read text and image as one sequence.

Double blocks: chunks of `norm1.linear` (image) and `norm1_context.linear` (text) are shift, scale, gate of attention and of the
feed-forward. Single blocks: shift, scale, gate for attention and MLP at once; `proj_out` reads both side by side, so nothing
folds into it. Latents are packed 2×2: (B, tokens, 64).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import chunk, reads, reads_apart, values
from ditbench.harness.quant.blocks import TwoStreams
from ditbench.harness.quant.target import Site

ATTENTION, FEED_FORWARD = (0, 1), (3, 4)  # chunks of (shift, scale)
SIDE = 1024  # pixels, where the checkpoint does not say


def sites(transformer: nn.Module) -> list[Site]:
    return double_sites(transformer) + single_sites(transformer)


def double_sites(transformer: nn.Module) -> list[Site]:
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    found = []
    for index in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
        added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        outputs = ("attn.to_out.0", "attn.to_add_out")
        found += [
            reads("attn_in", block, ("attn.to_q", "attn.to_k", "attn.to_v"), chunk(image, width, *ATTENTION)),
            reads("text_attn_in", block, added, chunk(text, width, *ATTENTION)),
            reads_apart("attn_out", block, outputs, *values(block, "attn.to_v", "attn.add_v_proj")),
            reads("ff_in", block, ("ff.net.0.proj",), chunk(image, width, *FEED_FORWARD)),
            reads("ff_mid", block, ("ff.net.2",)),
            reads("text_ff_in", block, ("ff_context.net.0.proj",), chunk(text, width, *FEED_FORWARD)),
            reads("text_ff_mid", block, ("ff_context.net.2",)),
        ]
    return found


def single_sites(transformer: nn.Module) -> list[Site]:
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    found = []
    for index in range(len(transformer.single_transformer_blocks)):
        block = f"single_transformer_blocks.{index}"
        layers = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        found += [
            reads("in", block, layers, chunk(f"{block}.norm.linear", width, *ATTENTION)),
            reads("out", block, ("proj_out",)),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    side = pipe.default_sample_size * pipe.vae_scale_factor if pipe.vae is not None else SIDE
    side = min(side, SIDE)
    return {"height": side, "width": side, "max_sequence_length": min(512, pipe.tokenizer_2.model_max_length)}


FAMILY = PipelineFamily(
    pipelines=("FluxPipeline",),
    transformer="FluxTransformer2DModel",
    lists=("transformer_blocks", "single_transformer_blocks"),
    stream=lambda transformer: TwoStreams(outputs=("encoder_hidden_states", "hidden_states")),
    sites=sites,
    call=call,
)
