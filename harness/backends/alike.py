"""Whether two layers do the same to their input."""

from __future__ import annotations

import torch
from torch import nn

from ditbench.harness.quant.quantizers import ActQuant


def alike(a: nn.Module | None, b: nn.Module | None) -> bool:
    """Whether two modules of transforms or tables have the same parts with the same tensors."""
    if a is None or b is None:
        return a is b
    parts = [[(name, type(module)) for name, module in each.named_modules()] for each in (a, b)]
    if parts[0] != parts[1]:
        return False
    ours, theirs = (dict(each.named_buffers()) for each in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def quantizers_alike(a: ActQuant | None, b: ActQuant | None) -> bool:
    """Whether both give the same codes; None quantizes nothing, and is like nothing."""
    if a is None or b is None:
        return False
    same_range = alike(a.scale, b.scale) and alike(a.zero_point, b.zero_point)
    return type(a) is type(b) and a.spec == b.spec and a.clip == b.clip and same_range
