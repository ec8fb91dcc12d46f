"""PixArt-α and PixArt-Σ (Chen et al., arXiv:2310.00426, 2403.04692): adaLN-single blocks with cross-attention to T5.

Rows of scale_shift_table: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, added to `timestep`. The query of
cross-attention reads the residual stream and its keys and values the caption: nothing there can take over a transform.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.pipeline import PipelineFamily
from harness.quant.target import Site
from harness.samplers import PIPELINE
from harness.sites import QKV, reads, table, values

ALPHA_TOKENS, SIGMA_TOKENS = 120, 300  # the pipelines' defaults


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        found += [
            reads("attn_in", block, QKV, table(block, "timestep", 0, 1)),
            reads("attn_out", block, ("attn1.to_out.0",), *values(block, "attn1.to_v")),
            reads("cross_query", block, ("attn2.to_q",)),
            reads("caption", block, ("attn2.to_k", "attn2.to_v")),
            reads("cross_out", block, ("attn2.to_out.0",), *values(block, "attn2.to_v")),
            reads("ff_in", block, ("ff.net.0.proj",), table(block, "timestep", 3, 4)),
            reads("ff_mid", block, ("ff.net.2",)),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    """Square pictures of the size that the transformer was trained for; captions as they are."""
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    usual = SIGMA_TOKENS if "Sigma" in type(pipe).__name__ else ALPHA_TOKENS
    return {
        "height": side,
        "width": side,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": min(usual, pipe.tokenizer.model_max_length),
    }


FAMILY = PipelineFamily(
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    transformer="PixArtTransformer2DModel",
    SAMPLERS=(PIPELINE, "dpm++", "ddim", "ddpm"),
    attention_modules=("attn1",),
    sites=sites,
    call=call,
)
