"""The folders of an experiment's runs: which attempts there are, and how one more appears among them.

    <experiment>/<run_id>, <run_id>.2, …    attempts
    <experiment>/.<run_id>.<random>.part    the scratch folder of an attempt that is under way, with a .lock beside it that its
                                            process holds: what nobody holds was left by a kill, and whoever comes next removes it
    <experiment>/.lock                      held, for moments, by who makes a scratch folder or publishes one

Locks end with the process that holds them, wherever it ran: no process id or host name is asked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import not_writable
from ditbench.harness.common.watch import say
from ditbench.harness.records import record as records
from ditbench.harness.records.record import ATTEMPT, DamagedRecord, Record, failed_metrics, read


class PublishedElsewhere(Exception):
    """Another process was done first; `record` is what it published."""

    def __init__(self, record: Record) -> None:
        super().__init__(f"{record.folder} was published meanwhile")
        self.record = record


@dataclass
class Attempt:
    """One attempt at a run. folder: a scratch folder, until it is published; seen: the attempts there were before."""

    home: Path
    run_id: str
    folder: Path
    seen: frozenset[str] = field(default_factory=frozenset)
    published: bool = False
    turn: FileLock | None = None

    def take_turn(self) -> None:
        """Wait until nobody else measures this run; nobody does until this attempt ends.

        Raises:
            PublishedElsewhere: another process has published this run since this attempt began.
        """
        self.turn = FileLock(self.home / f".{self.run_id}.lock")
        try:
            self.turn.acquire(timeout=1.0)
        except Timeout:
            say(f"run {self.run_id}: another process measures it; waiting")
            self.turn.acquire()
        new = [
            each for each in _attempts_in(self.home, self.run_id) if each.folder and each.folder.name not in self.seen
        ]
        if (rival := best_of([each for each in new if each.status == "ok"])) is not None:
            raise PublishedElsewhere(rival)

    def publish(self, record: Record, force: bool = False) -> Record:
        """Write the record and give the folder its name, at once → the record as it is read back.

        Nothing is published where a record as good is there by now: one that another process published meanwhile, or an
        earlier one in which no more metrics failed. That one is returned. force: published in any case.
        """
        records.write(record, self.folder)
        ours = read(self.folder / "record.json")
        with _claimed(self.home):
            rival = None if force else self._as_good(ours)
            if rival is not None:
                return rival
            name = next_name(self.home, self.run_id)
            os.rename(self.folder, self.home / name)
            self.published = True
        return read(self.home / name / "record.json")

    def _as_good(self, ours: Record) -> Record | None:
        found = [
            each
            for each in _attempts_in(self.home, self.run_id)
            if each.status == "ok" or (each.folder is not None and each.folder.name not in self.seen)
        ]
        best = best_of(found)
        return best if best is not None and _quality(best) >= _quality(ours) else None


@contextmanager
def attempt(results_dir: Path, experiment: str, run_id: str) -> Iterator[Attempt]:
    """A scratch folder to do a run in; it is removed at the end unless it was published."""
    home = experiment_folder(results_dir, experiment)
    home.mkdir(parents=True, exist_ok=True)
    with _claimed(home):
        _remove_leftovers(home)
        seen = frozenset(name for name in os.listdir(home) if ATTEMPT.match(name))
        folder = home / f".{run_id}.{os.urandom(4).hex()}.part"
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire(timeout=0)
        folder.mkdir()
    ours = Attempt(home, run_id, folder, seen)
    try:
        yield ours
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _let_go(lock)
        if ours.turn is not None:
            _let_go(ours.turn)


def clear(home: Path) -> None:
    """Remove what killed processes left of their attempts in an experiment's folder; nothing of the living. A folder that nobody may
    write to stays as it is.
    """
    if home.is_dir():
        with suppress(OSError), _claimed(home):
            _remove_leftovers(home)


def next_name(home: Path, run_id: str) -> str:
    """What the next attempt at a run is called: <run_id>, or with a number behind it."""
    names, number = set(os.listdir(home)), 1
    while (name := run_id if number == 1 else f"{run_id}.{number}") in names:
        number += 1
    return name


def experiment_folder(results_dir: Path, experiment: str) -> Path:
    """Raises UserError: the name would be another folder than one beside the other experiments."""
    if not may_be_experiment(experiment):
        raise UserError(
            f"name={experiment!r} is used as a folder: it must not be empty, start with a dot or hold a slash"
        )
    return Path(results_dir) / "runs" / experiment


def may_be_experiment(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def is_experiment(results_dir: Path, name: str) -> bool:
    """Whether there is one of that name; a path is none."""
    return may_be_experiment(name) and experiment_folder(results_dir, name).is_dir()


def under_way(home: Path) -> list[Path]:
    """The scratch folders that a process holds. Their locks are tried while nobody makes one."""
    folders = [path for path in sorted(home.glob(".*.part")) if path.stem.count(".") == 2]
    if not folders:
        return []
    try:
        with _claimed(home):
            return [path for path in folders if path.exists() and _is_held(path)]
    except OSError as error:
        if not not_writable(error):
            raise
        say(f"{home}: may not be written here, and locks are files: whether a run is under way cannot be told")
        return []


def attempts(results_dir: Path, experiment: str, run_id: str) -> list[Record]:
    """Every readable attempt of one run, oldest first; what is damaged is said.

    Raises:
        UserError: one was written by a newer ditbench.
    """
    return _attempts_in(experiment_folder(results_dir, experiment), run_id)


def finished(results_dir: Path, experiment: str, run_id: str) -> Record | None:
    """The attempt that ended ok with the fewest failed metrics, the newest of these; None if none ended ok."""
    return best_of([each for each in attempts(results_dir, experiment, run_id) if each.status == "ok"])


def best_of(found: list[Record]) -> Record | None:
    """An ok attempt before a failed one, then by failed metrics, then the last in the list."""
    return max(reversed(found), key=_quality) if found else None


@dataclass(frozen=True)
class Survey:
    """records: the best attempt of every run; damaged: a line for each record or file beside one that cannot be used."""

    records: list[Record]
    damaged: list[str]


def survey(results_dir: Path, experiment: str | None = None) -> Survey:
    """All runs of one experiment, or of all."""
    root = Path(results_dir) / "runs"
    homes = [root / experiment] if experiment else sorted(p for p in root.glob("*") if p.is_dir())
    found, damaged = [], []
    for home in homes:
        of_run: dict[str, list[Record]] = {}
        for folder in _attempt_folders(home):
            try:
                record = read(folder / "record.json")
                of_run.setdefault(folder.name[:12], []).append(record)
                damaged += record.damaged
            except UserError as error:
                damaged.append(str(error))
        found += [best for run_id in sorted(of_run) if (best := best_of(of_run[run_id])) is not None]
    return Survey(found, damaged)


def named(target: str, results_dir: Path) -> list[Record]:
    """The run of a folder, or the best attempts of an experiment's runs that ended ok.

    Raises:
        UserError: there is neither.
    """
    if (Path(target) / "record.json").is_file():
        return [read(Path(target) / "record.json")]
    if not is_experiment(results_dir, target):
        raise UserError(
            f"{target}: expected a run's folder (with a record.json) or an experiment in {results_dir}/runs"
        )
    return [record for record in read_all(results_dir, target) if record.status == "ok"]


def read_all(results_dir: Path, experiment: str | None = None) -> list[Record]:
    """The best attempt of every run, of one experiment or of all; what is damaged is said and left out."""
    found = survey(results_dir, experiment)
    for line in found.damaged:
        say(line)
    return found.records


def _quality(record: Record) -> tuple[bool, int]:
    return record.status == "ok", -len(failed_metrics(record))


def _attempt_folders(home: Path, run_id: str = "") -> list[Path]:
    """Those that hold a record, oldest first."""
    names = [
        (match["run_id"], int(match["attempt"] or 1), match[0]) for match in map(ATTEMPT.match, _listed(home)) if match
    ]
    folders = [home / name for its_id, _, name in sorted(names) if not run_id or its_id == run_id]
    return [folder for folder in folders if (folder / "record.json").exists()]


def _listed(home: Path) -> list[str]:
    return os.listdir(home) if home.is_dir() else []


def _attempts_in(home: Path, run_id: str) -> list[Record]:
    found = []
    for folder in _attempt_folders(home, run_id):
        try:
            found.append(read(folder / "record.json"))
        except DamagedRecord as damage:
            say(f"{damage}; it counts for nothing")
    return found


@contextmanager
def alone_with(found: Record) -> Iterator[Record]:
    """The record as it stands once no other process adds to it: a metric that is filed later is two files, value and values per sample."""
    assert found.folder is not None
    lock = FileLock(found.folder.with_name(f".{found.folder.name}.metrics.lock"))
    lock.acquire()
    try:
        yield read(found.folder / "record.json")
    finally:
        _let_go(lock)


@contextmanager
def _claimed(home: Path) -> Iterator[None]:
    lock = FileLock(home / ".lock")
    lock.acquire()
    try:
        yield
    finally:
        _let_go(lock)


def _remove_leftovers(home: Path) -> None:
    """Scratch folders that no process holds."""
    for name in sorted(each for each in os.listdir(home) if each.startswith(".") and each.endswith((".part", ".lock"))):
        path = home / name
        if name == ".lock" or not (path.exists() and path.stem.count(".") == 2):
            continue
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        shutil.rmtree(path.with_suffix(".part"), ignore_errors=True)
        _let_go(lock)


def _is_held(path: Path) -> bool:
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _let_go(lock: FileLock) -> None:
    """The file goes first: who waits for it notices that it has gone, and makes another."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
