"""Wan 2.1 and 2.2 (Wan team, arXiv:2503.20314): adaLN-single blocks over video tokens, cross-attention to UMT5.

Rows of scale_shift_table: shift, scale, gate of attention, then of the feed-forward, added to `temb`. Norms and modulation run
in float32 whatever the model's dtype. Cross-attention reads a norm with its own weights, which takes over no shift. Wan 2.2 A14B
has two such transformers, one for the steps of high noise and one for the others (`quant/experts.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import text_cross_attention
from ditbench.harness.models.transformer_only import TransformerOnly, random_transformer
from ditbench.harness.quant.experts import Experts, of_each
from ditbench.harness.quant.target import Site

HEIGHT, WIDTH, FRAMES = 480, 832, 81  # the pipeline's defaults


def sites(transformer: nn.Module) -> list[Site]:
    def of_one(expert: nn.Module) -> list[Site]:
        return text_cross_attention("blocks", len(expert.blocks), feed_forward="ffn")

    return of_each(transformer, of_one)


def call(pipe: Any) -> dict[str, Any]:
    usual = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return usual | {"max_sequence_length": min(512, pipe.tokenizer.model_max_length)}


class WanFamily(PipelineFamily):
    def random_pipeline(self, arguments: dict[str, Any], dtype: torch.dtype) -> TransformerOnly:
        """arguments: with `boundary_timestep` there are two experts of the same shapes."""
        arguments = dict(arguments)
        boundary = arguments.pop("boundary_timestep", None)
        first = random_transformer(self.transformer, arguments, dtype)
        if boundary is None:
            return first
        second = random_transformer(self.transformer, arguments, dtype)
        return TransformerOnly(Experts(first.transformer, second.transformer, boundary), first.inputs)


FAMILY = WanFamily(
    pipelines=("WanPipeline",),
    transformer="WanTransformer3DModel",
    lists=("blocks",),
    ALWAYS_FLOAT=r"^condition_embedder\.time_embedder\.",  # the model takes its dtype from their weights
    sites=sites,
    call=call,
)
