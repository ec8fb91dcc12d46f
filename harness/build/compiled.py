"""A model with compiled blocks beside the eager one, on the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def compiled(model: nn.Module, names: Sequence[str], **settings: Any) -> nn.Module:
    """A copy on the same tensors, of which the named modules are compiled; the rest runs eagerly. settings: of `torch.compile`."""
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    shared = {id(tensor): tensor for tensor in [*tensors, *model.parameters(), *model.buffers()]}
    copied = copy.deepcopy(model, memo=shared)
    for name in names:
        copied.get_submodule(name).compile(dynamic=False, **settings)
    return copied
