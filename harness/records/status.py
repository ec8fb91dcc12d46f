"""What a run that is under way says of itself, in its scratch folder, for `ditbench status` on any machine that sees it.

    <experiment>/.<run_id>.<random>.part/status.json

The file is rewritten once a second at most, and goes before the folder takes its name. It counts only while a process holds the
folder's lock: what a killed process said of itself says nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ditbench.harness.common.files import UNREADABLE, read_json, write_json
from ditbench.harness.common.pace import Pace
from ditbench.harness.common.watch import Watcher, watching
from ditbench.harness.records import attempts

FILE = "status.json"
EVERY_S = 1.0
FAR = 1e12  # seconds or counts; no run is at more
LONGEST = 1000  # characters


@dataclass(frozen=True)
class Status:
    """Times are seconds since 1970, by the clock of the run's host.

    what, done, total, unit: of the longest part of the stage, as a watcher is told; what is empty where nothing is counted.
    first, since: what was done of it when it began, and when that was.
    """

    run_id: str
    title: str
    device: str
    host: str
    pid: int
    started: float
    updated: float
    stage: str = ""
    stage_started: float = 0.0
    what: str = ""
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    first: float = 0.0
    since: float = 0.0

    @property
    def pace(self) -> Pace | None:
        if not self.what:
            return None
        return Pace(self.since, self.updated, self.first, self.done, self.total, self.unit)


class StatusFile(Watcher):
    """Writes what it hears."""

    def __init__(self, folder: Path, run_id: str, title: str, device: str) -> None:
        now = time.time()
        self.path, self._written = folder / FILE, 0.0
        self.status = Status(run_id, title, device, socket.gethostname(), os.getpid(), now, now)
        self._write()

    def stage(self, name: str) -> None:
        self._set(stage=name, stage_started=time.time(), what="")
        self._write()

    def advance(self, what: str, done: float, total: float | None, unit: str) -> None:
        if what != self.status.what:
            self._set(what=what, first=done, since=time.time())
        self._set(done=done, total=total, unit=unit)
        if time.time() - self._written > EVERY_S:
            self._write()

    def _set(self, **values: object) -> None:
        self.status = replace(self.status, updated=time.time(), **values)  # type: ignore[arg-type]

    def _write(self) -> None:
        self._written = time.time()
        write_json(self.path, asdict(self.status))


@contextmanager
def reported(folder: Path, run_id: str, title: str, device: str) -> Iterator[None]:
    """The run in this scratch folder says how far it is, for as long as the block lasts."""
    try:
        status = StatusFile(folder, run_id, title, device)
        with watching(status):
            yield
    finally:
        (folder / FILE).unlink(missing_ok=True)


def under_way(home: Path) -> list[Status]:
    """Of every run of an experiment that a process holds. One that has not said anything yet is known by its folder."""
    found = []
    for folder in attempts.under_way(home):
        try:
            found.append(_checked(read_json(folder / FILE), _run_id(folder)))
        except (OSError, *UNREADABLE):
            try:
                since = folder.stat().st_mtime
            except OSError:  # done by now
                continue
            found.append(Status(_run_id(folder), "", "", "", 0, since, since))
    return found


def _run_id(scratch: Path) -> str:
    return scratch.name[1:13]


def _checked(raw: dict[str, Any], run_id: str) -> Status:
    """Raises TypeError or ValueError where a file says what no run would say of itself, or what a terminal would obey."""
    status = Status(**raw)
    if status.run_id != run_id:
        raise ValueError(f"run_id: {status.run_id!r} in the folder of {run_id}")
    for field in fields(Status):
        value = getattr(status, field.name)
        if field.type == "str":
            good = isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
        elif value is None:
            good = field.name == "total"
        else:
            good = isinstance(value, int | float) and abs(value) < FAR  # not so where it is NaN
        if not good:
            raise ValueError(f"{field.name}: {value!r}")
    return status
