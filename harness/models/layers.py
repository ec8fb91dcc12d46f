"""A family's sites by the layers that run: where diffusers has fused q, k and v, and where one layer has several names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.layer_names import aliases, fused_layers
from ditbench.harness.quant.target import AdaLNRows, Producer, Site, TableRows, ValueRows

T = TypeVar("T")


@torch.no_grad()
def fuse_qkv(transformer: nn.Module) -> None:
    """Let diffusers fuse what it can, in place.

    Raises:
        UserError: there is nothing that it can fuse, or what it fused cannot run.
    """
    if hasattr(transformer, "fuse_qkv_projections"):
        transformer.fuse_qkv_projections()
    if not fused_layers(transformer):
        raise UserError(f"diffusers fuses no projections of a {type(transformer).__name__}; set model.fuse_qkv=false")
    for name, module in transformer.named_modules():
        joint = "Joint" in type(getattr(module, "processor", None)).__name__
        if joint and getattr(module, "add_q_proj", None) is None:
            raise UserError(
                f"diffusers cannot run {name} with fused projections: it reads no text; set model.fuse_qkv=false"
            )


def as_run(transformer: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """The sites of a transformer's class, by the layers that run.

    Sites that one layer reads become one, which has the producers of both. Where one producer makes the rows of several
    sites, nothing can be folded.
    """
    fused, same = fused_layers(transformer), aliases(transformer)
    first = {module: name for name, module in transformer.named_modules()}
    sites = list(sites)
    if not fused and not same:
        return sites

    def called(name: str) -> str:
        name = same.get(name, name)
        return fused[name][0] if name in fused else name

    def produced(producer: Producer) -> Producer:
        if isinstance(producer, TableRows):
            return replace(producer, block=first[transformer.get_submodule(producer.block)])
        name = same.get(producer.linear, producer.linear)
        if isinstance(producer, AdaLNRows) or name not in fused:
            return replace(producer, linear=name)
        whole, rows = fused[name]
        own = range(rows.start, rows.stop)[producer.rows]
        return ValueRows(whole, slice(own.start, own.stop))

    merged: list[Site] = []
    tensors: dict[str, list[tuple[str, ...]]] = {}  # of each merged site, and who reads them
    for site in sites:
        consumers = _each_once(map(called, site.consumers))
        read = [_each_once(map(called, group)) for group in site.groups]
        producers = _each_once(map(produced, site.producers))
        meets = [other for other in merged if not set(consumers).isdisjoint(other.consumers)]
        for other in meets:  # one layer reads both
            consumers = _each_once((*other.consumers, *consumers))
            producers = _each_once((*other.producers, *producers)) if other.producers and producers else ()
            read = [*tensors[other.name], *read]
        merged = [other for other in merged if other not in meets]
        name = meets[0].name if meets else site.name
        tensors[name] = read
        merged.append(Site(name, consumers, producers, _groups(consumers, read)))
    return [_foldable_alone(site, merged) for site in merged]


def _foldable_alone(site: Site, sites: list[Site]) -> Site:
    """Without producers where one of them makes rows for another site too."""
    others = [producer for other in sites if other is not site for producer in other.producers]
    return replace(site, producers=()) if any(producer in others for producer in site.producers) else site


def _groups(consumers: Iterable[str], tensors: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Layers together that read the same ones of these tensors."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name in consumers:
        found.setdefault(tuple(i for i, readers in enumerate(tensors) if name in readers), []).append(name)
    return tuple(map(tuple, found.values()))


def _each_once(values: Iterable[T]) -> tuple[T, ...]:
    """In their order; slices cannot be hashed."""
    found: list[T] = []
    for value in values:
        if value not in found:
            found.append(value)
    return tuple(found)
