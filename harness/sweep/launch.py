"""`ditbench run` under Hydra: one job or a sweep; a failed run does not stop the others; the comparison at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from ditbench.harness.common.errors import EXIT_FAILED_RUNS, UserError, lines_of, of_the_system
from ditbench.harness.common.paths import CONF
from ditbench.harness.common.watch import say
from ditbench.harness.records.record import Record
from ditbench.harness.report import comparison_table
from ditbench.harness.run import run
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep import compose
from ditbench.harness.sweep.overrides import check_flags

# Of this process: Hydra does not hand back what a job returns in a sweep.
_done: list[Record] = []
_refused: list[UserError] = []  # jobs that left no record: a value that cannot be used, a model that is not there


def launch(arguments: list[str]) -> int:
    """Run what the arguments say → exit code (0, or 3 when a run failed).

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    _done.clear()
    _refused.clear()
    through_hydra(arguments, job)
    if _done:
        print(comparison_table(_done))
    failed = [record for record in _done if record.status == "failed"]
    for record in failed:
        say(
            f"failed: {record.model} {record.method} {(record.config.get('bits') or {}).get('label', '–')}: {record.error}"
        )
    if _refused:
        *others, last = {str(error): error for error in _refused}.values()
        for error in others:
            say(f"ditbench: {lines_of(error)}")
        raise last
    return EXIT_FAILED_RUNS if failed else 0


def through_hydra(arguments: list[str], job: Callable[[DictConfig], str]) -> None:
    """Every job that the arguments make, one after the other or as their launcher has it.

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    compose.register()
    overrides = [a for a in arguments if ("=" in a or a.startswith("~")) and not a.startswith("-")]
    arguments = overrides + [a for a in arguments if a not in overrides]  # Hydra wants them in one piece
    compose.check_overrides(overrides)
    check_flags(arguments)
    with _arguments(arguments), compose.hydra_errors_explained():
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()


def job(config: DictConfig) -> str:
    """One Hydra job: the configuration becomes a run, the run a record. A job that is refused does not stop a sweep."""
    try:
        record = run(parse(compose.resolved(config)))
    except UserError as error:
        _refused.append(error)
        return "refused"
    except OSError as error:
        _refused.append(of_the_system(error))
        return "refused"
    if record.folder not in [other.folder for other in _done]:
        _done.append(record)
    return record.status


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
