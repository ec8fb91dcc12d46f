"""Artifacts: folders that are made once, by whoever needs them first, and checked whenever they are read.

    <cache>/<kind>/<key>/manifest.json   what it is, what it was made from, the seconds it took, size and SHA-256 of each file
    <cache>/<kind>/<key>/…               the files

A key is a hash of everything that makes an artifact, and of nothing else. A folder appears whole, by a rename; processes that
need the same one, on this machine or on another that sees the folder, wait for the first and read what it made. What is
damaged is named and made again; what an interrupt left is removed by the next who makes the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import (
    UNREADABLE,
    canonical_sha256,
    file_sha256,
    is_disk_error,
    not_writable,
    read_json,
    why,
)
from ditbench.harness.common.watch import say

T = TypeVar("T")
FORMAT = 1
MANIFEST = "manifest.json"
LOCKS = "locks"

_checked: dict[Path, tuple[int, ...]] = {}  # files that this process has hashed, as they were then


class Damaged(Exception):
    """A file that is not what was written; the message names it."""


@dataclass(frozen=True)
class Address:
    """Where an artifact lies. key: hash of all that makes it. made_from: {kind: key} of the artifacts it is derived from."""

    cache: Path
    kind: str
    key: str
    title: str
    made_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.cache / self.kind / self.key


@dataclass(frozen=True)
class Kept(Generic[T]):
    """saved_s: what it took to make an artifact that was found; 0 for one that was made just now."""

    value: T
    saved_s: float = 0.0


def obtain(
    address: Address | None,
    make: Callable[[], T],
    write: Callable[[T, Path], None],
    read: Callable[[Path], T],
    keep: Callable[[T], bool] = lambda value: True,
) -> Kept[T]:
    """The artifact, read if it is there and whole, else made, written and returned. Without an address nothing is kept.

    write: the value, a new folder → its files. read: the folder → the value. keep: whether a value is worth keeping. Where there is no room to keep what was made, that
    is said and the value is returned.

    Raises:
        UserError: it is not there and the cache cannot be written; known before anything is made.
    """
    if address is None:
        return Kept(make())
    if (found := _found(address, read)) is not None:
        return found
    with claimed(address):
        if (found := _found(address, read)) is not None:  # made by whoever held the claim before
            return found
        _clear_leftovers(address)
        start = perf_counter()
        value = make()
        if not keep(value):
            return Kept(value)
        try:
            publish(address, lambda part: write(value, part), perf_counter() - start)
        except Exception as error:
            if not is_disk_error(error):
                raise
            say(f"{address.folder}: {address.title} is not kept ({why(error)})")
        return Kept(value)


def filled(address: Address, fill: Callable[[Path], None], read: Callable[[Path], T]) -> Kept[T]:
    """The same of what is too large to be held: it is written while it is made.

    fill: a new folder → its files; if it raises, nothing is kept. read: the folder → the value, which may go on reading there.

    Raises:
        UserError: it is not there and the cache cannot be written; known before anything is made.
    """
    if (found := _found(address, read)) is not None:
        return found
    with claimed(address):
        if (found := _found(address, read)) is not None:
            return found
        _clear_leftovers(address)
        publish(address, fill)
        return Kept(read(address.folder))


@contextmanager
def claimed(address: Address) -> Iterator[None]:
    """Wait until nobody else makes this artifact, and keep others from it."""
    lock = lock_of(address.cache, f"{address.kind}-{address.key}")
    try:
        try:
            lock.acquire(timeout=1.0)
        except Timeout:
            say(f"{address.title}: another process makes it; waiting")
            lock.acquire()
    except OSError as error:
        if not_writable(error):
            raise UserError(
                f"cache {address.cache}: cannot be written ({why(error)}), and {address.title} is not in it; set cache_dir=…"
            ) from error
        raise
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it looks for the artifact first, then makes it
        lock.release()


def lock_of(cache: Path, name: str) -> FileLock:
    """A lock of that name that all who see the cache share; it ends with the process that holds it."""
    folder = cache / LOCKS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not_writable(error):
            raise UserError(f"cache {cache}: cannot be written ({why(error)}); set cache_dir=…") from error
        raise
    return FileLock(folder / f"{name}.lock")


def publish(address: Address, write: Callable[[Path], None], seconds: float | None = None) -> None:
    """Write the files into a scratch folder beside, then let it take the artifact's name; an older one gives way.

    seconds: what it took to make; None if it is made as it is written.
    """
    folder = address.folder
    part = folder.with_name(f".{address.key}.{os.urandom(4).hex()}.part")
    part.mkdir(parents=True)
    start = perf_counter()
    try:
        write(part)
        seconds = perf_counter() - start if seconds is None else seconds
        files = sorted(path for path in part.rglob("*") if path.is_file())
        for path in files:
            path.chmod(part.stat().st_mode & 0o666)  # safetensors' own are for the user alone, whatever the umask
        write_manifest(
            part / MANIFEST,
            {
                "format": FORMAT,
                "kind": address.kind,
                "key": address.key,
                "title": address.title,
                "made_from": dict(address.made_from),
                "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": seconds,
                "files": {path.relative_to(part).as_posix(): entry_of(path) for path in files},
            },
        )
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file at once, by whoever holds its claim → what a manifest says of it.

    The file takes its name when it is whole, so that nobody sees half of one, and nothing that another user or a link left under that
    name is written into. What a kill leaves lies under one name, which goes when the file is written again.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the disk is full, and half a file takes room
            part.unlink(missing_ok=True)
        raise
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest_content(values: dict[str, Any]) -> bytes:
    """JSON with a hash of itself."""
    text = json.dumps(values | {"sha256": canonical_sha256(values)}, indent=1, allow_nan=False) + "\n"
    return text.encode()


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    """At once, whoever else writes the same."""
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        part.write_bytes(manifest_content(values))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises Damaged: it is not what was written. FileNotFoundError: it is not there."""
    try:
        values = read_json(path)
        if values.pop("sha256") != canonical_sha256(values):
            raise Damaged(f"{path}: does not have the SHA-256 that it was written with")
    except (*UNREADABLE, AttributeError) as error:
        raise Damaged(f"{path}: cannot be read ({type(error).__name__})") from error
    return values


def check(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise Damaged unless the file is what its manifest says. One that this process has hashed, and that did not change, is not
    hashed again.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing") from None
    if status.st_size != entry["bytes"]:
        raise Damaged(f"{path}: expected {entry['bytes']} bytes, came {status.st_size}")
    now = (status.st_ino, status.st_size, status.st_mtime_ns)
    if _checked.get(path) == now:
        return
    if file_sha256(path) != entry["sha256"]:
        raise Damaged(f"{path}: does not have the SHA-256 that it was written with")
    _checked[path] = now


def check_bytes(path: Path, entry: Mapping[str, Any]) -> bytes:
    """What the file holds; Damaged unless it is what its manifest says."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing") from None
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise Damaged(f"{path}: does not have the SHA-256 that it was written with")
    return content


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, all files of which are what it says.

    Raises:
        Damaged: one is not. FileNotFoundError: there is no artifact.
    """
    manifest = read_manifest(folder / MANIFEST)
    for name, entry in manifest["files"].items():
        check(folder / name, entry)
    return manifest


def _clear_leftovers(address: Address) -> None:
    """Of who was killed while it made this artifact; only who holds the claim writes."""
    for stale in address.folder.parent.glob(f".{address.key}.*.part"):
        shutil.rmtree(stale, ignore_errors=True)


def _found(address: Address, read: Callable[[Path], T]) -> Kept[T] | None:
    """None if it has to be made: it is not there, or damaged (that is said)."""
    if not address.folder.exists():
        return None
    try:
        manifest = checked_manifest(address.folder)
        return Kept(read(address.folder), manifest["seconds"])
    except FileNotFoundError:
        say(f"{address.folder}: without its manifest; {address.title} is made again")
    except Damaged as damage:
        say(f"{damage}; {address.title} is made again")
    except UNREADABLE as error:
        say(f"{address.folder}: cannot be read ({type(error).__name__}); {address.title} is made again")
    return None
