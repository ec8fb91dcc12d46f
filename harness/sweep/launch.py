"""`ditbench run` under Hydra: one job or a sweep; a failed run does not stop the others; the comparison at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ditbench.harness.common.errors import EXIT_FAILED_RUNS, UserError, lines_of
from ditbench.harness.common.paths import CONF
from ditbench.harness.common.watch import say
from ditbench.harness.records.record import read
from ditbench.harness.report import comparison_table
from ditbench.harness.sweep import compose
from ditbench.harness.sweep.engines.base import FAILED, LOST, REFUSED, outcomes
from ditbench.harness.sweep.jobs import engine_of, prepared
from ditbench.harness.sweep.overrides import check_flags


def launch(arguments: list[str]) -> int:
    """Run what the arguments say → exit code (0, or 3 when a run failed or never came back).

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    configs: list[DictConfig] = []
    through_hydra(arguments, lambda config: configs.append(config) or "listed")
    if not configs:
        return 0  # Hydra was asked for something else, such as --cfg job
    raws = [compose.resolved(config) for config in configs]
    engine, settings = engine_of(raws)
    jobs, cannot = prepared(raws, engine.ELSEWHERE)
    refused = [str(error) for error in cannot]
    if jobs and refused:
        for error in dict.fromkeys(refused):
            say(f"ditbench: {lines_of(UserError(error))}; the other jobs run")
    ended = dict(outcomes(engine, settings, jobs)) if jobs else {}
    found = {each.folder: read(Path(each.folder) / "record.json") for _, each in sorted(ended.items()) if each.folder}
    if found:
        print(comparison_table(list(found.values())))
    for record in found.values():
        if record.status == "failed":
            label = (record.config.get("bits") or {}).get("label", "–")
            say(f"failed: {record.model} {record.method} {label}: {record.error}")
    lost = [place for place, each in ended.items() if each.status == LOST]
    for place in sorted(lost):
        say(f"lost: {jobs[place].title}: {ended[place].error}; the same command does what is missing")
    refused += [str(each.error) for _, each in sorted(ended.items()) if each.status == REFUSED]
    if refused:
        *others, last = dict.fromkeys(refused)
        for error in others:
            say(f"ditbench: {lines_of(UserError(error))}")
        raise UserError(last)
    failed = any(each.status == FAILED for each in ended.values())
    return EXIT_FAILED_RUNS if failed or lost else 0


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
