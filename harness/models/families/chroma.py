"""Chroma (Lodestone Rock, 2025): FLUX.1's blocks without their adaLN layers; one network makes the modulation of all of them.

A double block gets its rows in `temb` (B, 12, C): shift, scale, gate of attention and of the feed-forward, of the image and then of the
text; a single block one triple. What is folded rewrites these rows at the input of the block. The network that makes them is no
block and stays in float.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import reads, reads_apart, shared, values
from ditbench.harness.quant.blocks import TEXT_TOKENS, Arguments, TwoStreams
from ditbench.harness.quant.target import Site

ATTENTION, FEED_FORWARD = (0, 1), (3, 4)  # rows of (shift, scale)
TEXT_ATTENTION, TEXT_FEED_FORWARD = (6, 7), (9, 10)
ALL = "pooled_temb"  # the modulation of all blocks
SIDE, TOKENS = 1024, 512


def sites(transformer: nn.Module) -> list[Site]:
    found = []
    for index in range(len(transformer.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        outputs = ("attn.to_out.0", "attn.to_add_out")
        found += [
            reads("attn_in", block, ("attn.to_q", "attn.to_k", "attn.to_v"), shared(block, "temb", *ATTENTION)),
            reads("text_attn_in", block, added, shared(block, "temb", *TEXT_ATTENTION)),
            reads_apart("attn_out", block, outputs, *values(block, "attn.to_v", "attn.add_v_proj")),
            reads("ff_in", block, ("ff.net.0.proj",), shared(block, "temb", *FEED_FORWARD)),
            reads("ff_mid", block, ("ff.net.2",)),
            reads("text_ff_in", block, ("ff_context.net.0.proj",), shared(block, "temb", *TEXT_FEED_FORWARD)),
            reads("text_ff_mid", block, ("ff_context.net.2",)),
        ]
    for index in range(len(transformer.single_transformer_blocks)):
        block = f"single_transformer_blocks.{index}"
        layers = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        found += [reads("in", block, layers, shared(block, "temb", *ATTENTION)), reads("out", block, ("proj_out",))]
    return found


@dataclass(frozen=True)
class OwnRows(TwoStreams):
    """Each block gets its own rows of what one network makes; single blocks get text and image as they lie in the state."""

    beside = MappingProxyType({ALL: "distilled_guidance_layer"})

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        rows: Any = block.rows_of_temb
        own = {name: each for name, each in arguments.items() if name != ALL} | {"temb": arguments[ALL][:, rows]}
        if len(rows) > 3:
            return super().run(block, hidden, own)
        return block(hidden, **{name: each for name, each in own.items() if name != TEXT_TOKENS})


def call(pipe: Any) -> dict[str, Any]:
    return {"height": SIDE, "width": SIDE, "max_sequence_length": min(TOKENS, pipe.tokenizer.model_max_length)}


class ChromaFamily(PipelineFamily):
    def prepare(self, pipe: Any) -> None:
        """Tell each block which rows are its own: single blocks' come first, then the images', then the texts'."""
        double, single = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
        for index, block in enumerate(single):
            block.rows_of_temb = [*range(3 * index, 3 * index + 3)]
        for index, block in enumerate(double):
            image = 3 * len(single) + 6 * index
            text = image + 6 * len(double)
            block.rows_of_temb = [*range(image, image + 6), *range(text, text + 6)]


FAMILY = ChromaFamily(
    pipelines=("ChromaPipeline",),
    transformer="ChromaTransformer2DModel",
    lists=("transformer_blocks", "single_transformer_blocks"),
    stream=lambda transformer: OwnRows(outputs=("encoder_hidden_states", "hidden_states")),
    sites=sites,
    call=call,
)
