"""Wan 2.1 (Wan team, arXiv:2503.20314): adaLN-single blocks over video tokens, cross-attention to UMT5.

Rows of scale_shift_table: shift, scale, gate of attention, then of the feed-forward, added to `temb`. Norms and modulation run
in float32 whatever the model's dtype. Cross-attention reads a norm with its own weights, which takes over no shift.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import text_cross_attention
from ditbench.harness.quant.target import Site

HEIGHT, WIDTH, FRAMES = 480, 832, 81  # the pipeline's defaults


def sites(transformer: nn.Module) -> list[Site]:
    return text_cross_attention("blocks", len(transformer.blocks), feed_forward="ffn")


def call(pipe: Any) -> dict[str, Any]:
    usual = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return usual | {"max_sequence_length": min(512, pipe.tokenizer.model_max_length)}


FAMILY = PipelineFamily(
    pipelines=("WanPipeline",),
    transformer="WanTransformer3DModel",
    lists=("blocks",),
    ALWAYS_FLOAT=r"^condition_embedder\.time_embedder\.",  # the model takes its dtype from their weights
    sites=sites,
    call=call,
)
