"""What the cache holds, who uses it, whether it is whole, and what may go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from ditbench.harness.common.artifacts import LOCKS, MANIFEST, Damaged, check, lock_of, read_manifest
from ditbench.harness.common.errors import UserError
from ditbench.harness.records.attempts import read_all
from ditbench.harness.samples.store import INDEX, KIND, found_store

DAY_S = 86400.0


@dataclass(frozen=True)
class Cached:
    """An artifact, or a store of samples that may not be whole yet. made_from: keys of what it is derived from."""

    folder: Path
    title: str
    bytes: int
    changed: float  # seconds since the epoch
    made_from: tuple[str, ...]
    damage: str | None = None

    @property
    def kind(self) -> str:
        return self.folder.parent.name

    @property
    def key(self) -> str:
        return self.folder.name


def artifacts(cache: Path) -> list[Cached]:
    """All of them by kind; what is damaged at first sight is there with its reason.

    Raises:
        UserError: there is no such cache.
    """
    if not cache.is_dir():
        raise UserError(f"{cache}: no such cache; it is <results_dir>/cache unless cache_dir says otherwise")
    folders = (folder for folder in cache.glob("*/*") if folder.is_dir() and folder.parent.name != LOCKS)
    return [_seen(folder) for folder in sorted(folders) if not folder.name.startswith(".")]


def damaged(cached: Cached) -> list[str]:
    """What is not as it was written, one sentence each; every file is read."""
    try:
        if cached.kind != KIND:
            files = read_manifest(cached.folder / MANIFEST)["files"].items()
            return [problem for name, entry in files if (problem := _problem(cached.folder / name, entry))]
        store = found_store(cached.folder)
        found = [_problem(cached.folder / store.lines_file, store.index["lines"])]
        for piece in store.pieces:
            try:
                found += [_problem(cached.folder / name, entry) for name, entry in store.note(piece)["files"].items()]
            except FileNotFoundError:
                continue  # not drawn yet
            except Damaged as damage:
                found.append(str(damage))
        return [problem for problem in found if problem]
    except FileNotFoundError as error:
        return [f"{error.filename}: is missing"]
    except Damaged as damage:
        return [str(damage)]


def unused(found: Iterable[Cached], results_dir: Path, days: float) -> list[Cached]:
    """Those that no finished run was made from, directly or not, and that nothing was written to for so many days."""
    by_key = {each.key: each for each in found}
    used = {key for record in read_all(results_dir) if record.status == "ok" for key in _keys(record.made_from)}
    kept = used | {each.key for each in by_key.values() if each.made_from and set(each.made_from) <= used}
    old = time.time() - days * DAY_S
    return [each for each in by_key.values() if each.key not in kept and each.changed <= old]


def leftovers(cache: Path) -> list[Path]:
    """Scratch files and folders of processes that were killed, and locks that nobody holds."""
    parts = [path for path in cache.rglob(".*.part*") if not any(p.name.endswith(".part") for p in path.parents)]
    return [*parts, *(path for path in (cache / LOCKS).glob("*.lock") if _free(cache, path))]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _seen(folder: Path) -> Cached:
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    size, changed = sum(each.st_size for each in files), max((each.st_mtime for each in files), default=0.0)
    try:
        manifest = read_manifest(folder / (INDEX if folder.parent.name == KIND else MANIFEST))
        return Cached(folder, manifest["title"], size, changed, tuple(_keys(manifest["made_from"])))
    except FileNotFoundError:
        return Cached(folder, "of an older ditbench", size, changed, ())
    except (Damaged, KeyError) as error:
        return Cached(folder, "damaged", size, changed, (), str(error))


def _problem(path: Path, entry: dict[str, Any]) -> str:
    try:
        check(path, entry)
        return ""
    except Damaged as damage:
        return str(damage)


def _keys(made_from: dict[str, Any]) -> list[str]:
    return [key for value in made_from.values() for key in ([value] if isinstance(value, str) else value)]


def _free(cache: Path, path: Path) -> bool:
    lock = lock_of(cache, path.stem)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True
