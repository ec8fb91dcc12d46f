"""Modules that are on a device only while they are needed there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def placed_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the module's parameters and buffers are copies on the device; then they are what they were, where they were."""
    before = [
        (table, name, tensor)
        for each in module.modules()
        for table in (each._parameters, each._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    there: dict[int, Tensor] = {}
    for _, _, tensor in before:
        if id(tensor) not in there:  # one that is held under two names stays one
            copied = tensor.detach().to(device)
            there[id(tensor)] = (
                nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
            )
    try:
        for table, name, tensor in before:
            table[name] = there[id(tensor)]
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Of all their parameters and buffers, each counted once."""
    held = {id(t): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(held.values())
