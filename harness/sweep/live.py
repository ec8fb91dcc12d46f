"""What a user sees of runs under way: one live line in a terminal; piped, a line per stage and per minute."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ditbench.harness.common.pace import Pace, duration
from ditbench.harness.common.watch import Watcher, say

TICK_S = 0.5
SAID_AFTER_S = 2.0  # a stage that ends sooner makes no line
AGAIN_S = 60.0


class Live(Watcher):
    """`with Live(of=n) as live, watching(live)`: counts runs as they begin. of: how many there will be; None: nobody knows.

    number: of the job, where other processes do the others; then there is no live line, which they would write into.
    """

    shows_progress = True

    def __init__(self, of: int | None = 1, number: int | None = None) -> None:
        self.of, self.number = of, number
        self.columns = _columns() if number is None else 0
        self.begun, self.took, self._stop = 0, [], threading.Event()
        self._lock = threading.Lock()
        self._title, self._run_started, self._ended = "", time.monotonic(), True
        self._new_stage("")
        self._bar: tqdm | None = None
        self._ticking: threading.Thread | None = None

    def __enter__(self) -> Live:
        if self.columns:
            self._bar = tqdm(total=0, bar_format="{desc}", leave=False, file=sys.stderr)
        self._ticking = threading.Thread(target=self._tick, daemon=True)
        self._ticking.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        if self._ticking is not None:
            self._ticking.join()
        if self._bar is not None:
            self._bar.close()

    def begins(self, run_id: str, title: str, folder: Path) -> None:
        with self._lock:
            self.begun += 1
            self._title, self._run_started, self._ended = title, time.monotonic(), False
            self._new_stage("")
        say(f"{self._head()}{title}: run {run_id}")

    def stage(self, name: str) -> None:
        with self._lock:
            self._new_stage(name)

    def advance(self, what: str, done: float, total: float | None, unit: str) -> None:
        now = time.monotonic()
        with self._lock:
            if what != self._what:
                self._what, self._pace = what, Pace(now, now, done, done, total, unit)
            self._pace.done, self._pace.total, self._pace.now = done, total, now

    def ends(self, status: str, error: str | None) -> None:
        with self._lock:
            took = time.monotonic() - self._run_started
            self.took.append(took)
            self._ended = True
        say(
            f"{self._head()}{self._title}: {status} in {duration(took)}{self._left(0, self.of and self.of - self.begun)}"
        )

    def _new_stage(self, name: str) -> None:
        self._stage, self._what, self._said = name, "", 0.0
        self._stage_started = now = time.monotonic()
        self._pace = Pace(now, now, 0, 0, None, "")

    def _head(self) -> str:
        if self.number is not None:
            return f"[job {self.number}] "
        if self.of == 1:
            return ""
        return f"[{self.begun}/{self.of}] " if self.of else f"[{self.begun}] "

    def _left(self, spent_s: float, runs: int | None) -> str:
        """Of the sweep, by the mean of the runs that this process has done; spent_s: on the run under way, which counts among them."""
        if not self.took or not runs or self.number is not None:
            return ""
        mean = sum(self.took) / len(self.took)
        left = mean * runs - min(spent_s, mean)
        return f"; {runs} to go" + (
            f", about {duration(left)}" if left >= 1 else ""
        )  # the last may take longer than the others

    def _tick(self) -> None:
        while not self._stop.wait(TICK_S):
            with self._lock:
                line, due = self._line(), self._due()
            if self._bar is not None:
                self._bar.set_description_str(line[: (_columns() or self.columns) - 1])
            elif due:
                say(line)

    def _due(self) -> bool:
        """Whether a plain line is due."""
        now = time.monotonic()
        if self._ended or not self._stage or now - self._stage_started < SAID_AFTER_S:
            return False
        if self._said and now - self._said < AGAIN_S:
            return False
        self._said = now
        return True

    def _line(self) -> str:
        if self._ended or not self._stage:
            return ""
        now = time.monotonic()
        stage = self._stage.replace("_", " ")
        how = f" {self._pace}" if self._what else f" {duration(now - self._stage_started)}"
        left = self._left(now - self._run_started, self.of and self.of - self.begun + 1)
        return f"{self._head()}{self._title}: {stage}{how}{left}"


def _columns() -> int:
    """Of the terminal that stderr is; 0 where it is none, or one of no size, in which nothing can be drawn."""
    if not sys.stderr.isatty():
        return 0
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80
