"""Files that are either wholly there or not there at all, and hashes of what is in them."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import pickle
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.watch import say

T = TypeVar("T")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNREADABLE = (ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error, SafetensorError)
# What libraries raise of a network's or a tokenizer's folder that is damaged, or another's.
NOT_WHOLE = (*UNREADABLE, OSError, RuntimeError, AttributeError, LookupError, pickle.UnpicklingError)
STALE_S = 24 * 3600.0
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary neighbour of path that takes its name only when the block ends without an error.

    What a kill left of an earlier one goes when the same file is written again, once nobody has touched it for a day. A link stays one:
    what it leads to is written.

    Raises:
        UserError: what has the name is neither a file nor a folder (a device, a pipe), which taking the name would destroy.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: expected a file or a name that is free, came a device or a pipe; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_S:
                _remove(left)
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        _remove(part)


def file_name(text: str) -> str:
    """The text as the name of one file or folder: what could lead elsewhere or hide there becomes _, and 100 characters do."""
    name = re.sub(r"[^\w.+=-]", "_", text).lstrip(".")[:100]
    return name or "_"


def read_json(path: Path) -> Any:
    """Raises ValueError where it is no JSON, also for one that is nested without end."""
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} is nested without end") from error


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def cached(path: Path, read: Callable[[Path], T]) -> T | None:
    """What a cache file holds; None if it has to be made: it is not there, or what is there cannot be read (that is said)."""
    if not path.exists():
        return None
    try:
        return read(path)
    except UNREADABLE as error:
        say(f"{path}: damaged ({type(error).__name__}); made again")
        return None


def canonical_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Per tensor the CRC-32 of its bytes: notices a change, of order too, in far less time than a hash takes."""

    def crc(tensor: Tensor) -> int:
        return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib lets other threads run meanwhile
        return dict(zip(tensors, pool.map(crc, tensors.values()), strict=True))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turns a full disk or a folder that may not be written into a UserError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _errno(error) in NO_ROOM:
            raise UserError(
                f"{folder}: no room to write ({why(error)}); free some, or set results_dir=… and cache_dir=… to "
                "another disk. Records already written are kept."
            ) from error
        if not_writable(error):
            raise UserError(f"{folder}: cannot be written ({why(error)}); set results_dir=…") from error
        raise


def is_disk_error(error: BaseException) -> bool:
    """Whether nothing can be written any more (as against a file that somebody's code misses)."""
    return _errno(error) in (*NO_ROOM, *NOT_WRITABLE)


def not_writable(error: BaseException) -> bool:
    """Whether somebody may not write there, or nobody may."""
    return _errno(error) in NOT_WRITABLE


def why(error: BaseException) -> str:
    """What the system says of a disk error."""
    return str(getattr(error, "strerror", None) or error)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _errno(error: BaseException) -> int | None:
    """Of an OSError, or of one that safetensors reports in words: "… I/O error: No space left on device (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(said[1]) if said else None
