"""How a sweep stands, from its list of jobs, the records of its runs and what runs say that are under way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.pace import duration
from ditbench.harness.common.text_table import table
from ditbench.harness.records import attempts, status, sweeps
from ditbench.harness.records.record import Record
from ditbench.harness.records.status import Status
from ditbench.harness.records.sweeps import DONE, FAILED, MISSING, REFUSED, RUNNING, Sweep

TOLD_BY = ("method", "bits", "seed", "protocol", "calibration", "generate", "metrics", "model", "backend", "device")
LOOKS = {DONE: "done", FAILED: "failed", REFUSED: "refused", RUNNING: "running", MISSING: "not there"}


@dataclass(frozen=True)
class Row:
    """A run as it stands. why: of a failed or refused one; seconds: what a done one took; status: of a running one.

    settings: {name: value}, the overrides of a sweep's job, or the configuration of a record: what tells it from runs of the same title.
    """

    title: str
    state: str
    run_id: str | None
    job: int | None = None
    why: str = ""
    seconds: float | None = None
    status: Status | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Overview:
    """sweep: None of an experiment without one; then its rows are all its runs. others: runs recorded beside those of the sweep."""

    experiment: str
    sweep: Sweep | None
    rows: list[Row]
    others: int = 0

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)

    @property
    def left_s(self) -> float | None:
        """Seconds until all runs are there, by the mean of those that are done and as many at once as run now; None while none is done
        or none runs.
        """
        took = [row.seconds for row in self.rows if row.seconds is not None]
        running = [row.status for row in self.rows if row.status is not None]
        if not took or not running:
            return None
        mean = sum(took) / len(took)
        under_way = sum(max(mean - (time.time() - each.started), 0) for each in running)
        return (mean * self.count(MISSING) + under_way) / len(running)


def overview(results_dir: Path, experiment: str, stamp: str | None = None) -> Overview:
    """stamp: of a sweep; None: the newest.

    Raises:
        UserError: no such experiment or sweep.
    """
    if not attempts.is_experiment(results_dir, experiment):
        raise no_experiment(results_dir, experiment)
    home = attempts.experiment_folder(results_dir, experiment)
    sweep = sweeps.read(home, stamp) if stamp else sweeps.newest(home)
    running = {each.run_id: each for each in status.under_way(home)}
    rows = [_of_outcome(each, running) for each in (sweeps.outcomes(sweep) if sweep else ())]
    known = {row.run_id for row in rows}
    beside = [
        _of_record(each, running) for each in attempts.read_all(results_dir, experiment) if each.run_id not in known
    ]
    named = known | {row.run_id for row in beside}
    more = [Row(each.title or "a run", RUNNING, id, status=each) for id, each in running.items() if id not in named]
    if sweep is None:
        return Overview(experiment, None, [*beside, *more])
    return Overview(experiment, sweep, [*rows, *(row for row in (*beside, *more) if row.status)], len(beside))


def no_experiment(results_dir: Path, experiment: str) -> UserError:
    runs = Path(results_dir) / "runs"
    known = sorted(path.name for path in runs.glob("*") if path.is_dir())
    return UserError(f"{experiment}: no experiment in {runs}; known: {', '.join(known) or 'none'}")


def _of_outcome(each: sweeps.Outcome, running: dict[str, Status]) -> Row:
    seconds = sum(each.record.timings_s.values()) if each.record is not None and each.state == DONE else None
    status = running.get(each.job.run_id or "") if each.state == RUNNING else None
    given = dict(override.split("=", 1) for override in each.job.overrides if "=" in override)
    return Row(each.job.title, each.state, each.job.run_id, each.job.number, each.why, seconds, status, given)


def _of_record(record: Record, running: dict[str, Status]) -> Row:
    bits = record.config.get("bits")
    title = f"{record.model} {record.method} {record.bits.get('label') or (bits or {}).get('label', '')}"
    if (status := running.get(record.run_id)) is not None:
        return Row(title, RUNNING, record.run_id, status=status, settings=_settings(record))
    state = DONE if record.status == "ok" else FAILED
    seconds = sum(record.timings_s.values())
    return Row(title, state, record.run_id, None, record.error or "", seconds, None, _settings(record))


def _settings(record: Record) -> dict[str, str]:
    """Of what is said on a command line, {method.strength: 0.5}."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if not isinstance(value, Mapping):
            yield name, str(value)
            return
        for key, its in value.items():
            yield from flat(its, f"{name}.{key}" if name else str(key))

    return dict(flat({part: record.config[part] for part in TOLD_BY if part in record.config}, ""))


def told_apart(rows: Sequence[Row]) -> list[str]:
    """The titles, and behind those that several rows have, the settings in which these are not alike."""
    titles = []
    for row in rows:
        alike = [other.settings for other in rows if other.title == row.title]
        names = [name for name in row.settings if len({each.get(name) for each in alike}) > 1]
        titles.append(" ".join([row.title, *(f"{name}={row.settings[name]}" for name in names)]))
    return titles


def in_a_line(found: Overview) -> str:
    said = ", ".join(f"{found.count(state)} {LOOKS[state]}" for state in LOOKS if found.count(state)) or "no runs"
    of_sweep = f", sweep {found.sweep.stamp}" if found.sweep else ""
    line = f"{found.experiment}{of_sweep}: {len(found.rows)} runs: {said}"
    if found.left_s is not None:
        line += f"; about {duration(found.left_s)} to go"
    if found.sweep and found.sweep.sweeper:
        line += f"; {found.sweep.sweeper} chooses them as it goes"
    return line


def as_text(found: Overview) -> str:
    head = in_a_line(found)
    rows = [
        (title, row.run_id or "–", LOOKS[row.state], _how(row))
        for row, title in zip(found.rows, told_apart(found.rows), strict=True)
    ]
    lines = [head, "", table(("run", "id", "state", ""), rows)] if rows else [head]
    if found.others:
        runs = (
            "1 other run of this experiment belongs"
            if found.others == 1
            else f"{found.others} other runs of this experiment belong"
        )
        lines.append(f"{runs} to no job of this sweep")
    if found.sweep and not found.count(RUNNING) and (found.count(FAILED) or found.count(MISSING)):
        lines.append(f"`ditbench retry {found.experiment}` runs again what failed or is not there")
    return "\n".join(lines)


def _how(row: Row) -> str:
    if row.status is not None:
        each = row.status
        pace = f" {each.pace}" if each.pace else ""
        stage = each.stage.replace("_", " ") or "begins"
        where = f"on {each.device} of {each.host}, process {each.pid}" if each.host else ""
        return f"{stage}{pace}, for {duration(time.time() - each.started)} {where}".strip()
    return row.why if row.seconds is None or row.why else f"took {duration(row.seconds)}"


def as_json(found: Overview) -> dict[str, Any]:
    """Times in seconds; `since` is 1970."""
    return {
        "experiment": found.experiment,
        "sweep": found.sweep.stamp if found.sweep else None,
        "counts": {state: found.count(state) for state in LOOKS},
        "left_s": found.left_s,
        "other_runs": found.others,
        "runs": [_row_as_json(row) for row in found.rows],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "title": row.title,
        "settings": dict(row.settings),
        "run_id": row.run_id,
        "job": row.job,
        "state": row.state,
    }
    values |= {"why": row.why or None, "seconds": row.seconds, "under_way": None}
    if row.status is not None:
        pace = row.status.pace
        values["under_way"] = vars(row.status) | {
            "rate": pace.rate if pace else None,
            "left_s": pace.left_s if pace else None,
        }
    return values
