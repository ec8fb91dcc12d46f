"""Folders for what a process needs on disk for a while: removed when it is done, or by the next process if it was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from filelock import FileLock, Timeout

from ditbench.harness.common.artifacts import lock_of

SCRATCH = "scratch"


class Scratch:
    """A folder in the cache (`<cache>/scratch/<name>`), or without one in the system's temporary folder.

    It goes when nothing refers to this object any more, at the latest when the process ends. In a cache it is held by a lock,
    which a killed process loses: whoever next needs a folder there removes what is left.
    """

    def __init__(self, cache: Path | None) -> None:
        lock = None
        if cache is None:
            self.folder = Path(tempfile.mkdtemp(prefix="ditbench-"))
        else:
            clear_leftovers(cache)
            name = os.urandom(8).hex()
            lock = _lock(cache, name)
            lock.acquire()
            self.folder = cache / SCRATCH / name
            self.folder.mkdir(parents=True)
        self._removal = weakref.finalize(self, _remove, self.folder, lock, os.getpid())

    def remove(self) -> None:
        self._removal()


def clear_leftovers(cache: Path) -> None:
    """Remove the folders whose processes have ended."""
    for folder in (cache / SCRATCH).glob("*"):
        lock = _lock(cache, folder.name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _remove(folder, lock, os.getpid())


def _lock(cache: Path, name: str) -> FileLock:
    return lock_of(cache, f"{SCRATCH}-{name}")


def _remove(folder: Path, lock: FileLock | None, process: int) -> None:
    if os.getpid() != process:  # a fork of it
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
