"""Tensors in safetensors files, written as they come and read by rows: what there are many of is never held at once.

What is read is copied, and the file let go of at once: pages of a file that stays mapped would count as the process's memory.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.scratch import Scratch
from ditbench.harness.common.tensor_files import save_tensors
from ditbench.harness.models.calls import Rows, StoredRows, form_of, joined_rows, picked_rows

FILE_BYTES = 2**26  # of a file; as much is held while tensors are written


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Of shape (B, …), read by rows along dimension 0 (`StoredRows`), onto `device`.

    owner: what keeps the file there, if anything has to. seen: the file's state when it was last compared with its hash; one
    that was written to since is not read.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    owner: object = None
    seen: tuple[int, int] | None = None

    @property
    def form(self) -> Any:
        return (self.shape[1:], self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, kept: Tensor | slice) -> Tensor:
        if isinstance(kept, slice):
            kept = torch.arange(len(self))[kept]
        if not len(kept):
            return torch.zeros((0, *self.shape[1:]), dtype=self.dtype, device=self.device)
        self._check()
        kept = kept.cpu()
        first, last = int(kept.min()), int(kept.max())
        with safe_open(self.path, framework="pt") as file:
            rows = file.get_slice(self.name)[first : last + 1]  # mapped: what is not picked is not read
            if len(kept) == len(rows) and bool((kept.diff() == 1).all()):
                return self._as_kept(rows.clone())
            return self._as_kept(rows[kept - first])

    def whole(self) -> Tensor:
        """All of it, also of a tensor without dimensions."""
        self._check()
        with safe_open(self.path, framework="pt") as file:
            return self._as_kept(file.get_tensor(self.name).clone())

    def _check(self) -> None:
        """Raise Damaged if the file is another than it was."""
        if self.seen is not None and self.seen != state_of(self.path):
            raise Damaged(f"{self.path}: changed while it was in use")

    def _as_kept(self, written: Tensor) -> Tensor:
        return (torch.view_as_complex(written) if self.dtype.is_complex else written).to(self.device)


@dataclass(frozen=True, eq=False)
class StoredList:
    """Rows that are one tensor each, with its own shape (`StoredRows`)."""

    tensors: Sequence[StoredTensor]

    @property
    def form(self) -> Any:
        return list

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, kept: Tensor | slice) -> list[Tensor]:
        wanted = range(len(self))[kept] if isinstance(kept, slice) else kept.tolist()
        return [self.tensors[index].whole() for index in wanted]


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Some rows of arguments that are alike, in an order (`StoredRows`): row n is row row_N[n] of parts[part_N[n]]."""

    parts: Sequence[Rows | StoredRows]
    part_N: Tensor
    row_N: Tensor

    @property
    def form(self) -> Any:
        return form_of(self.parts[0])

    def __len__(self) -> int:
        return len(self.part_N)

    def __getitem__(self, kept: Tensor | slice) -> Rows:
        part_N, row_N = self.part_N[kept], self.row_N[kept]
        places = [(part_N == index).nonzero().flatten() for index in range(len(self.parts))]
        found = [picked_rows(rows, row_N[place]) for rows, place in zip(self.parts, places, strict=True)]
        return picked_rows(joined_rows(found), torch.cat(places).argsort())


class TensorFiles:
    """Writes tensors into `0.safetensors`, `1.safetensors`, … of a folder, by the hash of their content: equal ones once.

    places: of each, by its hash: the file's number, its shape and dtype.
    """

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self.folder, self.file_bytes = folder, file_bytes
        self.places: dict[str, tuple[int, list[int], str]] = {}
        self._waiting: dict[str, Tensor] = {}
        self._files = 0

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._waiting.values())

    def keep(self, tensor: Tensor) -> str:
        """Its hash; a copy is written unless there is one of this content."""
        found = tensor.detach().cpu().contiguous()
        name = content_sha256(found)
        if name not in self.places:
            self.places[name] = (self._files, list(found.shape), str(found.dtype).removeprefix("torch."))
            self._waiting[name] = found.clone()
            if self.held_bytes >= self.file_bytes:
                self.flush()
        return name

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            save_tensors(
                {name: as_written(tensor) for name, tensor in self._waiting.items()},
                self.folder / f"{self._files}.safetensors",
            )
            self._waiting, self._files = {}, self._files + 1


class Spool:
    """Puts tensors on disk for a while, in the cache or, without one, in the system's temporary folder.

    Each has a file that goes when nothing refers to the tensor any more; the folder goes with the last of them, and at the
    latest when the process ends (see `Scratch`).
    """

    def __init__(self, cache: Path | None) -> None:
        self.scratch, self._count = Scratch(cache), 0

    def keep(self, tensor: Tensor) -> StoredTensor:
        path = self.scratch.folder / f"{self._count}.safetensors"
        self._count += 1
        save_tensors({"tensor": as_written(tensor.detach().cpu().contiguous())}, path)
        kept = StoredTensor(path, "tensor", tuple(tensor.shape), tensor.dtype, tensor.device, owner=self.scratch)
        weakref.finalize(kept, path.unlink, missing_ok=True).atexit = False
        return kept


def as_written(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs: safetensors does not know complex128, in which some models have their rotary tables."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def state_of(path: Path) -> tuple[int, int]:
    """Its size and the time of its last change, in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def stored(folder: Path, name: str, place: Sequence[Any], owner: object = None) -> StoredTensor:
    """A tensor that `TensorFiles` wrote. place: its entry of `places`."""
    number, shape, dtype = place
    path = folder / f"{number}.safetensors"
    return StoredTensor(path, name, tuple(shape), getattr(torch, dtype), owner=owner, seen=state_of(path))


def content_sha256(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a contiguous tensor."""
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.as_strided(
        (tensor.numel(),), (1,)
    )  # an expanded scalar is contiguous, with a stride that views refuse
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
