"""Wan 2.1 (Wan team, arXiv:2503.20314): adaLN-single blocks over video tokens, cross-attention to UMT5.

Rows of scale_shift_table: shift, scale, gate of attention, then of the feed-forward, added to `temb`. Norms and modulation run
in float32 whatever the model's dtype. Cross-attention reads a norm with its own weights, which takes over no shift.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.pipeline import PipelineFamily
from harness.quant.target import Site
from harness.sites import QKV, reads, table, values

HEIGHT, WIDTH, FRAMES = 480, 832, 81  # the pipeline's defaults


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index in range(len(transformer.blocks)):
        block = f"blocks.{index}"
        found += [
            reads("attn_in", block, QKV, table(block, "temb", 0, 1)),
            reads("attn_out", block, ("attn1.to_out.0",), *values(block, "attn1.to_v")),
            reads("cross_query", block, ("attn2.to_q",)),
            reads("caption", block, ("attn2.to_k", "attn2.to_v")),
            reads("cross_out", block, ("attn2.to_out.0",), *values(block, "attn2.to_v")),
            reads("ff_in", block, ("ffn.net.0.proj",), table(block, "temb", 3, 4)),
            reads("ff_mid", block, ("ffn.net.2",)),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    usual = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return usual | {"max_sequence_length": min(512, pipe.tokenizer.model_max_length)}


FAMILY = PipelineFamily(
    pipelines=("WanPipeline",),
    transformer="WanTransformer3DModel",
    lists=("blocks",),
    SHARED=("rotary_emb",),
    sites=sites,
    call=call,
)
