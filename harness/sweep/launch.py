"""`ditbench run` under Hydra: one job or a sweep; a failed run does not stop the others; the comparison at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ditbench.harness.common.errors import EXIT_FAILED_RUNS, UserError, lines_of, of_the_system, reason
from ditbench.harness.common.interrupts import terminable
from ditbench.harness.common.paths import CONF
from ditbench.harness.common.watch import say, watching
from ditbench.harness.records import attempts, sweeps
from ditbench.harness.records.environment import now
from ditbench.harness.records.record import Record
from ditbench.harness.records.sweeps import DONE, FAILED, MISSING, REFUSED, RUNNING, Outcome, Sweep
from ditbench.harness.report import comparison_table
from ditbench.harness.run import run
from ditbench.harness.sweep import compose, objective
from ditbench.harness.sweep.compose import resolved
from ditbench.harness.sweep.engine_choice import engine_of, refuse_several_engines
from ditbench.harness.sweep.engines import local
from ditbench.harness.sweep.engines.base import LOST, Job, outcomes
from ditbench.harness.sweep.jobs import JOB, OF, Planned, manifests, parse_job, planned, without_hydra
from ditbench.harness.sweep.live import Live
from ditbench.harness.sweep.multirun import Multirun, multirun
from ditbench.harness.sweep.one_job import carried_out, shown
from ditbench.harness.sweep.overrides import check_flags

# Of one run, without a sweep.
_done: list[Record] = []
_refused: list[UserError] = []  # it left no record: a value that cannot be used, a model that is not there


def launch(arguments: list[str], again: Mapping[int, Sequence[str]] | None = None, stamp: str | None = None) -> int:
    """Run what the arguments say → exit code (0, or 3 when a run failed or never came).

    again: jobs of the sweep `stamp`, {number: overrides}, to be carried out instead of those that the arguments make.

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    arguments = _checked(arguments)
    if any(each.startswith("launcher=") and each != "launcher=local" for each in arguments):
        arguments = [*arguments, "--multirun"]  # a sweep of one: it is not this process that does it
    with _arguments(arguments), multirun(arguments) as sweep:
        if sweep is not None:
            return _launch_sweep(sweep, again, stamp or sweeps.new_stamp())
    _done.clear()
    _refused.clear()
    with Live() as live, watching(live):
        through_hydra(arguments, job)
    failed = [
        Outcome(sweeps.Job(0, (), named(each)), FAILED, each.error or "") for each in _done if each.status == "failed"
    ]
    return _told(_done, failed, _refused)


def named(record: Record) -> str:
    return f"{record.model} {record.method} {(record.config.get('bits') or {}).get('label', '–')}"


def _launch_sweep(multirun: Multirun, again: Mapping[int, Sequence[str]] | None, stamp: str) -> int:
    listed = again or dict(enumerate(multirun.jobs())) if multirun.sweeper is None else {0: ()}
    engine, settings = engine_of(multirun, next(iter(listed.items())))
    if multirun.sweeper is not None:
        return _launch_chosen(multirun, stamp)
    jobs = planned(multirun, stamp, listed, multirun.here and not engine.ELSEWHERE)
    refuse_several_engines([each.config for each in jobs])
    if all(each.error is not None for each in jobs):
        return _told([], [], [each.error for each in jobs if each.error is not None])
    made = manifests(multirun, stamp, now(), jobs)
    if again is not None:
        made = [sweeps.renew(sweeps.read(each.home, stamp), each.jobs) for each in made]
    for sweep in made:
        sweeps.write(sweep)
    for line in announced(stamp, jobs):
        say(line)
    to_do = [each for each in jobs if each.to_do]
    broken: dict[int, Exception] = {}
    lost: dict[int, str] = {}
    with _table_on_interrupt(made):
        if not to_do:
            pass
        elif engine is not local:
            lost = _by_engine(engine, settings, to_do)
        elif multirun.here:
            with Live(len(to_do)) as live, watching(live):
                for number, each in enumerate(to_do, start=1):
                    broken |= _carried_out(multirun, each)
                    live.begun = (
                        number  # also of one that did not begin: another process did it meanwhile, or it was refused
                    )
        else:
            given = [(*each.job.overrides, f"{OF}={stamp}", f"{JOB}={each.job.number}") for each in to_do]
            returned = multirun.launch(given, job)
            broken = {
                each.job.number: error
                for each, error in zip(to_do, returned, strict=False)
                if isinstance(error, Exception)
            }
    return _end(made, broken, lost)


def _by_engine(engine: ModuleType, settings: Any, to_do: Sequence[Planned]) -> dict[int, str]:
    """{number of a job that did not come back: why}."""
    jobs = [
        Job(resolved(without_hydra(each.config)), each.job.title, each.job.number, each.job.overrides, os.getcwd())
        for each in to_do
    ]
    lost = {}
    with terminable():
        for count, (place, outcome) in enumerate(outcomes(engine, settings, jobs), start=1):
            why = f": {outcome.error}" if outcome.error else ""
            say(f"[{count}/{len(jobs)}] job {jobs[place].number}, {jobs[place].title}: {outcome.status}{why}")
            if outcome.status == LOST:
                lost[jobs[place].number] = outcome.error or ""
    return lost


def _launch_chosen(multirun: Multirun, stamp: str) -> int:
    """The jobs of a sweeper that chooses each by what the ones before gave: they make themselves known as they start."""
    objective.check(multirun)
    config = without_hydra(multirun.config)
    home = attempts.experiment_folder(Path(config.results_dir).expanduser(), config.name)
    sweep = Sweep(stamp, home, now(), (), sweeper=multirun.sweeper)
    sweeps.write(sweep)
    say(f"sweep {stamp} of {home.name}: {multirun.sweeper} chooses its runs one after the other")
    with _table_on_interrupt([sweep]), Live(None) as live, watching(live):
        multirun.sweep([f"{OF}={stamp}"], job)
    if line := objective.best(multirun, sweeps.outcomes(sweeps.read(home, stamp))):
        say(line)
    return _end([sweep], {})


def announced(stamp: str, jobs: Sequence[Planned]) -> list[str]:
    """What a sweep is, and a line for each job that is refused, before anything starts."""
    refused = [each for each in jobs if each.error is not None]
    runs = [each for each in jobs if each.error is None and each.job.same_as is None]
    done, same = sum(each.done for each in runs), len(jobs) - len(refused) - len(runs)
    parts = [f"{len(runs) - done} to do", f"{done} recorded already" * bool(done)]
    parts += [f"{len(refused)} refused" * bool(refused), f"{same} of the jobs the same as another" * bool(same)]
    head = f"sweep {stamp} of {', '.join(dict.fromkeys(each.home.name for each in jobs))}"
    lines = [f"{head}: {len(runs) + len(refused)} runs: {', '.join(filter(None, parts))}"]
    return lines + [f"refused: {each.job.title}: {lines_of(each.error)}" for each in refused if each.error]


def _carried_out(multirun: Multirun, each: Planned) -> dict[int, Exception]:
    """{its number: why it left no record}, of a job in this process."""
    config = each.run
    assert config is not None, "it is to be done"
    try:
        multirun.carry_out(each.config, lambda _: carried_out(config, each.job.number, each.job.overrides))
    except Exception as error:
        if not isinstance(error, UserError):
            say(f"{each.job.title}: {reason(error)}")
        return {each.job.number: error}
    return {}


def job(config: DictConfig) -> str | float:
    """One Hydra job: the configuration becomes a run, the run a record. A job that is refused does not stop a sweep.

    Returns:
        The status of its record, or "refused"; the value of the metric sweep.objective, where one is named and has a value.
    """
    try:
        raw = compose.resolved(config)
        sought, number = raw["sweep"]["objective"], raw["sweep"]["job"]
        its_config = parse_job(raw)
        if its_config.sweep is None and raw["launcher"]["engine"] != "local":
            raise UserError(
                f"launcher={raw['launcher']['engine']} comes from an experiment's file; add -m, a launcher takes sweeps"
            )
        if its_config.sweep is None:
            record = run(its_config)
        else:
            its = HydraConfig.get()
            number = its.job.num if number is None else number
            with terminable(), shown(number):
                record = carried_out(its_config, number, its.overrides.task)
    except UserError as error:
        _refused.append(error)
        return "refused"
    except OSError as error:
        _refused.append(of_the_system(error))
        return "refused"
    if record.folder not in [other.folder for other in _done]:
        _done.append(record)
    value = objective.value_of(record, sought)
    return record.status if value is None else value


@contextmanager
def _table_on_interrupt(made: Sequence[Sweep]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _end(made, {}, interrupted=True)
        raise


def _end(
    made: Sequence[Sweep],
    broken: Mapping[int, Exception],
    lost: Mapping[int, str] | None = None,
    interrupted: bool = False,
) -> int:
    """The table of what came, and what did not → exit code. lost: {job: why it did not come back}, where that is known."""
    found: list[Outcome] = []
    for sweep in made:
        found += sweeps.outcomes(sweeps.read(sweep.home, sweep.stamp))
    found = [
        replace(each, state=REFUSED, why=str(broken[each.job.number]))
        if each.state == MISSING and each.job.number in broken
        else each
        for each in found
    ]
    found = [
        replace(each, why=(lost or {}).get(each.job.number, each.why)) if each.state == MISSING else each
        for each in found
    ]
    records = {each.record.folder: each.record for each in found if each.record is not None}
    not_done = [each for each in found if each.state not in (DONE, REFUSED)]
    if interrupted:
        if records:
            print(comparison_table(list(records.values())))
        names = " or ".join(f"`ditbench retry {sweep.experiment}`" for sweep in made)
        done = sum(each.state == DONE for each in found)
        say(f"{done} of {len(found)} runs are done; {names} does the others, and so does the same command")
        return EXIT_FAILED_RUNS
    return _told(list(records.values()), not_done, [UserError(each.why) for each in found if each.state == REFUSED])


def _told(records: list[Record], not_done: Sequence[Outcome], refused: Sequence[UserError]) -> int:
    """Print the table, then a line for each run that is none of it → exit code.

    Raises:
        UserError: the last of those that were refused.
    """
    if records:
        print(comparison_table(records))
    for each in not_done:
        why = {FAILED: each.why, RUNNING: "another process does it", MISSING: each.why or "it left no record"}[
            each.state
        ]
        say(f"{each.state}: {each.job.title}: {why}")
    if refused:
        *others, last = {str(error): error for error in refused}.values()
        for error in others:
            say(f"ditbench: {lines_of(error)}")
        raise last
    return EXIT_FAILED_RUNS if not_done else 0


def through_hydra(arguments: list[str], job: Callable[[DictConfig], Any]) -> None:
    """Every job that the arguments make, one after the other or as their launcher has it.

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    arguments = _checked(arguments)
    with _arguments(arguments), compose.hydra_errors_explained():
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()


def _checked(arguments: list[str]) -> list[str]:
    """The arguments in an order that Hydra takes."""
    compose.register()
    overrides = [a for a in arguments if ("=" in a or a.startswith("~")) and not a.startswith("-")]
    arguments = overrides + [a for a in arguments if a not in overrides]  # Hydra wants them in one piece
    compose.check_overrides(overrides)
    check_flags(arguments)
    return arguments


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """Hydra reads the command line itself; HYDRA_FULL_ERROR makes it raise instead of printing and leaving."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["ditbench run", *compose.search_path(), *arguments], "1"
    try:
        yield
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
