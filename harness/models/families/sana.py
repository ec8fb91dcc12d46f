"""SANA (Xie et al., arXiv:2410.10629): adaLN-single blocks with linear attention, cross-attention and a convolutional MLP.

Linear attention divides by the sum of its weights, which is one row of the same product, so V's rows can take over a scale;
but in diffusers' form a bias would not pass through unchanged, and nothing is folded there. In the MLP the first 1×1
convolution reads the modulated norm; the depthwise one stays in float.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import QKV, reads, table, values
from ditbench.harness.quant.target import Site


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        found += [
            reads("attn_in", block, QKV, table(block, "timestep", 0, 1)),
            reads("attn_out", block, ("attn1.to_out.0",)),
            reads("cross_query", block, ("attn2.to_q",)),
            reads("caption", block, ("attn2.to_k", "attn2.to_v")),
            reads("cross_out", block, ("attn2.to_out.0",), *values(block, "attn2.to_v")),
            reads("ff_in", block, ("ff.conv_inverted",)),
            reads("ff_mid", block, ("ff.conv_point",)),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {
        "height": side,
        "width": side,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "max_sequence_length": min(300, pipe.tokenizer.model_max_length),
    }


FAMILY = PipelineFamily(
    pipelines=("SanaPipeline",),
    transformer="SanaTransformer2DModel",
    LINEAR_ATTENTION=r"attn1$",
    FLOAT_IN_BLOCKS=r"norm|conv_depth",
    sites=sites,
    call=call,
)
