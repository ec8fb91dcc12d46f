"""What goes on in a run, told to whoever watches: a live line, a status file, a tracker.

A run says that it begins, which stage it is in, how far that is, when its first pictures are there, and how it ended. It does not
know who hears it, and nothing that a watcher does changes it: what one raises is said once, and that one hears no more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Watcher:
    """Hears everything and does nothing: override what you want to know. Calls may be frequent; be quick, or be rare."""

    shows_progress = False  # whether it shows `advance` in the terminal, so that no other bar should

    def begins(self, run_id: str, title: str, folder: Path) -> None:
        """A run starts in this scratch folder; it is renamed when the run is recorded."""

    def stage(self, name: str) -> None:
        """The run is in this stage now: reference, calibrate, quantize, generate, evaluate, …, as in its `timings_s`."""

    def advance(self, what: str, done: float, total: float | None, unit: str) -> None:
        """`done` of `total` units of the longest part that is under way ("img·step": samples × denoising steps).

        total: None where nobody knows. done may start above 0 (what an earlier process did) and jump (what others do).
        """

    def pictures(self, read: Callable[[], Any]) -> None:
        """The first samples of this stage are there. read: gives one piece of them as `samples.Samples`, from disk.

        In the stage `reference` they are the float model's, in `generate` the quantized model's, of the same noise and prompts.
        """

    def ends(self, status: str, error: str | None) -> None:
        """The run is recorded: "ok" or "failed", with the reason. Not told when a run is interrupted."""


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("who watches", default=())
_deaf: set[int] = set()  # ids of those who raised
_open: list[str] = []  # parts under way, the outermost first


@contextmanager
def watching(*watchers: Watcher) -> Iterator[None]:
    """These hear of every run inside the block, too."""
    token = _watchers.set((*_watchers.get(), *watchers))
    try:
        yield
    finally:
        _watchers.reset(token)
        _deaf.difference_update(id(each) for each in watchers)


def progress_is_shown() -> bool:
    return any(each.shows_progress for each in _watchers.get())


def begins(run_id: str, title: str, folder: Path) -> None:
    _open.clear()
    _tell(lambda each: each.begins(run_id, title, folder))


def stage(name: str) -> None:
    _open.clear()
    _tell(lambda each: each.stage(name))


def advance(what: str, done: float, total: float | None, unit: str) -> None:
    """Told of the outermost part only: who watches sees one count that grows. It ends with `ended`."""
    if what not in _open:
        _open.append(what)
    if _open[0] == what:
        _tell(lambda each: each.advance(what, done, total, unit))


def ended(what: str) -> None:
    if what in _open:
        del _open[_open.index(what) :]


def pictures(read: Callable[[], Any]) -> None:
    _tell(lambda each: each.pictures(read))


def ends(status: str, error: str | None) -> None:
    _tell(lambda each: each.ends(status, error))


def say(line: str) -> None:
    """One line to standard error, above a bar that is there; a standard error that cannot be written costs nothing but the line."""
    with suppress(OSError, ValueError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def _tell(event: Callable[[Watcher], None]) -> None:
    for each in _watchers.get():
        if id(each) in _deaf:
            continue
        try:
            event(each)
        except Exception as error:
            _deaf.add(id(each))
            say(f"{type(each).__name__} hears no more of this: {type(error).__name__}: {error}")
