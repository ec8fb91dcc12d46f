"""Calls of the transformer as they are made, and the file they are kept in. What is equal is kept once, whatever the step.

A file holds tensors by the hash of their content, and an index in its metadata that says which of them each call of each
step was made with: prompts' embeddings, masks and tables of positions come with every step and are stored once. Tensors are
read by name and by rows only, so that a reader need not hold the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path
from ditbench.harness.models.calls import Call, RowDims, Rows, Shape, count_rows, take_apart

SECONDS = "seconds"  # metadata of cached files
CALLS = "calls"  # metadata: per step a list of calls
UNREACHED = "unreached"  # metadata: names of layers

Steps = tuple[tuple[Call, ...], ...]


class Recorder:
    """Sees the transformer's arguments at every call of a sampler's run (an `OnCall`).

    dims: where the rows of each argument lie (`row_dims`).
    """

    def __init__(self, steps: int, dims: RowDims) -> None:
        self.dims, self.tensors = dims, Tensors()
        self.calls: list[list[Call]] = [[] for _ in range(steps)]

    def __call__(self, step: int, arguments: Mapping[str, Any]) -> None:
        if step >= len(self.calls):
            raise UserError(
                f"protocol.steps={len(self.calls)}, but the transformer is called after that many steps of the scheduler; "
                "use a first-order sampler"
            )
        rows, shape = take_apart(arguments, count_rows(arguments, self.dims), self.dims)
        keep = self.tensors.keep
        kept: dict[str, Rows] = {
            path: keep(value) if isinstance(value, Tensor) else [keep(each) for each in value]
            for path, value in rows.items()
        }
        shared = {path: keep(tensor) for path, tensor in shape.shared.items()}
        self.calls[step].append(Call(kept, Shape(shape.tree, shared)))

    def mark(self) -> list[int]:
        """How far it has come; see `back_to`."""
        return [len(calls) for calls in self.calls]

    def back_to(self, mark: list[int]) -> None:
        """Forget the calls since: those of a batch that ran out of memory half way."""
        for calls, length in zip(self.calls, mark, strict=True):
            del calls[length:]

    def finished(self) -> Steps:
        """The calls of every step.

        Raises:
            UserError: a step had none.
        """
        silent = [step for step, calls in enumerate(self.calls) if not calls]
        if silent:
            raise UserError(
                f"calibration: the transformer is not called at step {silent[0]}; nothing can be recorded there"
            )
        return tuple(tuple(calls) for calls in self.calls)


class Tensors:
    """Tensors by the hash of their content, on the CPU."""

    def __init__(self) -> None:
        self.by_hash: dict[str, Tensor] = {}
        self._hashes: dict[int, str] = {}  # by identity

    def keep(self, tensor: Tensor) -> Tensor:
        """The one of this content; a copy if there was none yet."""
        found = tensor.detach().cpu().contiguous()
        name = content_sha256(found)
        if name not in self.by_hash:
            self.by_hash[name] = found.clone()
            self._hashes[id(self.by_hash[name])] = name
        return self.by_hash[name]

    def name(self, tensor: Tensor) -> str:
        return self._hashes[id(tensor)]


def content_sha256(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a contiguous tensor."""
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.as_strided(
        (tensor.numel(),), (1,)
    )  # an expanded scalar is contiguous, with a stride that views refuse
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, steps: Steps, tensors: Tensors, seconds: float, unreached: tuple[str, ...]) -> None:
    def named(rows: Rows) -> Any:
        return tensors.name(rows) if isinstance(rows, Tensor) else [tensors.name(each) for each in rows]

    index = [
        [
            {
                "tree": call.shape.tree,
                "rows": {path: named(rows) for path, rows in call.items()},
                "shared": {path: named(tensor) for path, tensor in call.shape.shared.items()},
            }
            for call in calls
            if call.shape is not None
        ]
        for calls in steps
    ]
    metadata = {SECONDS: f"{seconds:.6f}", CALLS: json.dumps(index), UNREACHED: json.dumps(unreached)}
    with atomic_path(path) as part:
        save_file(tensors.by_hash, part, metadata=metadata)


def read(path: Path) -> tuple[Steps, tuple[str, ...]]:
    """The calls of every step, and the layers that none of them reached."""
    with safe_open(path, framework="pt") as file:
        index, unreached = (json.loads(file.metadata()[each]) for each in (CALLS, UNREACHED))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)

    def of(named: Any) -> Rows:
        return tensors[named] if isinstance(named, str) else [tensors[each] for each in named]

    steps = tuple(
        tuple(
            Call(
                {path: of(named) for path, named in call["rows"].items()},
                Shape(call["tree"], {path: tensors[named] for path, named in call["shared"].items()}),
            )
            for call in calls
        )
        for calls in index
    )
    return steps, tuple(unreached)


def saved_seconds(path: Path) -> float:
    """What it took to make a cached file, so that a run that finds it does not look cheaper than it is."""
    with safe_open(path, framework="pt") as file:
        return float((file.metadata() or {}).get(SECONDS, 0.0))
