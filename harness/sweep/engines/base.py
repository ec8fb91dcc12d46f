"""What every engine is given and gives back: a job is the configuration of one run, its outcome is in the records.

An engine is a file of this folder with
    Settings     a frozen dataclass: what `launcher.…` may say of it, beside `engine`; `per_run` is among them
    ELSEWHERE    whether its workers may stand on other machines, with other devices
    run(jobs, settings)     yields (place in jobs, Outcome) as they end, in whatever order; every place once
Its file is conf/launcher/<engine>.yaml. What a run is does not depend on who carries it out: `do` is the same in every worker.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ditbench.harness.common.devices import AUTO, BESIDE
from ditbench.harness.common.errors import UserError, reason, unknown_name
from ditbench.harness.common.interrupts import terminable
from ditbench.harness.common.type_checks import check_types
from ditbench.harness.sweep import engines
from ditbench.harness.sweep.jobs import parse_job
from ditbench.harness.sweep.one_job import carried_out, shown

OURS = ("base",)
OK, FAILED, REFUSED, LOST = "ok", "failed", "refused", "lost"
RANK = (OK, FAILED, REFUSED, LOST)  # of what several workers say of one run, the first counts
MOST = 100_000  # of anything that a launcher counts
ON_CPU = 2  # workers, where there is no other device and nobody said how many


@dataclass(frozen=True)
class Job:
    """raw: the resolved configuration of one run, plain values; title: how it is called; number, overrides: of the sweep's job;
    folder: where paths start from.
    """

    raw: dict[str, Any]
    title: str
    number: int
    overrides: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Outcome:
    """status: ok | failed (recorded, with its reason) | refused (a value that cannot be used) | lost (it never came back).

    What became of a sweep is read from records; this is for the line that is said at once, and for why there is no record.
    """

    status: str
    error: str | None = None


def do(job: Job) -> Outcome:
    """Carry out one job, here; whatever goes wrong is its outcome. An interruption is not caught."""
    os.chdir(job.folder)
    try:
        with terminable(), shown(job.number):
            record = carried_out(parse_job(job.raw), job.number, job.overrides)
    except UserError as error:
        return Outcome(REFUSED, error=str(error))
    except Exception as error:
        if job.raw["debug"]:
            traceback.print_exc()
        return Outcome(LOST, error=reason(error))
    return Outcome(record.status, record.error)


def chosen(section: Mapping[str, Any]) -> tuple[ModuleType, Any]:
    """The engine that a configuration's section `launcher` names, and its settings.

    Raises:
        UserError: no such engine, or a setting that it has not or that cannot be.
    """
    known = [each.name for each in pkgutil.iter_modules(engines.__path__) if each.name not in OURS]
    values = {name: value for name, value in section.items() if name != "engine"}
    name = str(section.get("engine"))
    if name not in known:
        raise unknown_name("launcher", name, known)
    engine = importlib.import_module(f"{engines.__name__}.{name}")
    check_types(engine.Settings, values, "launcher")
    settings = engine.Settings(**values)
    least(settings, per_run=1)
    return engine, settings


def outcomes(engine: ModuleType, settings: Any, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
    """(place in jobs, its outcome) as they end. Of the workers of one run (`per_run`) the best outcome counts: they
    share its store of samples, one of them records it.
    """
    copies = [place for place in range(len(jobs)) for _ in range(settings.per_run)]
    heard: dict[int, list[Outcome]] = {place: [] for place in range(len(jobs))}
    for number, outcome in engine.run([jobs[place] for place in copies], settings):
        place = copies[number]
        heard[place].append(outcome)
        if len(heard[place]) == settings.per_run:
            yield place, min(heard[place], key=lambda each: RANK.index(each.status))


def library(name: str, extra: str) -> ModuleType:
    """Raises UserError: the package that an engine is made of is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"launcher={extra}: {name} is not installed; pip install 'ditbench[{extra}]', or leave launcher=local"
        ) from error


def refuse_own_devices(jobs: Sequence[Job]) -> None:
    """Raise UserError for a job that names one device of several: each worker is given its own, which it sees alone."""
    for job in jobs:
        if ":" in (device := job.raw["device"]):
            kind = device.partition(":")[0]
            raise UserError(
                f"device={device}: a launcher gives each worker its own devices; leave device={AUTO} or {kind}"
            )


def least(settings: Any, **names: int) -> None:
    """Raise UserError for a setting that is a number below what it may be, or above what anybody has."""
    for name, least_of_it in names.items():
        value = getattr(settings, name)
        if isinstance(value, int) and not least_of_it <= value <= MOST:
            raise UserError(f"launcher.{name} must be from {least_of_it} to {MOST:,}, got {value}")


def number_or_auto(settings: Any, *names: str) -> None:
    """Raise UserError for a setting that is neither a number nor auto."""
    for name in names:
        if not isinstance(value := getattr(settings, name), int) and value != AUTO:
            raise UserError(f"launcher.{name} must be a whole number or auto, got {value!r}")


def settle(threads: int, workers: int) -> None:
    """Once in a worker's life: torch's threads, and how many workers the sweep has on this processor."""
    torch.set_num_threads(threads)
    os.environ[BESIDE] = str(workers - 1)
