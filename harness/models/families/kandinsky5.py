"""Kandinsky 5 (Kandinsky Lab, arXiv:2511.14993), images and videos: adaLN-Zero blocks with cross-attention to Qwen2.5-VL's tokens.

Chunks of `visual_modulation.out_layer`: shift, scale, gate of self-attention, of cross-attention and of the feed-forward; the text's
own blocks (`text_transformer_blocks`), which run before, have two triples. Only visual blocks are blocks; the others are quantized
with protocol.scope=all. The pipelines pad the prompts of a call to the longest and mask nothing, so samples are drawn one by one.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.models.base import Correction, Drawn, OnCall, Sampler
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import chunk, reads, values
from ditbench.harness.quant.target import Site
from ditbench.harness.samples.conditions import Conditions

SIDE, TOKENS = 1024, 512
HEIGHT, WIDTH, FRAMES = 512, 768, 121
IMAGES = "Kandinsky5T2IPipeline"


def sites(transformer: nn.Module) -> list[Site]:
    width = transformer.config.model_dim
    found = []
    for index in range(len(transformer.text_transformer_blocks)):
        block = f"text_transformer_blocks.{index}"
        rows = functools.partial(chunk, f"{block}.text_modulation.out_layer", width)
        found += [*_attends_itself(block, rows(0, 1)), *_feeds_forward(block, rows(3, 4))]
    for index in range(len(transformer.visual_transformer_blocks)):
        block = f"visual_transformer_blocks.{index}"
        rows = functools.partial(chunk, f"{block}.visual_modulation.out_layer", width)
        cross = "cross_attention"
        found += [
            *_attends_itself(block, rows(0, 1)),
            reads("cross_query", block, (f"{cross}.to_query",), rows(3, 4)),
            reads("caption", block, (f"{cross}.to_key", f"{cross}.to_value")),
            reads("cross_out", block, (f"{cross}.out_layer",), *values(block, f"{cross}.to_value")),
            *_feeds_forward(block, rows(6, 7)),
        ]
    return found


def _attends_itself(block: str, modulation: Any) -> list[Site]:
    attention = "self_attention"
    layers = tuple(f"{attention}.to_{name}" for name in ("query", "key", "value"))
    return [
        reads("attn_in", block, layers, modulation),
        reads("attn_out", block, (f"{attention}.out_layer",), *values(block, f"{attention}.to_value")),
    ]


def _feeds_forward(block: str, modulation: Any) -> list[Site]:
    return [
        reads("ff_in", block, ("feed_forward.in_layer",), modulation),
        reads("ff_mid", block, ("feed_forward.out_layer",)),
    ]


def call(pipe: Any) -> dict[str, Any]:
    usual = {"max_sequence_length": TOKENS}
    if type(pipe).__name__ == IMAGES:
        return usual | {"height": SIDE, "width": SIDE}
    return usual | {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}


class Kandinsky5Family(PipelineFamily):
    def prepare(self, pipe: Any) -> None:
        if type(pipe).__name__ in self.pipelines:
            pipe.__class__ = as_asked(type(pipe))
        pipe.transformer.time_embeddings.in_layer.register_forward_pre_hook(in_the_weights_dtype)

    def sample(
        self,
        pipe: Any,
        transformer: nn.Module,
        conditions: Conditions,
        sampler: Sampler,
        *,
        on_call: OnCall | None = None,
        correct: Correction | None = None,
        decode: bool = True,
    ) -> Drawn:
        each = [
            super(Kandinsky5Family, self).sample(
                pipe, transformer, conditions.rows(row, row + 1), sampler, on_call=on_call, correct=correct, decode=decode
            )
            for row in range(len(conditions))
        ]  # fmt: skip
        pixels = [drawn.pixels for drawn in each if drawn.pixels is not None]
        return Drawn(torch.cat([drawn.latents for drawn in each]), torch.cat(pixels) if pixels else None)


def in_the_weights_dtype(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """The class makes a timestep's sines in float32, and counts on weights of that dtype."""
    return (args[0].to(layer.weight.dtype),)  # type: ignore[arg-type]


@functools.cache
def as_asked(kind: type) -> type:
    """A pipeline of that class whose latents are float32 whatever the model's dtype (the video pipeline writes every step into
    them), and which draws images of the size that it is asked for, where diffusers takes the nearest of seven.
    """

    def prepare_latents(pipe: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = inspect.signature(kind.prepare_latents).bind(pipe, *args, **kwargs)  # type: ignore[attr-defined]
        given.arguments["dtype"] = torch.float32
        latents = kind.prepare_latents(*given.args, **given.kwargs)  # type: ignore[attr-defined]
        weight = next(
            pipe.transformer.parameters()
        )  # of a plan without values: nor has what a step writes into the latents
        return weight.new_empty(latents.shape, dtype=latents.dtype) if weight.is_meta else latents

    def check_inputs(pipe: Any, prompt: Any, negative_prompt: Any, height: int, width: int, **others: Any) -> None:
        if hasattr(pipe, "resolutions") and (width, height) not in pipe.resolutions:
            pipe.resolutions = [*pipe.resolutions, (width, height)]
        kind.check_inputs(pipe, prompt, negative_prompt, height, width, **others)  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"prepare_latents": prepare_latents, "check_inputs": check_inputs})


FAMILY = Kandinsky5Family(
    pipelines=(IMAGES, "Kandinsky5T2VPipeline"),
    transformer="Kandinsky5Transformer3DModel",
    lists=("visual_transformer_blocks",),
    FLOAT_IN_BLOCKS=r"norm|modulation",
    sites=sites,
    call=call,
)
