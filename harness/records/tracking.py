"""A run told to a tracker while it goes on, and to its end. The run never waits for it, but for a bounded time after it is recorded.

`Tracked` watches a run (`common/watch.py`) and notes what it hears; a thread of its own sends the newest of it every few seconds.
What a tracker raises is said in a line, and this process tells that tracker of no other run.

An attempt has one name (<run_id>, <run_id>.2, …: the next folder that is free), and with it one run in the tracker, however often it
is killed and started again. Of processes that do the same run one tells of it: who holds <experiment>/.<name>.tracker.lock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from filelock import FileLock, Timeout

from ditbench.harness.common.devices import memory_of
from ditbench.harness.common.errors import UserError, reason
from ditbench.harness.common.watch import Watcher, say
from ditbench.harness.records import told
from ditbench.harness.records.attempts import next_name
from ditbench.harness.records.record import Record
from ditbench.harness.records.trackers import tracker
from ditbench.harness.records.trackers.base import Picture, Tracker, Value

EVERY_S = 3.0  # between two messages of a run that goes on
LAST_S = 90.0  # that a recorded run waits for its tracker; W&B itself gives up after 20 s of init and 60 s of sending
INTERRUPTED_S = 15.0  # that an interrupted one waits
QUIET = "measure"  # a stage that is timed: it is announced, and then nothing is sent until it ends
LIVE = ("reference", "generate")  # stages whose first pictures are shown
SAMPLES = "img·step"  # the unit of progress that is samples × denoising steps

_gave_up: set[str] = set()  # kinds of trackers: what failed once would cost every run of a sweep the same wait


class Tracked(Watcher):
    """`with Tracked(settings, record, device) as tracked, watching(tracked): …; tracked.recorded = …`

    settings: the `tracker` section of the configuration. record: the run's, as far as it is known before it begins.

    Raises:
        UserError: when it is made: the tracker is not installed, or its settings cannot be used.
    """

    recorded: Record | None = None

    def __init__(self, settings: dict[str, Any], record: Record, device: torch.device) -> None:
        self.settings, self.record, self.device = settings, record, device
        self.module = None if settings["kind"] in _gave_up else tracker(settings)
        self.thread: threading.Thread | None = None
        self.claim: FileLock | None = None
        self.over = threading.Event()
        self.status: tuple[str, str | None] = ("interrupted", None)
        self.news: dict[str, Value] = {}
        self.reads: dict[str, Callable[[], Any]] = {}
        self.guard = threading.Lock()
        self.now, self.sent, self.stages, self.rate = "", "", 0, Rate()

    def __enter__(self) -> Tracked:
        return self

    def begins(self, run_id: str, title: str, folder: Path) -> None:
        """The tracker hears of the run from now on, unless another process tells of it."""
        if self.module is None:
            return
        self.title = title
        home = folder.parent
        card = told.card(self.record, next_name(home, run_id), home)
        self.claim = FileLock(claim_of(home, card.id))
        try:
            self.claim.acquire(timeout=0)
        except Timeout:
            self.claim = None
            return
        self.started_s = monotonic()
        begin = self.module.begin
        self.thread = threading.Thread(
            target=self._work, args=(lambda: begin(self.settings, card),), name="tracker", daemon=True
        )
        self.thread.start()

    def stage(self, name: str) -> None:
        with self.guard:
            self.now, self.stages, self.rate = name, self.stages + 1, Rate()
            self.news = {"live/stage": name, "live/stage_number": self.stages}

    def advance(self, what: str, done: float, total: float | None, unit: str) -> None:
        with self.guard:
            self.news = {
                name: value for name, value in self.news.items() if name in ("live/stage", "live/stage_number")
            }
            self.news |= {"live/done": done} | ({"live/total": total, "live/share": done / total} if total else {})
            rate = self.rate.at(done, monotonic())
            steps = (self.record.config.get("protocol") or {}).get("steps")
            if rate is not None and unit == SAMPLES and steps:
                self.news["live/samples_per_s"] = rate / steps

    def pictures(self, read: Callable[[], Any]) -> None:
        with self.guard:
            if self.now in LIVE:
                self.reads[self.now] = read

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self.thread is None:
            return
        if self.recorded is not None:
            self.status = (self.recorded.status, self.recorded.error)
        elif isinstance(error, Exception):
            self.status = ("interrupted", reason(error))
        self.over.set()
        wait_s = LAST_S if self.recorded is not None else INTERRUPTED_S
        try:
            self.thread.join(wait_s)
            if self.thread.is_alive():
                self._give_up(f"it took longer than {wait_s:g} s")
        finally:
            if self.claim is not None:
                Path(self.claim.lock_file).unlink(missing_ok=True)
                self.claim.release()

    def _work(self, begin: Callable[[], Tracker]) -> None:
        """In a thread of its own."""
        try:
            its_run = begin()
            try:
                self._send(its_run)
                while not self.over.wait(EVERY_S):
                    if self.now != QUIET or self.sent != QUIET:
                        self._send(its_run)
                if self.recorded is not None:
                    its_run.log(told.final(self.recorded))
            except BaseException:
                with contextlib.suppress(Exception):
                    its_run.finish(*self.status)
                raise
            its_run.finish(*self.status)
        except BaseException as error:  # whatever a tracker does: it is not the run's
            self._give_up(reason(error))

    def _send(self, its_run: Tracker) -> None:
        with self.guard:
            values, reads, self.sent = dict(self.news), self.reads, self.now
            self.reads = {}
        values |= {"live/elapsed_s": monotonic() - self.started_s}
        functions = memory_of(self.device)
        if functions is not None:
            values["live/device_memory_bytes"] = functions.memory_allocated(self.device)
        for stage, read in reads.items():
            with contextlib.suppress(*told.UNREADABLE):  # it is drawn again, or shown at the end
                name = "samples/first_float" if stage == "reference" else "samples/first"
                values[name] = Picture(told.first_grid(read()), f"the first samples of {stage}")
        its_run.log(values)

    def _give_up(self, why: str) -> None:
        kind = self.settings["kind"]
        if kind in _gave_up:
            return  # it was left behind, and broke later
        _gave_up.add(kind)
        say(
            f"{self.title}: not tracked by {kind}: {why}; the run goes on, and {kind} hears of no other of this process"
        )


class Rate:
    """Units per second since the first that was told: what an earlier process did counts for nothing."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None

    def at(self, done: float, now_s: float) -> float | None:
        if self.first is None or done < self.first[0]:
            self.first = (done, now_s)
        done_before, then_s = self.first
        return (done - done_before) / (now_s - then_s) if now_s > then_s and done > done_before else None


def keep(record: Record, folder: Path, name: str, kind: str) -> None:
    """Keep the files of a folder as an artifact of a recorded run, in the tracker that its configuration names.

    Raises:
        UserError: its tracker is off, not installed, or did not take it.
    """
    assert record.folder is not None, "it was read from a folder"
    settings = record.config.get("tracker") or {"kind": "none"}
    module = tracker(settings)
    if module is None:
        raise UserError(
            f"{record.folder}: the run was told to no tracker (tracker={settings['kind']}); run it again with one"
        )
    try:
        its_run = module.begin(settings, told.card(record, record.folder.name, record.folder.parent))
        try:
            its_run.artifact(name, folder, kind)
        finally:
            its_run.finish(record.status, record.error)
    except Exception as error:
        raise UserError(f"{folder} is written, but {settings['kind']} did not take it: {reason(error)}") from error


def claim_of(home: Path, name: str) -> Path:
    """The lock that whoever tells a tracker of this attempt holds."""
    return home / f".{name}.tracker.lock"


def is_told(home: Path, name: str) -> bool:
    """Whether a process that lives tells a tracker of this attempt now."""
    path = claim_of(home, name)
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    path.unlink(missing_ok=True)
    lock.release()
    return False
