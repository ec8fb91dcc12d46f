"""Rows in batches that fit into memory: a batch that does not is halved, and stays halved.

batch = Batch(64)
for rows, drawn in in_batches(range(1000), batch, draw):     # draw(rows) → what is made of these rows
    ...
batch.note()                                                 # {"size": 16, "asked": 64, "halved_from": [64, 32]}
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ditbench.harness.common import errors
from ditbench.harness.common.devices import CPU, functions_of
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.memory import trim

T = TypeVar("T")
Rows = TypeVar("Rows", bound=Sequence)


class OutOfMemory(UserError):
    """Not even one row fits."""


@dataclass
class Batch:
    """How many rows are computed with at once. It is one object for all who share the memory, so that each knows what did not fit.

    asked: what the configuration says, a number or "auto". halved_from: sizes that were too large, in their order.
    """

    size: int
    asked: int | str = ""
    halved_from: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a batch has at least 1 row, got {self.size}")
        self.asked = self.asked or self.size

    def halve(self) -> None:
        self.halved_from.append(self.size)
        self.size = self.size // 2

    def note(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"size": self.size, "asked": self.asked, "halved_from": list(self.halved_from)}


def in_batches(
    rows: Rows, batch: Batch, do: Callable[[Rows], T], *, what: str = "", device: torch.device = CPU
) -> Iterator[tuple[Rows, T]]:
    """(rows of a batch, do(these rows)) in their order, at most batch.size of them at a time.

    rows: a range, list or tensor, that is sliced. do: is called again, with half of the rows, when it ran out of memory; what it
    changes elsewhere before that has to bear it. what: is done, for messages.

    Raises:
        OutOfMemory: one row alone does not fit.
    """
    start = 0
    while start < len(rows):
        part = rows[start : start + batch.size]
        found, fits = _tried(do, part)  # type: ignore[arg-type]
        if fits:
            yield part, found  # type: ignore[misc]
            start += len(part)
            continue
        release(device)
        if len(part) == 1:
            raise OutOfMemory(
                f"{what or 'a batch'}: out of memory on {device} with one sample at a time; "
                "set memory=offload, or take a smaller model.size"
            )
        while batch.size >= len(part):  # the last of all may be smaller than a batch
            batch.halve()


def _tried(do: Callable[[Rows], T], part: Rows) -> tuple[T | None, bool]:
    """The error is dropped with its frames: they hold the tensors that were too many."""
    try:
        return do(part), True
    except Exception as error:
        if not out_of_memory(error):
            raise
        return None, False


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, in whoever's words, ours too."""
    return isinstance(error, OutOfMemory) or errors.out_of_memory(error)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more: of Python, of torch's allocator, of the system's. To look through all of Python's
    objects takes a quarter of a second.
    """
    gc.collect()
    give_back(device)


def give_back(device: torch.device) -> None:
    """What torch's allocator and the system's keep although it is free."""
    functions = functions_of(device)
    if functions is not None and hasattr(functions, "empty_cache"):
        functions.empty_cache()
    trim()
