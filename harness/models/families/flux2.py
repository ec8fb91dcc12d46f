"""FLUX.2 [dev] and [klein] (Black Forest Labs, 2025): double blocks over text and image, then single blocks over both as one sequence.

All blocks get the same modulation: `temb_mod_img` and `temb_mod_txt` (shift, scale, gate of attention, then of the feed-forward),
`temb_mod` in single blocks (one triple). So nothing folds into weights there; what is folded rewrites these rows at the input of
each block. In single blocks q, k, v and the feed-forward's first layer are one layer, `to_qkv_mlp_proj`, and `to_out` reads
attention and feed-forward side by side, so nothing folds into it. Latents are packed 2×2.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import reads, reads_apart, shared, values
from ditbench.harness.quant.blocks import TEXT_TOKENS, Arguments, TwoStreams
from ditbench.harness.quant.target import Site

ATTENTION, FEED_FORWARD = (0, 1), (3, 4)  # rows of (shift, scale)
IMAGE, TEXT, BOTH = "temb_mod_img", "temb_mod_txt", "temb_mod"
SIDE = 1024  # pixels
TOKENS = 512


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        found += [
            reads("attn_in", block, ("attn.to_q", "attn.to_k", "attn.to_v"), shared(block, IMAGE, *ATTENTION)),
            reads(
                "text_attn_in",
                block,
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                shared(block, TEXT, *ATTENTION),
            ),
            reads_apart(
                "attn_out",
                block,
                ("attn.to_out.0", "attn.to_add_out"),
                *values(block, "attn.to_v", "attn.add_v_proj"),
            ),
            reads("ff_in", block, ("ff.linear_in",), shared(block, IMAGE, *FEED_FORWARD)),
            reads("ff_mid", block, ("ff.linear_out",)),
            reads("text_ff_in", block, ("ff_context.linear_in",), shared(block, TEXT, *FEED_FORWARD)),
            reads("text_ff_mid", block, ("ff_context.linear_out",)),
        ]
    for index in range(len(transformer.single_transformer_blocks)):
        block = f"single_transformer_blocks.{index}"
        found += [
            reads("in", block, ("attn.to_qkv_mlp_proj",), shared(block, BOTH, *ATTENTION)),
            reads("out", block, ("attn.to_out",)),
        ]
    return found


@dataclass(frozen=True)
class TwoThenOne(TwoStreams):
    """Single blocks get text and image as they lie in the state, and a modulation of their own."""

    beside = MappingProxyType({BOTH: "single_stream_modulation"})

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        if BOTH not in inspect.signature(block.forward).parameters:
            return super().run(block, hidden, {name: each for name, each in arguments.items() if name != BOTH})
        others = {name: each for name, each in arguments.items() if name not in (IMAGE, TEXT, TEXT_TOKENS)}
        return block(hidden, None, **others)


def call(pipe: Any) -> dict[str, Any]:
    words = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # [dev] has a processor around it
    return {"height": SIDE, "width": SIDE, "max_sequence_length": min(TOKENS, words.model_max_length)}


FAMILY = PipelineFamily(
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    transformer="Flux2Transformer2DModel",
    lists=("transformer_blocks", "single_transformer_blocks"),
    stream=lambda transformer: TwoThenOne(outputs=("encoder_hidden_states", "hidden_states")),
    sites=sites,
    call=call,
)
