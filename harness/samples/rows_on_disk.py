"""Rows that lie on disk and are read when they are asked for, as a tensor's are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ditbench.harness.common.memory import trim


class RowsOnDisk:
    """Rows (`samples.Rows`) that `read` reads by their numbers: by index, slice, list or mask, one by one, or with `split`.

    Whatever asks for all of them at once gets them, and has to hold them. at_once: how many are read for whoever goes through
    them one by one.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[Sequence[int]], Tensor], at_once: int = 1
    ) -> None:
        self.shape, self.dtype, self._read, self._at_once = torch.Size(shape), dtype, read, at_once

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.split(self._at_once):
            yield from part

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches of `size` rows, the last perhaps smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
            trim()  # what the last batch took, and whatever was made of it

    def __getitem__(self, wanted: int | slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(wanted, int):
            return self[[wanted]][0]
        index = wanted if isinstance(wanted, slice | Tensor) else torch.tensor(wanted, dtype=torch.int64)
        chosen = torch.arange(len(self))[index].tolist()
        return self._read(chosen) if chosen else torch.zeros((0, *self.shape[1:]), dtype=self.dtype)
