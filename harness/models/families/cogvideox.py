"""CogVideoX (Yang et al., arXiv:2408.06072): text and video tokens in one attention, each with its own adaLN-Zero rows.

Chunks of `norm1.linear` and `norm2.linear`: shift, scale, gate of the video, then shift, scale, gate of the text. q, k, v and the
feed-forward read both, text first, so a fold goes into both pairs of rows. Videos are (B, F, C, h, w).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.samplers import PIPELINE
from ditbench.harness.models.sites import QKV, chunk, reads, values
from ditbench.harness.quant.blocks import TwoStreams
from ditbench.harness.quant.target import Site

VIDEO, TEXT = (0, 1), (3, 4)  # chunks of (shift, scale)


def sites(transformer: nn.Module) -> list[Site]:
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    found = []
    for index in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        attention_rows, ff_rows = (
            [chunk(f"{block}.{norm}.linear", width, *pair) for pair in (VIDEO, TEXT)] for norm in ("norm1", "norm2")
        )
        found += [
            reads("attn_in", block, QKV, *attention_rows),
            reads("attn_out", block, ("attn1.to_out.0",), *values(block, "attn1.to_v")),
            reads("ff_in", block, ("ff.net.0.proj",), *ff_rows),
            reads("ff_mid", block, ("ff.net.2",)),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    config = pipe.transformer.config
    return {
        "height": config.sample_height * pipe.vae_scale_factor_spatial,
        "width": config.sample_width * pipe.vae_scale_factor_spatial,
        "num_frames": config.sample_frames,
        "max_sequence_length": config.max_text_seq_length,
    }


FAMILY = PipelineFamily(
    pipelines=("CogVideoXPipeline",),
    transformer="CogVideoXTransformer3DModel",
    SAMPLERS=(PIPELINE, "ddim"),
    stream=lambda transformer: TwoStreams(outputs=("hidden_states", "encoder_hidden_states")),
    sites=sites,
    call=call,
)
