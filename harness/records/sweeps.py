"""Which runs a sweep has, written before any of them starts, and what each job says where it runs.

    <experiment>/.sweeps/<stamp>/sweep.json   the jobs of a command: overrides, run, why it was refused
    <experiment>/.sweeps/<stamp>/3.json       job 3 itself: which run it is there (a device of another kind makes another run), or
                                              why it was refused

What became of a job is read from the records of its run, not from here, so that whoever sees the folder knows it, whichever
process or machine the job ran in. Files carry a hash of themselves; a damaged one is named and left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import disk_errors_explained
from ditbench.harness.common.type_checks import check_types
from ditbench.harness.common.watch import say
from ditbench.harness.records import attempts, hashed_json
from ditbench.harness.records.hashed_json import NotWhole
from ditbench.harness.records.record import ATTEMPT, Record

FOLDER, FILE = ".sweeps", "sweep.json"
FORMAT = 1
STAMP = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{4}")  # the name of a folder: nothing else may be one
DONE, FAILED, REFUSED, RUNNING, MISSING = "done", "failed", "refused", "running", "missing"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    run_id: of its run; None where only the job itself can tell (another kind of device, a model that is not here).
    same_as: the number of an earlier job that is the same run; this one is not started.
    before: attempts at its run that there were when the sweep began.
    """

    number: int
    overrides: tuple[str, ...]
    title: str
    run_id: str | None = None
    refused: str | None = None
    same_as: int | None = None
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """The jobs of one command in one experiment.

    hydra: overrides of Hydra's own that the command had, the launcher's among them. config_dirs: the user's folders of
    configurations. sweeper: who chooses the jobs as it goes, so that none are known before; None: all are listed.
    """

    stamp: str
    home: Path
    started: str
    jobs: tuple[Job, ...]
    force: bool = False
    hydra: tuple[str, ...] = ()
    config_dirs: tuple[str, ...] = ()
    sweeper: str | None = None

    @property
    def folder(self) -> Path:
        return self.home / FOLDER / self.stamp

    @property
    def experiment(self) -> str:
        return self.home.name


@dataclass(frozen=True)
class Outcome:
    """What became of a job. why: of a failed or refused one. record: the attempt that says so."""

    job: Job
    state: str
    why: str = ""
    record: Record | None = None


def new_stamp() -> str:
    """Sorts by time; no two are the same."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{os.urandom(2).hex()}"


def write(sweep: Sweep) -> None:
    """Raises UserError: it cannot be written there."""
    values = asdict(sweep) | {"format": FORMAT}
    del values["home"]
    with disk_errors_explained(sweep.home):
        sweep.folder.mkdir(parents=True, exist_ok=True)
        hashed_json.write(sweep.folder / FILE, hashed_json.text_of(values))


def read(home: Path, stamp: str) -> Sweep:
    """With the jobs that said something themselves, where no list was made before.

    Raises:
        UserError: there is none, or it is not what was written.
    """
    path = home / FOLDER / stamp / FILE
    if not STAMP.fullmatch(stamp):
        raise UserError(f"{home}: no sweep {stamp}; known: {', '.join(stamps(home)) or 'none'}")
    try:
        values = hashed_json.read(path)
        if values.pop("format") != FORMAT or values["stamp"] != stamp:
            raise NotWhole("another format than this ditbench reads, or not of this folder")
        jobs = tuple(_job(each) for each in values.pop("jobs"))
        check_types(Sweep, values, "sweep")
        sweep = Sweep(**{name: _tuple(value) for name, value in values.items()}, home=home, jobs=jobs)
    except FileNotFoundError:
        raise UserError(f"{home}: no sweep {stamp}; known: {', '.join(stamps(home)) or 'none'}") from None
    except (NotWhole, UserError, OSError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move that folder away to go on") from error
    said, known = _said(sweep), {job.number for job in jobs}
    more = [Job(number, each.overrides, each.title) for number, each in said.items() if number not in known]
    every = (_as_said(job, said[job.number]) if job.number in said else job for job in (*jobs, *more))
    return replace(sweep, jobs=tuple(every))


def newest(home: Path) -> Sweep | None:
    """The sweep that was started last; what is damaged is said and left out."""
    for stamp in reversed(stamps(home)):
        try:
            return read(home, stamp)
        except UserError as error:
            say(str(error))
    return None


def stamps(home: Path) -> list[str]:
    """Of all sweeps of an experiment, oldest first."""
    names = (path.parent.name for path in (home / FOLDER).glob(f"*/{FILE}"))
    return sorted(name for name in names if STAMP.fullmatch(name))


def say_of_job(sweep: tuple[Path, str], job: Job) -> None:
    """Write what a job knows of itself where it runs. sweep: its home and stamp."""
    home, stamp = sweep
    values = asdict(job)
    del values["same_as"], values["number"]
    hashed_json.write(home / FOLDER / stamp / f"{job.number}.json", hashed_json.text_of(values))


def renew(sweep: Sweep, jobs: Iterable[Job]) -> Sweep:
    """The sweep with these jobs in the places of those of the same numbers, as if none had started; not written."""
    new = {job.number: job for job in jobs}
    for number in new:
        (sweep.folder / f"{number}.json").unlink(missing_ok=True)
    return replace(sweep, jobs=tuple(new.get(job.number, job) for job in sweep.jobs))


def outcomes(sweep: Sweep) -> list[Outcome]:
    """Of every job, in their order; a job that is the same run as an earlier one has none of its own."""
    running = {folder.name[1:13] for folder in attempts.under_way(sweep.home)}
    return [_outcome(sweep, job, running) for job in sweep.jobs if job.same_as is None]


def _outcome(sweep: Sweep, job: Job, running: set[str]) -> Outcome:
    if job.run_id is None:
        return Outcome(job, MISSING) if job.refused is None else Outcome(job, REFUSED, job.refused)
    if job.run_id in running:
        return Outcome(job, RUNNING)
    found = attempts.attempts(sweep.home.parents[1], sweep.experiment, job.run_id)
    new = [each for each in found if each.folder is not None and each.folder.name not in job.before]
    of_before = [] if sweep.force else [each for each in found if each.status == "ok"]
    best = new[-1] if sweep.force and new else attempts.best_of([*of_before, *new])
    if best is None:  # of several workers of one run one may have been refused; a record says more
        return Outcome(job, MISSING) if job.refused is None else Outcome(job, REFUSED, job.refused)
    return Outcome(job, DONE if best.status == "ok" else FAILED, best.error or "", best)


def attempts_before(home: Path, run_id: str) -> tuple[str, ...]:
    names = os.listdir(home) if home.is_dir() else []
    return tuple(sorted(name for name in names if (match := ATTEMPT.match(name)) and match["run_id"] == run_id))


def _job(values: dict[str, Any]) -> Job:
    """Raises UserError, TypeError, AttributeError: it is none."""
    check_types(Job, values, "job")
    return Job(**{name: _tuple(value) for name, value in values.items()})


def _said(sweep: Sweep) -> dict[int, Job]:
    found = {}
    for path in sweep.folder.glob("*.json"):
        if path.stem.isdecimal():
            try:
                found[int(path.stem)] = _job(hashed_json.read(path) | {"number": int(path.stem)})
            except (NotWhole, UserError, OSError, TypeError) as error:
                say(f"{path}: cannot be read ({error}); it counts for nothing")
    return dict(sorted(found.items()))


def _as_said(job: Job, said: Job) -> Job:
    """The job knows better: it was there."""
    return replace(
        job,
        run_id=said.run_id or job.run_id,
        title=job.title or said.title,
        refused=said.refused or job.refused,
        before=said.before if said.run_id else job.before,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
