"""HunyuanVideo (Kong et al., arXiv:2412.03603): MMDiT double blocks over video and text, then single blocks over both.

Chunks of `norm1.linear` (video) and `norm1_context.linear` (text): shift, scale, gate of attention and of the feed-forward; single
blocks have one triple. The guidance scale is an input of the transformer, so one call a step draws a guided video.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.families.flux import sites as flux_sites
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.quant.blocks import TwoStreams
from ditbench.harness.quant.target import Site

HEIGHT, WIDTH, FRAMES = 720, 1280, 129  # the pipeline's defaults


def sites(transformer: nn.Module) -> list[Site]:
    """The blocks are laid out as FLUX.1's."""
    return flux_sites(transformer)


def call(pipe: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "max_sequence_length": 256}


FAMILY = PipelineFamily(
    pipelines=("HunyuanVideoPipeline",),
    transformer="HunyuanVideoTransformer3DModel",
    lists=("transformer_blocks", "single_transformer_blocks"),
    stream=lambda transformer: TwoStreams(outputs=("hidden_states", "encoder_hidden_states"), by_place=True),
    sites=sites,
    call=call,
)
