"""The arguments of one transformer call, taken apart: what has one row per sample, and what all samples share.

Families hand their transformers nested arguments (dicts, tuples, None, numbers, tables of positions). A recording keeps
rows as plain {name: tensor}, so that samples can be picked and put side by side, and puts the rest back at each call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError

PLAIN = (bool, int, float, str, type(None))
KEEP_PRECISION = ("timestep", "sigma", "guidance")  # arguments that a model embeds in float32 whatever its dtype


@dataclass(frozen=True)
class Shape:
    """How the arguments were nested. tree: JSON; its leaves name a tensor by rows or shared, or hold a plain value."""

    tree: dict[str, Any]
    shared: dict[str, Tensor] = field(default_factory=dict)

    def arguments(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """The call's keyword arguments for these rows."""
        return self._put(self.tree, rows)

    def _put(self, node: dict[str, Any], rows: Mapping[str, Tensor]) -> Any:
        ((kind, value),) = node.items()
        if kind == "rows":
            return rows[value]
        if kind == "shared":
            return self.shared[value]
        if kind == "plain":
            return value
        if kind == "dict":
            return {name: self._put(each, rows) for name, each in value.items()}
        parts = [self._put(each, rows) for each in value]
        return tuple(parts) if kind == "tuple" else parts


def take_apart(arguments: Mapping[str, Any], rows: int, shared_names: Collection[str] = ()) -> tuple[dict, Shape]:
    """Arguments of a call on `rows` rows → ({name: tensor with that many rows}, the shape of the rest).

    shared_names: arguments that have no row per sample, however long they are (tables of positions).

    Raises:
        UserError: an argument that cannot be recorded.
    """
    found: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Tensor):
            by_row = value.ndim > 0 and len(value) == rows and path.split("/")[0] not in shared_names
            (found if by_row else shared)[path] = value.detach()
            return {"rows" if by_row else "shared": path}
        if isinstance(value, PLAIN):
            return {"plain": value}
        if isinstance(value, Mapping):
            return {"dict": {name: visit(each, f"{path}/{name}") for name, each in value.items()}}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [visit(each, f"{path}/{index}") for index, each in enumerate(value)]}
        raise UserError(f"calibration: cannot record the argument {path} of the transformer, a {type(value).__name__}")

    tree = {"dict": {name: visit(value, name) for name, value in arguments.items()}}
    return found, Shape(tree, shared)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of the model's float values (some classes keep their norms in float32); float32 if it has none."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def placed(value: Any, dtype: torch.dtype, device: torch.device | str, name: str = "") -> Any:
    """Nested arguments on a device, floats in a dtype (but for those a model embeds in float32)."""
    if isinstance(value, Tensor):
        keep = not value.is_floating_point() or name in KEEP_PRECISION
        return value.to(device) if keep else value.to(device, dtype)
    if isinstance(value, Mapping):
        return {each: placed(part, dtype, device, name or each) for each, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(placed(part, dtype, device, name) for part in value)
    return value
