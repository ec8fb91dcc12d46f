"""Qwen-Image (Qwen team, arXiv:2508.02324): MMDiT double blocks over text and image, each with its own adaLN-Zero rows.

Chunks of `img_mod.1` and `txt_mod.1`: shift, scale, gate of attention, then of the feed-forward. Guidance is true: a second call a step
with the negative prompt `" "`, as its authors use it; the texts of the two calls are as long as they are. Latents are packed 2×2.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import chunk, reads, reads_apart, values
from ditbench.harness.quant.blocks import TwoStreams
from ditbench.harness.quant.target import Site

ATTENTION, FEED_FORWARD = (0, 1), (3, 4)  # chunks of (shift, scale)
NO_CONCEPT = " "
SIDE, TOKENS = 1328, 512


def sites(transformer: nn.Module) -> list[Site]:
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    found = []
    for index in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        image, text = f"{block}.img_mod.1", f"{block}.txt_mod.1"
        added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        outputs = ("attn.to_out.0", "attn.to_add_out")
        found += [
            reads("attn_in", block, ("attn.to_q", "attn.to_k", "attn.to_v"), chunk(image, width, *ATTENTION)),
            reads("text_attn_in", block, added, chunk(text, width, *ATTENTION)),
            reads_apart("attn_out", block, outputs, *values(block, "attn.to_v", "attn.add_v_proj")),
            reads("ff_in", block, ("img_mlp.net.0.proj",), chunk(image, width, *FEED_FORWARD)),
            reads("ff_mid", block, ("img_mlp.net.2",)),
            reads("text_ff_in", block, ("txt_mlp.net.0.proj",), chunk(text, width, *FEED_FORWARD)),
            reads("text_ff_mid", block, ("txt_mlp.net.2",)),
        ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    return {"height": SIDE, "width": SIDE, "max_sequence_length": min(TOKENS, pipe.tokenizer.model_max_length)}


class QwenImageFamily(PipelineFamily):
    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        negative = {"negative_prompt": [NO_CONCEPT] * samples} if guidance > self.unguided else {}
        return super().settings(pipe, guidance, samples) | negative


FAMILY = QwenImageFamily(
    pipelines=("QwenImagePipeline",),
    transformer="QwenImageTransformer2DModel",
    FLOAT_IN_BLOCKS=r"norm|_mod\.",
    stream=lambda transformer: TwoStreams(outputs=("encoder_hidden_states", "hidden_states")),
    guidance="true_cfg_scale",
    sites=sites,
    call=call,
)
