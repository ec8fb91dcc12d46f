"""SHA-256 of files, remembered for large ones: a checkpoint of 24 GB is read once, not before every run and plan.

What is remembered lies in the user's cache ($XDG_CACHE_HOME/ditbench/hashes, ~/.cache by default), one small file for each, and
holds as long as size, mtime and ctime do. A file whose bits flip without that is not noticed here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ditbench.harness.common.artifacts import Damaged, read_manifest, write_manifest
from ditbench.harness.common.files import file_sha256

LARGE = 16 * 2**20  # bytes; smaller files are read anew
SETTLED_NS = 2 * 10**9  # a file that was written just now may change again within its clock's tick
THREADS = 4


def files_sha256(paths: Iterable[Path]) -> dict[Path, str]:
    """{path: SHA-256 of its bytes}, in the given order; several at a time.

    Raises:
        OSError: one cannot be read.
    """
    wanted = list(paths)
    with ThreadPoolExecutor(THREADS) as pool:  # hashlib lets other threads run meanwhile
        return dict(zip(wanted, pool.map(_sha256, wanted), strict=True))


def _sha256(path: Path) -> str:
    path = path.resolve()  # the hub's cache links to its blobs
    before = _state(path)
    if before["size"] < LARGE:
        return file_sha256(path)
    note = _home() / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    known = _known(note)
    if known is not None and {name: known.get(name) for name in before} == before:
        return known["file_sha256"]
    found = file_sha256(path)
    if _state(path) == before and time.time_ns() - before["mtime_ns"] > SETTLED_NS:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(note, before | {"file_sha256": found})
        except OSError:
            pass  # it is read again next time
    return found


def _state(path: Path) -> dict[str, str | int]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def _known(note: Path) -> dict | None:
    try:
        return read_manifest(note)
    except (OSError, Damaged):
        return None


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ditbench" / "hashes"
