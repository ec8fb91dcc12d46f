"""Outliers that training leaves behind, and how far they are from what a scale per channel could undo.

Large activations in a few channels, as large DiTs have them, are put into a trained model (`inject_outliers`: rows × k, the
columns that read them ÷ k). That alone is the exact inverse of per-channel scaling. Then training goes on: weight decay and the
loss move rows and columns apart, and a second term keeps the chosen channels large, those behind GELU too, where nothing can be
injected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditbench.harness.quant.target import Site, ValueRows

TURNS = 30  # in which scales of rows and of columns are fitted


@dataclass(frozen=True)
class Loud:
    """The channels of one site that are to be large."""

    site: Site
    channels: tuple[int, ...]


def loudest(seen: dict[str, Tensor], sites: list[Site], channels: int) -> list[Loud]:
    """The channels of every site that have the largest root mean square in `seen` (`inputs_of`)."""

    def of(site: Site) -> tuple[int, ...]:
        square_C = seen[site.name].float().flatten(0, -2).square().mean(dim=0)
        return tuple(sorted(square_C.topk(channels).indices.tolist()))

    return [Loud(site, of(site)) for site in sites]


@contextmanager
def inputs_of(transformer: nn.Module, sites: list[Site]) -> Iterator[dict[str, Tensor]]:
    """{site: what its consumers last read, (…, C)} of the calls inside the block."""
    seen: dict[str, Tensor] = {}

    def remember(name: str):
        return lambda _, arguments: seen.__setitem__(name, arguments[0])

    hooks = [
        transformer.get_submodule(site.consumers[0]).register_forward_pre_hook(remember(site.name)) for site in sites
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def loudness(x: Tensor, channels: tuple[int, ...]) -> Tensor:
    """Root mean square of each of the channels over that of all others, (len(channels),). x: (…, C)."""
    square_C = x.float().flatten(0, -2).square().mean(dim=0)
    others = torch.ones(len(square_C), dtype=torch.bool)
    others[list(channels)] = False
    return (square_C[list(channels)] / square_C[others].mean()).sqrt()


def shortfall(seen: dict[str, Tensor], loud: list[Loud], ratio: float) -> Tensor:
    """Mean of (log2 of what a channel's loudness lacks to `ratio`)²; 0 where all are as loud or louder."""
    lacks = [math.log2(ratio) - loudness(seen[one.site.name], one.channels).log2() for one in loud]
    return torch.cat(lacks).clamp(min=0).square().mean()


@torch.no_grad()
def left_by_best_scale(plain: Tensor, other: Tensor, *, rows: bool = False) -> Tensor:
    """What the best scale per input channel leaves of the difference of two weights, (in,): 0 where it gives back `plain`.

    min over s of |plain_c − s_c other_c| / |plain_c| with columns (out, in)_c. s_c may be any number, and each layer has its
    own, so what is left is the least that any method's scale can leave. rows: the layer makes an input that is scaled too (V makes that of
    the projection), so its rows have a scale as well; the best of both is found by turns.
    """
    plain, other = plain.double(), other.double()
    row_R = plain.new_ones(len(plain))
    for _ in range(TURNS if rows else 1):
        scaled = other * row_R[:, None]
        column_C = (plain * scaled).sum(dim=0) / scaled.square().sum(dim=0)
        if rows:
            scaled = other * column_C
            row_R = (plain * scaled).sum(dim=1) / scaled.square().sum(dim=1)
    scaled = other * row_R[:, None] * column_C
    return (plain - scaled).norm(dim=0) / plain.norm(dim=0)


def left_of_layers(plain: nn.Module, other: nn.Module, sites: list[Site]) -> dict[str, Tensor]:
    """{layer: `left_by_best_scale`} of all that read a site."""
    makers = {producer.linear for site in sites for producer in site.producers if isinstance(producer, ValueRows)}
    return {
        name: left_by_best_scale(*(model.get_submodule(name).weight for model in (plain, other)), rows=name in makers)
        for site in sites
        for name in site.consumers
    }
