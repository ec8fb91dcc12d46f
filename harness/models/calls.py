"""The arguments of one transformer call, taken apart: what has one row per sample, and what all samples share.

Families hand their transformers nested arguments (dicts, tuples, None, numbers, tables of positions, lists of one tensor per
sample). A `Call` keeps the rows by name, so that samples can be picked and put side by side, and puts the rest back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.plain_tensors import wraps_others

PLAIN = (bool, int, float, str, type(None))
KEEP_PRECISION = ("timestep", "timesteps", "t", "sigma", "guidance")  # embedded in float32 whatever the model's dtype
FEW, MORE = 2, 3  # samples of the two calls that show which dimensions grow with them

Rows = Tensor | list[Tensor]  # of one argument: along dimension 0, or one tensor per row, each with its own shape
RowDims = Mapping[str, int | None]  # by path: the dimension that has a row per sample, None where there is none


class StoredRows(Protocol):
    """Rows that are read when they are picked, such as those of a recording on disk."""

    @property
    def form(self) -> Any:
        """As `form_of` says of rows in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, kept: Tensor | slice) -> Rows:
        """A copy of some of them, in the order asked for."""
        ...


@dataclass(frozen=True)
class Shape:
    """How the arguments were nested. tree: JSON; its leaves name rows or a shared tensor, or hold a plain value."""

    tree: dict[str, Any]
    shared: dict[str, Tensor] = field(default_factory=dict)

    def arguments(self, rows: Mapping[str, Rows]) -> dict[str, Any]:
        """The call's keyword arguments for these rows."""
        return self._put(self.tree, rows)

    def _put(self, node: dict[str, Any], rows: Mapping[str, Rows]) -> Any:
        ((kind, value),) = node.items()
        if kind == "rows":
            path, dim = value
            return rows[path].movedim(0, dim)  # type: ignore[union-attr]
        if kind == "list of rows":
            return list(rows[value])
        if kind == "each":
            return [self._put(value, rows) for _ in range(len(next(iter(rows.values()))))]
        if kind == "shared":
            return self.shared[value]
        if kind == "plain":
            return value
        if kind == "dict":
            return {name: self._put(each, rows) for name, each in value.items()}
        parts = [self._put(each, rows) for each in value]
        return tuple(parts) if kind == "tuple" else parts


@dataclass(frozen=True, eq=False)
class Call(Mapping[str, Rows]):
    """Some rows of one call of the transformer, by the argument's path ("added/sizes/0"); `len(call.rows)` arguments.

    rows: in memory, or stored: then an argument that is asked for is read whole, and `pick` reads what it picks.
    shape: how to call it with them; None where the rows are all there is.
    """

    rows: Mapping[str, Rows | StoredRows]
    shape: Shape | None = None

    def __getitem__(self, path: str) -> Rows:
        rows = self.rows[path]
        return rows if isinstance(rows, Tensor | list) else rows[:]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.rows.values())))

    def tensors(self) -> Iterator[Tensor]:
        """All that have rows."""
        for rows in self.values():
            yield from [rows] if isinstance(rows, Tensor) else rows

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments."""
        rows = dict(self)
        return rows if self.shape is None else self.shape.arguments(rows)

    def pick(self, kept: Tensor | slice) -> Call:
        """Some of the rows, in the order asked for; a slice of what is in memory copies nothing."""
        return Call({path: picked_rows(rows, kept) for path, rows in self.rows.items()}, self.shape)

    def is_like(self, other: Call) -> bool:
        """Whether the two can be one call on the rows of both: nothing but the rows' values differs."""
        if self.shape is None or other.shape is None:
            same_rest = self.shape is other.shape
        else:
            same_rest = self.shape.tree == other.shape.tree and all(
                tensor is other.shape.shared[path] or torch.equal(tensor, other.shape.shared[path])
                for path, tensor in self.shape.shared.items()
            )
        return same_rest and {path: form_of(rows) for path, rows in self.rows.items()} == {
            path: form_of(rows) for path, rows in other.rows.items()
        }


def side_by_side(calls: Sequence[Call]) -> Call:
    """Calls that are alike, as one."""
    if len(calls) == 1:
        return calls[0]
    return Call({path: joined_rows([call[path] for call in calls]) for path in calls[0]}, calls[0].shape)


def picked_rows(rows: Rows | StoredRows, kept: Tensor | slice) -> Rows:
    if isinstance(rows, list) and isinstance(kept, Tensor):
        return [rows[index] for index in kept.tolist()]
    return rows[kept]  # type: ignore[index]


def joined_rows(parts: list[Any]) -> Rows:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [tensor for part in parts for tensor in part]


def form_of(rows: Rows | StoredRows) -> Any:
    """What two arguments must share to be put side by side: shape of a row and dtype; of a list that it is one."""
    if isinstance(rows, Tensor):
        return (tuple(rows.shape[1:]), rows.dtype)
    return list if isinstance(rows, list) else rows.form


def take_apart(arguments: Mapping[str, Any], rows: int, dims: RowDims | None = None) -> tuple[dict[str, Rows], Shape]:
    """Arguments of a call on `rows` rows → (rows by path, along dimension 0 or as a list, and the shape of the rest).

    dims: where the rows of an argument, or of a part of one, lie (`row_dims`, a family's ROWS). Where it says nothing, a
    tensor has rows if its first dimension is as long as the batch.

    Raises:
        UserError: an argument that cannot be recorded.
    """
    found: dict[str, Rows] = {}
    shared: dict[str, Tensor] = {}
    dims = dims or {}

    def visit(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Tensor):
            by_chance = 0 if value.ndim > 0 and len(value) == rows else None
            dim = said(dims, path, by_chance)
            if dim is None:
                shared[path] = value.detach()
                return {"shared": path}
            found[path] = value.detach().movedim(dim, 0)
            return {"rows": [path, dim]}
        if isinstance(value, PLAIN):
            return {"plain": value}
        if isinstance(value, Mapping):
            return {"dict": {name: visit(each, f"{path}/{name}") for name, each in value.items()}}
        if isinstance(value, tuple | list):
            if dims.get(path) == 0:
                return list_of_rows(value, path)
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [visit(each, f"{path}/{index}") for index, each in enumerate(value)]}
        raise UserError(f"calibration: cannot record the argument {path} of the transformer, a {type(value).__name__}")

    def list_of_rows(value: Sequence[Any], path: str) -> dict[str, Any]:
        if all(isinstance(each, Tensor) for each in value):
            found[path] = [each.detach() for each in value]
            return {"list of rows": path}
        before = len(found) + len(shared)
        trees = [visit(each, f"{path}/each") for each in value]
        if len(found) + len(shared) > before or any(tree != trees[0] for tree in trees):
            raise UserError(
                f"calibration: cannot record the argument {path} of the transformer: a list with an entry per sample whose "
                "entries are neither tensors nor all equal"
            )
        return {"each": trees[0]}

    tree = {"dict": {name: visit(value, name) for name, value in arguments.items()}}
    return found, Shape(tree, shared)


def row_dims(few: Mapping[str, Any], more: Mapping[str, Any], known: RowDims) -> dict[str, int | None]:
    """Where the rows of each argument lie: along what grows from a call on FEW samples to one on MORE.

    known: what the family says, by path or by the argument's name; not looked at. Dimension 0 of a list is its length.

    Raises:
        UserError: an argument grows otherwise than a row per sample would, and the family says nothing of it.
    """
    found: dict[str, int | None] = dict(known)

    def visit(one: Any, other: Any, path: str) -> None:
        if path in known:
            return
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim:
            grown = [dim for dim in range(one.ndim) if one.shape[dim] != other.shape[dim]]
            if len(grown) > 1 or any(one.shape[dim] * MORE != other.shape[dim] * FEW for dim in grown):
                raise UserError(
                    f"calibration: the argument {path} of the transformer is {tuple(one.shape)} for {FEW} samples and "
                    f"{tuple(other.shape)} for {MORE}: no row per sample; its family has to say where they lie (ROWS)"
                )
            found[path] = grown[0] if grown else None
        elif isinstance(one, Mapping) and isinstance(other, Mapping):
            for name in one.keys() & other.keys():
                visit(one[name], other[name], f"{path}/{name}")
        elif isinstance(one, tuple | list) and isinstance(other, tuple | list):
            if len(one) != len(other):
                found[path] = 0
            else:
                for index, (first, second) in enumerate(zip(one, other, strict=True)):
                    visit(first, second, f"{path}/{index}")

    for name in few.keys() & more.keys():
        visit(few[name], more[name], name)
    return found


def count_rows(arguments: Mapping[str, Any], dims: RowDims) -> int:
    """The rows of a call, from the arguments whose rows are known.

    Raises:
        UserError: there is none, or they disagree.
    """
    counts: dict[str, int] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            dim = said(dims, path, None)
            if dim is not None:
                counts[path] = value.shape[dim]
        elif isinstance(value, tuple | list) and dims.get(path) == 0:
            counts[path] = len(value)
        elif isinstance(value, Mapping):
            for name, each in value.items():
                visit(each, f"{path}/{name}")
        elif isinstance(value, tuple | list):
            for index, each in enumerate(value):
                visit(each, f"{path}/{index}")

    for name, value in arguments.items():
        visit(value, name)
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{path}: {count}" for path, count in counts.items()) or "none"
        raise UserError(
            f"calibration: how many rows has a call of the transformer? By argument: {listed}; its family has to say where "
            "they lie (ROWS)"
        )
    return next(iter(counts.values()))


def said(dims: RowDims, path: str, otherwise: int | None) -> int | None:
    """Of a part of an argument, or else of the whole."""
    return dims.get(path, dims.get(path.split("/")[0], otherwise))


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of the model's float values (some classes keep their norms in float32); float32 if it has none.

    Codes that another library wraps have whatever dtype they were saved in, and count only where there is nothing else.
    """
    counts: dict[torch.dtype, int] = {}
    parameters = list(model.parameters())
    for parameter in [each for each in parameters if not wraps_others(each)] or parameters:
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
