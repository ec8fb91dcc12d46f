"""PixArt-α and PixArt-Σ (Chen et al., arXiv:2310.00426, 2403.04692): adaLN-single blocks with cross-attention to T5.

Rows of scale_shift_table: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, added to `timestep`. The query of
cross-attention reads the residual stream and its keys and values the caption: nothing there can take over a transform.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.samplers import PIPELINE
from ditbench.harness.models.sites import text_cross_attention
from ditbench.harness.quant.target import Site

ALPHA_TOKENS, SIGMA_TOKENS = 120, 300  # the pipelines' defaults


def sites(transformer: nn.Module) -> list[Site]:
    return text_cross_attention("transformer_blocks", len(transformer.transformer_blocks), modulation="timestep")


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
