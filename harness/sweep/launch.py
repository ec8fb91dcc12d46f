"""`ditbench run` under Hydra: one job or a sweep; a failed run does not stop the others; the comparison at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ditbench.harness.common.errors import UserError, lines_of, of_the_system, reason
from ditbench.harness.common.interrupts import terminable
from ditbench.harness.common.pace import duration
from ditbench.harness.common.paths import CONF
from ditbench.harness.common.watch import say, watching
from ditbench.harness.records import attempts, sweeps
from ditbench.harness.records.environment import now
from ditbench.harness.records.record import Record
from ditbench.harness.records.sweeps import FAILED, MISSING, REFUSED, Outcome, Sweep
from ditbench.harness.run import run
from ditbench.harness.sweep import compose, objective
from ditbench.harness.sweep.compose import resolved
from ditbench.harness.sweep.ending import ended, table_on_interrupt, told
from ditbench.harness.sweep.engine_choice import engine_of, refuse_several_engines
from ditbench.harness.sweep.engines import local
from ditbench.harness.sweep.engines.base import LOST, Job, chosen, outcomes
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
    arguments = checked(arguments)
    if any(each.startswith("launcher=") and each != "launcher=local" for each in arguments):
        arguments = [*arguments, "--multirun"]  # a sweep of one: it is not this process that does it
    with _arguments(arguments), multirun(arguments) as sweep:
        if sweep is not None and sweep.sweeper is not None:
            return _launch_chosen(sweep, sweeps.new_stamp())
        if sweep is not None:
            return _launch_sweep(sweep, again, stamp or sweeps.new_stamp())
    _done.clear()
    _refused.clear()
    with Live() as live, watching(live):
        through_hydra(arguments, job)
    failed = [
        Outcome(sweeps.Job(0, (), named(each)), FAILED, each.error or "") for each in _done if each.status == "failed"
    ]
    return told(_done, failed, _refused)


def named(record: Record) -> str:
    return f"{record.model} {record.method} {(record.config.get('bits') or {}).get('label', '–')}"


def _launch_sweep(multirun: Multirun, again: Mapping[int, Sequence[str]] | None, stamp: str) -> int:
    """Look at all jobs, write down and say which there are, carry out those that are to be done, and tell what came of it."""
    listed = again or dict(enumerate(multirun.jobs()))
    engine, settings = engine_of(multirun, next(iter(listed.items())))
    jobs = planned(multirun, stamp, listed, multirun.here and not engine.ELSEWHERE)
    refuse_several_engines([each.config for each in jobs])
    if all(each.error is not None for each in jobs):
        return told([], [], [each.error for each in jobs if each.error is not None])
    made = manifests(multirun, stamp, now(), jobs)
    if again is not None:
        made = [sweeps.renew(sweeps.read(each.home, stamp), each.jobs) for each in made]
    for sweep in made:
        sweeps.write(sweep)
    for line in announced(stamp, jobs):
        say(line)
    with table_on_interrupt(made):
        heard = _all_carried_out(multirun, engine, settings, [each for each in jobs if each.to_do], stamp)
    return ended(made, heard, [each.error for each in jobs if each.error is not None and each.home is None])


def _all_carried_out(
    multirun: Multirun, engine: ModuleType, settings: Any, to_do: Sequence[Planned], stamp: str
) -> dict[int, tuple[str, str]]:
    """What is heard of jobs that may have left nothing: {number: (REFUSED or MISSING, why)}."""
    if not to_do:
        return {}
    if engine is not local:
        return _by_engine(engine, settings, to_do)
    if multirun.here:
        return _here(multirun, to_do)
    given = [(*each.job.overrides, f"{OF}={stamp}", f"{JOB}={each.job.number}") for each in to_do]
    returned = multirun.launch(given, job)
    pairs = zip(to_do, returned, strict=False)  # a launcher may give back fewer
    return {each.job.number: (MISSING, str(error)) for each, error in pairs if isinstance(error, Exception)}


def _here(multirun: Multirun, to_do: Sequence[Planned]) -> dict[int, tuple[str, str]]:
    """One after the other, in this process."""
    heard = {}
    with Live(len(to_do)) as live, watching(live):
        for count, each in enumerate(to_do, start=1):
            try:
                _carried_out(multirun, each)
            except UserError as error:
                heard[each.job.number] = (REFUSED, str(error))
            except Exception as error:
                why = str(error) if isinstance(error, OSError) else reason(error)
                say(f"{each.job.title}: {why}")
                heard[each.job.number] = (MISSING, why)
            live.begun = count  # also of one that did not begin: another process did it meanwhile, or it was refused
    return heard


def _carried_out(multirun: Multirun, each: Planned) -> None:
    config = each.run
    assert config is not None, "it is to be done"
    multirun.carry_out(each.config, lambda _: carried_out(config, each.job.number, each.job.overrides))


def _by_engine(engine: ModuleType, settings: Any, to_do: Sequence[Planned]) -> dict[int, tuple[str, str]]:
    jobs = [
        Job(resolved(without_hydra(each.config)), each.job.title, each.job.number, each.job.overrides, os.getcwd())
        for each in to_do
    ]
    heard, started = {}, time.monotonic()
    with terminable():
        for count, (place, outcome) in enumerate(outcomes(engine, settings, jobs), start=1):
            why = f": {outcome.error}" if outcome.error else ""
            say(
                f"[{count}/{len(jobs)}] job {jobs[place].number}, {jobs[place].title}: {outcome.status}{why}{_left(count, len(jobs), started)}"
            )
            if outcome.status == LOST:
                heard[jobs[place].number] = (MISSING, outcome.error or "")
    return heard


def _left(ended: int, jobs: int, started: float) -> str:
    """By how fast jobs ended until now, however many run at once."""
    if ended == jobs:
        return ""
    return f"; {jobs - ended} to go, about {duration((time.monotonic() - started) / ended * (jobs - ended))}"


def _launch_chosen(multirun: Multirun, stamp: str) -> int:
    """The jobs of a sweeper that chooses each by what the ones before gave: they make themselves known as they start."""
    engine_of(multirun, (0, ()))
    objective.check(multirun)
    multirun.check_left()
    config = without_hydra(multirun.config)
    home = attempts.experiment_folder(Path(config.results_dir).expanduser(), config.name)
    sweep = Sweep(stamp, home, now(), (), sweeper=multirun.sweeper)
    sweeps.write(sweep)
    say(f"sweep {stamp} of {home.name}: {multirun.sweeper} chooses its runs one after the other")
    with table_on_interrupt([sweep]), Live(None) as live, watching(live):
        multirun.sweep([f"{OF}={stamp}"], job)
    if line := objective.best(multirun, sweeps.outcomes(sweeps.read(home, stamp))):
        say(line)
    return ended([sweep], {})


def announced(stamp: str, jobs: Sequence[Planned]) -> list[str]:
    """What a sweep is, and a line for each job that is refused, before anything starts."""
    refused = [each for each in jobs if each.error is not None]
    runs = [each for each in jobs if each.error is None and each.job.same_as is None]
    done, same = sum(each.done for each in runs), len(jobs) - len(refused) - len(runs)
    parts = [f"{len(runs) - done} to do", f"{done} recorded already" * bool(done)]
    parts += [f"{len(refused)} refused" * bool(refused), f"{same} of the jobs the same as another" * bool(same)]
    head = f"sweep {stamp} of {', '.join(dict.fromkeys(each.home.name for each in jobs if each.home is not None))}"
    lines = [f"{head}: {len(runs) + len(refused)} runs: {', '.join(filter(None, parts))}"]
    return lines + [f"refused: {each.job.title}: {lines_of(each.error)}" for each in refused if each.error]


def job(config: DictConfig) -> str | float:
    """One Hydra job: the configuration becomes a run, the run a record. A job that is refused does not stop a sweep.

    Returns:
        The status of its record, or "refused"; the value of the metric sweep.objective, where one is named and has a value.
    """
    try:
        raw = compose.resolved(config)
        chosen(raw["launcher"])
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


def through_hydra(arguments: list[str], job: Callable[[DictConfig], Any]) -> None:
    """Every job that the arguments make, one after the other or as their launcher has it.

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    arguments = checked(arguments)
    with _arguments(arguments), compose.hydra_errors_explained():
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()


def checked(arguments: list[str]) -> list[str]:
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
