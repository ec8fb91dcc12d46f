"""Lumina-Image 2.0 (Qin et al., arXiv:2503.21758): one stream of text and image tokens, RMS norms with weights, gated by tanh.

Modulation scales and does not shift, behind a norm with its own weights: transforms run online. Only `layers` are blocks; the
refiners before them are quantized with protocol.scope=all.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import reads
from ditbench.harness.quant.target import Site


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index in range(len(transformer.layers)):
        block = f"layers.{index}"
        found += [
            reads("attn_in", block, ("attn.to_q", "attn.to_k", "attn.to_v")),
            reads("attn_out", block, ("attn.to_out.0",)),
            reads("ff_in", block, ("feed_forward.linear_1", "feed_forward.linear_3")),
            reads("ff_mid", block, ("feed_forward.linear_2",)),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {"height": side, "width": side, "max_sequence_length": min(256, pipe.tokenizer.model_max_length)}


FAMILY = PipelineFamily(
    pipelines=("Lumina2Pipeline",),
    transformer="Lumina2Transformer2DModel",
    lists=("layers",),
    sites=sites,
    call=call,
)
