"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv:2403.03206): MMDiT, text and image in one attention, adaLN-Zero for each.

Chunks of `norm1.linear`: shift, scale, gate of attention, then of the feed-forward; SD3.5's blocks with a second attention add
shift, scale, gate of that. The last block reads text only (`norm1_context` is then scale, shift) and gives none.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import chunk, reads, reads_apart, values
from ditbench.harness.quant.blocks import TwoStreams
from ditbench.harness.quant.target import Site

ATTENTION, FEED_FORWARD, SECOND = (0, 1), (3, 4), (6, 7)  # chunks of (shift, scale)
LAST_TEXT = (1, 0)


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index, module in enumerate(transformer.transformer_blocks):
        block, width = f"transformer_blocks.{index}", transformer.inner_dim
        image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
        last = module.context_pre_only
        found += [
            reads("attn_in", block, ("attn.to_q", "attn.to_k", "attn.to_v"), chunk(image, width, *ATTENTION)),
            reads(
                "text_attn_in",
                block,
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                chunk(text, width, *(LAST_TEXT if last else ATTENTION)),
            ),
            reads_apart(
                "attn_out",
                block,
                ("attn.to_out.0",) if last else ("attn.to_out.0", "attn.to_add_out"),
                *values(block, "attn.to_v", "attn.add_v_proj"),
            ),
            reads("ff_in", block, ("ff.net.0.proj",), chunk(image, width, *FEED_FORWARD)),
            reads("ff_mid", block, ("ff.net.2",)),
        ]
        if not last:
            found += [
                reads("text_ff_in", block, ("ff_context.net.0.proj",), chunk(text, width, *FEED_FORWARD)),
                reads("text_ff_mid", block, ("ff_context.net.2",)),
            ]
        if module.attn2 is not None:
            second = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
            found += [
                reads("attn2_in", block, second, chunk(image, width, *SECOND)),
                reads("attn2_out", block, ("attn2.to_out.0",), *values(block, "attn2.to_v")),
            ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    tokens = 256 if pipe.tokenizer_3 is None else min(256, pipe.tokenizer_3.model_max_length)
    return {"height": side, "width": side, "max_sequence_length": tokens}


FAMILY = PipelineFamily(
    pipelines=("StableDiffusion3Pipeline",),
    transformer="SD3Transformer2DModel",
    stream=lambda transformer: TwoStreams(outputs=("encoder_hidden_states", "hidden_states")),
    sites=sites,
    call=call,
)
