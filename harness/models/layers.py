"""Which layers a transformer runs: where diffusers has fused q, k and v, and where one layer has several names.

A family names its sites by the layers of its class. Fused projections stand beside the layers that they replace, which nothing
calls any more; a layer with several names reads the tensors of several sites. `as_run` says the same sites of the layers that run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.target import QUANTIZABLE, AdaLNRows, Producer, Site, TableRows, ValueRows, aliases

T = TypeVar("T")
FUSED = {  # by diffusers, one of: layer → the layers whose rows it has, in order
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


@torch.no_grad()
def fuse_qkv(transformer: nn.Module) -> None:
    """Let diffusers fuse what it can, in place.

    Raises:
        UserError: there is nothing that it can fuse.
    """
    if hasattr(transformer, "fuse_qkv_projections"):
        transformer.fuse_qkv_projections()
    if not fused_layers(transformer):
        raise UserError(f"diffusers fuses no projections of a {type(transformer).__name__}; set model.fuse_qkv=false")


def fused_layers(transformer: nn.Module) -> dict[str, tuple[str, slice]]:
    """{layer that is not called any more: (the fused layer, its rows there)}."""
    found = {}
    for prefix, module in transformer.named_modules():
        if not getattr(module, "fused_projections", False):
            continue
        for fused, parts in FUSED.items():
            if not isinstance(getattr(module, fused, None), nn.Linear):
                continue
            start = 0
            for part in parts:
                width = getattr(module, part).out_features
                found[f"{prefix}.{part}"] = (f"{prefix}.{fused}", slice(start, start + width))
                start += width
    return found


def linear_names(transformer: nn.Module) -> list[str]:
    """Every Linear and Conv2d that runs, by one name each, in the order in which they were made."""
    left_out = {*aliases(transformer), *fused_layers(transformer)}
    return [n for n, m in transformer.named_modules() if isinstance(m, QUANTIZABLE) and n not in left_out]


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
    for site in sites:
        consumers = _each_once(map(called, site.consumers))
        producers = _each_once(map(produced, site.producers))
        meets = [other for other in merged if not set(consumers).isdisjoint(other.consumers)]
        for other in meets:  # one layer reads both
            consumers = _each_once((*other.consumers, *consumers))
            producers = _each_once((*other.producers, *producers)) if other.producers and producers else ()
        merged = [other for other in merged if other not in meets]
        merged.append(Site(meets[0].name if meets else site.name, consumers, producers))
    return [_foldable_alone(site, merged) for site in merged]


def _foldable_alone(site: Site, sites: list[Site]) -> Site:
    """Without producers where one of them makes rows for another site too."""
    others = [producer for other in sites if other is not site for producer in other.producers]
    return replace(site, producers=()) if any(producer in others for producer in site.producers) else site


def _each_once(values: Iterable[T]) -> tuple[T, ...]:
    """In their order; slices cannot be hashed."""
    found: list[T] = []
    for value in values:
        if value not in found:
            found.append(value)
    return tuple(found)
