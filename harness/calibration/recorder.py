"""Calls of the transformer as they are made, written while they are recorded. What is equal is kept once, whatever the step.

    <folder>/0.safetensors, 1.safetensors, …   tensors by the hash of their content
    <folder>/calls.json                        which of them each call of each step was made with, and where they lie

Prompts' embeddings, masks and tables of positions come with every step and are stored once. Rows are read when they are
picked; what the samples of a call share (tables, numbers) is held, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ditbench.harness.calibration.on_disk import StoredList, TensorFiles, stored
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.calls import Call, RowDims, Rows, Shape, StoredRows, count_rows, take_apart

INDEX = "calls.json"

Steps = tuple[tuple[Call, ...], ...]


class Recorder:
    """Sees the transformer's arguments at every call of a sampler's run (an `OnCall`).

    dims: where the rows of each argument lie (`row_dims`). files: where its tensors go.
    """

    def __init__(self, steps: int, dims: RowDims, files: TensorFiles) -> None:
        self.dims, self.files = dims, files
        self.calls: list[list[dict[str, Any]]] = [[] for _ in range(steps)]

    def __call__(self, step: int, arguments: Mapping[str, Any]) -> None:
        if step >= len(self.calls):
            raise UserError(
                f"protocol.steps={len(self.calls)}, but the transformer is called after that many steps of the scheduler; "
                "use a first-order sampler"
            )
        rows, shape = take_apart(arguments, count_rows(arguments, self.dims), self.dims)
        keep = self.files.keep
        self.calls[step].append(
            {
                "tree": shape.tree,
                "rows": {path: _each(keep, value) for path, value in rows.items()},
                "shared": {path: keep(tensor) for path, tensor in shape.shared.items()},
            }
        )

    def mark(self) -> list[int]:
        """How far it has come; see `back_to`."""
        return [len(calls) for calls in self.calls]

    def back_to(self, mark: list[int]) -> None:
        """Forget the calls since: those of a batch that ran out of memory half way."""
        for calls, length in zip(self.calls, mark, strict=True):
            del calls[length:]

    def finish(self, unreached: Iterable[str] = ()) -> None:
        """Write what is left, and the index. unreached: linear layers that no call reached.

        Raises:
            UserError: a step had no call.
        """
        silent = [step for step, calls in enumerate(self.calls) if not calls]
        if silent:
            raise UserError(
                f"calibration: the transformer is not called at step {silent[0]}; nothing can be recorded there"
            )
        self.files.flush()
        index = {"steps": self.calls, "tensors": self.files.places, "unreached": list(unreached)}
        (self.files.folder / INDEX).write_text(json.dumps(index))


def read(folder: Path, owner: object = None) -> tuple[Steps, tuple[str, ...]]:
    """The calls of every step, and the layers that none of them reached. owner: what keeps the folder there.

    Raises:
        KeyError, TypeError, ValueError, SafetensorError: not what a Recorder writes.
    """
    index = json.loads((folder / INDEX).read_text())
    tensors = {name: stored(folder, name, place, owner) for name, place in index["tensors"].items()}
    shared: dict[str, Tensor] = {}

    def rows_of(named: str | list[str]) -> StoredRows:
        return tensors[named] if isinstance(named, str) else StoredList([tensors[each] for each in named])

    def held(name: str) -> Tensor:
        if name not in shared:
            shared[name] = tensors[name].whole()
        return shared[name]

    def call_of(entry: dict[str, Any]) -> Call:
        shape = Shape(entry["tree"], {path: held(name) for path, name in entry["shared"].items()})
        return Call({path: rows_of(named) for path, named in entry["rows"].items()}, shape)

    steps = tuple(tuple(call_of(entry) for entry in calls) for calls in index["steps"])
    return steps, tuple(index["unreached"])


def _each(keep: Any, rows: Rows) -> str | list[str]:
    return keep(rows) if isinstance(rows, Tensor) else [keep(each) for each in rows]
