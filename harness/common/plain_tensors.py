"""What a tensor subclass of another library (torchao, quanto) really holds."""

from __future__ import annotations

from torch import Tensor


def wraps_others(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors inside one that wraps others, down to those that wrap none; the tensor itself where it wraps none."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    names, _ = flatten()
    inside = [getattr(tensor, name) for name in names]
    return [plain for each in inside if isinstance(each, Tensor) for plain in plain_tensors(each)]


def held_bytes(tensor: Tensor) -> int:
    """Bytes of what it holds, whatever dtype it says it has."""
    return sum(each.numel() * each.element_size() for each in plain_tensors(tensor))
