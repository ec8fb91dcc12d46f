"""Z-Image (Alibaba, arXiv:2511.22699): one stream of image and text tokens behind refiners of each, RMS norms with weights.

Modulation scales and does not shift, behind a norm with its own weights, so only what attention averages folds. Only `layers` are
blocks; the refiners before them are quantized with protocol.scope=all. Its call has lists of one tensor per sample. Its guidance scale
is 0 where there is none, what others call 1; `protocol.guidance` is counted as the others' is: one more.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import reads, values
from ditbench.harness.quant.target import Site

SIDE, TOKENS = 1024, 512


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    refiners = [*_named(transformer, "noise_refiner"), *_named(transformer, "context_refiner")]
    for block in [*refiners, *_named(transformer, "layers")]:
        found += [
            reads("attn_in", block, ("attention.to_q", "attention.to_k", "attention.to_v")),
            reads("attn_out", block, ("attention.to_out.0",), *values(block, "attention.to_v")),
            reads("ff_in", block, ("feed_forward.w1", "feed_forward.w3")),
            reads("ff_mid", block, ("feed_forward.w2",)),
        ]
    return found


def _named(transformer: nn.Module, blocks: str) -> list[str]:
    return [f"{blocks}.{index}" for index in range(len(getattr(transformer, blocks)))]


def call(pipe: Any) -> dict[str, Any]:
    return {"height": SIDE, "width": SIDE, "max_sequence_length": min(TOKENS, pipe.tokenizer.model_max_length)}


class ZImageFamily(PipelineFamily):
    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        return super().settings(pipe, guidance - 1, samples)


FAMILY = ZImageFamily(
    pipelines=("ZImagePipeline",),
    transformer="ZImageTransformer2DModel",
    lists=("layers",),
    FLOAT_IN_BLOCKS=r"norm|adaLN",
    sites=sites,
    call=call,
)
