"""HiDream-I1 (HiDream.ai, arXiv:2505.22705): double blocks over image and text, then single blocks over both, with four experts.

Chunks of `adaLN_modulation.1`: shift, scale, gate of attention and of the feed-forward, of the image and then of the text. Each block
gets the projection of one of Llama's layers beside the text that goes through all of them. Of the image's feed-forward each token
reads a shared expert and two of four; the gate that chooses reads the same tensor and is no layer, so nothing folds into it, and each
expert has a site of its own, since it sees tokens of its own. diffusers lists the blocks' own modules as `block`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import chunk, reads, reads_apart, values
from ditbench.harness.quant.blocks import TEXT_TOKENS, Arguments, BlockCall
from ditbench.harness.quant.target import Site

TOKENS = 128
DOUBLE, SINGLE = "double_stream_blocks", "single_stream_blocks"
IMAGE, TEXT, MASK, OWN = "hidden_states", "encoder_hidden_states", "hidden_states_masks", "own_text"
SAME_AREA = 0.1  # of what is drawn, against what is asked for


def sites(transformer: nn.Module) -> list[Site]:
    width, found = transformer.inner_dim, []
    for index, each in enumerate(transformer.get_submodule(DOUBLE)):
        block = f"{DOUBLE}.{index}.block"
        modulation = f"{block}.adaLN_modulation.1"
        found += [
            reads("attn_in", block, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), chunk(modulation, width, 0, 1)),
            reads("text_attn_in", block, ("attn1.to_q_t", "attn1.to_k_t", "attn1.to_v_t"), chunk(modulation, width, 6, 7)),
            reads_apart("attn_out", block, ("attn1.to_out", "attn1.to_out_t"), *values(block, "attn1.to_v", "attn1.to_v_t")),
            *_of_experts(block, each.block.ff_i, chunk(modulation, width, 3, 4)),
            reads("text_ff_in", block, ("ff_t.w1", "ff_t.w3"), chunk(modulation, width, 9, 10)),
            reads("text_ff_mid", block, ("ff_t.w2",)),
        ]  # fmt: skip
    for index, each in enumerate(transformer.get_submodule(SINGLE)):
        block = f"{SINGLE}.{index}.block"
        modulation = f"{block}.adaLN_modulation.1"
        found += [
            reads("attn_in", block, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), chunk(modulation, width, 0, 1)),
            reads("attn_out", block, ("attn1.to_out",), *values(block, "attn1.to_v")),
            *_of_experts(block, each.block.ff_i, chunk(modulation, width, 3, 4)),
        ]
    return found


def _of_experts(block: str, feed_forward: nn.Module, modulation: Any) -> list[Site]:
    if not hasattr(feed_forward, "experts"):
        return [reads("ff_in", block, ("ff_i.w1", "ff_i.w3"), modulation), reads("ff_mid", block, ("ff_i.w2",))]
    count = len(feed_forward.experts)  # type: ignore[arg-type]
    found = []
    for expert in ("shared_experts", *(f"experts.{index}" for index in range(count))):
        layers = (f"ff_i.{expert}.w1", f"ff_i.{expert}.w3")
        found += [reads(f"{expert}.in", block, layers), reads(f"{expert}.mid", block, (f"ff_i.{expert}.w2",))]
    return found


@dataclass(frozen=True)
class WithOwnText(BlockCall):
    """The state is all text that the block reads, then the image; its last part is the block's own, put there when it is called."""

    beside: dict[str, str] = field(default_factory=dict)  # type: ignore[assignment]

    def enter(self, block: nn.Module, arguments: Arguments) -> tuple[Tensor, Arguments]:
        image, text = arguments[IMAGE], arguments[TEXT]
        rest = {name: value for name, value in arguments.items() if name not in (IMAGE, TEXT)}
        return torch.cat([text, image], 1), rest | {TEXT_TOKENS: text.shape[1]}

    def run(self, block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        tokens = arguments[TEXT_TOKENS]
        text, image = hidden.tensor_split([tokens], 1)
        own = arguments[f"{OWN}.{block.place}"]
        text = torch.cat([text[:, : tokens - own.shape[1]], own.to(text.dtype)], 1)
        rest = {name: arguments.get(name) for name in (MASK, "temb", "image_rotary_emb")}
        if block.in_two_streams:
            image, text = block(hidden_states=image, encoder_hidden_states=text, **rest)
            return torch.cat([text, image], 1)
        if rest[MASK] is not None:  # of the image: all text is read
            rest[MASK] = torch.cat([rest[MASK], rest[MASK].new_ones(len(text), tokens)], 1)
        image, text = block(hidden_states=torch.cat([image, text], 1), **rest).tensor_split([image.shape[1]], 1)
        return torch.cat([text, image], 1)


def stream(transformer: nn.Module) -> BlockCall:
    blocks = len(transformer.get_submodule(DOUBLE)) + len(transformer.get_submodule(SINGLE))  # type: ignore[arg-type]
    return WithOwnText({f"{OWN}.{place}": f"caption_projection.{place}" for place in range(blocks)})


def side_of(pipe: Any) -> int:
    """Of the square that has as many pixels as all that the pipeline draws."""
    return pipe.default_sample_size * pipe.vae_scale_factor


def call(pipe: Any) -> dict[str, Any]:
    side, words = side_of(pipe), pipe.tokenizer_3
    return {"height": side, "width": side, "max_sequence_length": min(TOKENS, words.model_max_length)}


class HiDreamFamily(PipelineFamily):
    def _check(self, pipe: Any) -> None:
        super()._check(pipe)
        if pipe.text_encoder_4 is None or pipe.tokenizer_4 is None:
            raise UserError(
                "its text_encoder_4 and tokenizer_4 are missing: HiDream-I1 is published without Llama-3.1-8B-Instruct; load the pipeline with it "
                "in diffusers, save_pretrained it, and set model.source to that folder"
            )

    def prepare(self, pipe: Any) -> None:
        """Tell each block its place; in a plan, which has no values, tokens go to the experts in equal parts."""
        transformer = pipe.transformer
        blocks = [*transformer.double_stream_blocks, *transformer.single_stream_blocks]
        for place, block in enumerate(blocks):
            block.place, block.in_two_streams = place, place < len(transformer.double_stream_blocks)
            if next(transformer.parameters()).is_meta and hasattr(block.block.ff_i, "experts"):
                replace_method(block.block.ff_i, "moe_infer", in_equal_parts)
        if next(transformer.parameters()).is_meta:
            replace_method(transformer, "patchify", functools.partial(with_plain_sizes, type(transformer).patchify))

    def settings(self, pipe: Any, guidance: float, samples: int) -> dict[str, Any]:
        given = super().settings(pipe, guidance, samples)
        asked, drawn = given["height"] * given["width"], side_of(pipe) ** 2
        if abs(asked / drawn - 1) > SAME_AREA:
            raise UserError(
                f"model.size: a {type(pipe).__name__} draws about {side_of(pipe)}×{side_of(pipe)} pixels in all, whatever it is asked for; "
                f"got {given['height']}×{given['width']}"
            )
        return given


def replace_method(module: nn.Module, name: str, method: Any) -> None:
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: lambda own, *args: method(own, *args)})


def with_plain_sizes(patchify: Any, transformer: Any, latents: Tensor) -> tuple[Any, ...]:
    """It would read the sizes, which it knows, out of a tensor."""
    tokens, masks, _, ids = patchify(transformer, latents)
    height, width = (side // transformer.config.patch_size for side in latents.shape[-2:])
    return tokens, masks, [(height, width)] * len(latents), ids


def in_equal_parts(feed_forward: Any, tokens_TC: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    experts, read = feed_forward.experts, len(chosen)
    for place, expert in enumerate(experts):
        rows = read // len(experts) + (place < read % len(experts))
        if rows:
            expert(tokens_TC.new_empty(rows, tokens_TC.shape[-1]))
    return torch.zeros_like(tokens_TC)


FAMILY = HiDreamFamily(
    pipelines=("HiDreamImagePipeline",),
    transformer="HiDreamImageTransformer2DModel",
    lists=(DOUBLE, SINGLE),
    FLOAT_IN_BLOCKS=r"norm|adaLN",
    stream=stream,
    sites=sites,
    call=call,
)
