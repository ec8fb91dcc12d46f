"""LTX-Video (HaCohen et al., arXiv:2501.00103): adaLN-single blocks over RMS-normed video tokens, cross-attention to T5.

Rows of scale_shift_table: shift, scale, gate of attention, then of the feed-forward, added to `temb`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import text_cross_attention
from ditbench.harness.quant.target import Site

HEIGHT, WIDTH, FRAMES = 512, 704, 161  # the pipeline's defaults


def sites(transformer: nn.Module) -> list[Site]:
    return text_cross_attention("transformer_blocks", len(transformer.transformer_blocks))


def call(pipe: Any) -> dict[str, Any]:
    usual = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return usual | {"max_sequence_length": min(128, pipe.tokenizer.model_max_length)}


FAMILY = PipelineFamily(
    pipelines=("LTXPipeline",),
    transformer="LTXVideoTransformer3DModel",
    sites=sites,
    call=call,
)
