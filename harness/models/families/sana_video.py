"""SANA-Video (Chen et al., arXiv:2509.24695): adaLN-single blocks with linear attention, cross-attention and a convolutional MLP.

As in SANA, the linear attention's values fold nowhere, and the depthwise convolution stays in float; so does the one along time, which
overlaps. The MLP's first 1×1 convolution reads a modulated norm, but in five dimensions: no fold.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.families.sana import sites as sana_sites
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.quant.target import Site

HEIGHT, WIDTH, FRAMES = 480, 832, 81  # the pipeline's defaults


def sites(transformer: nn.Module) -> list[Site]:
    """The blocks are laid out as SANA's."""
    return sana_sites(transformer)


def call(pipe: Any) -> dict[str, Any]:
    return {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "max_sequence_length": min(300, pipe.tokenizer.model_max_length),
    }


class SanaVideoFamily(PipelineFamily):
    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        """Its frames are called so."""
        given = super().settings(pipe, guidance, samples)
        return {"frames": given.pop("num_frames")} | given


FAMILY = SanaVideoFamily(
    pipelines=("SanaVideoPipeline",),
    transformer="SanaVideoTransformer3DModel",
    LINEAR_ATTENTION=r"attn1$",
    FLOAT_IN_BLOCKS=r"norm|conv_depth|conv_temp",
    sites=sites,
    call=call,
)
