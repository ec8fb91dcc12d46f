"""`ditbench run` under Hydra: one job or a sweep; a failed run does not stop the others; the comparison at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditbench.harness.common.errors import UserError, of_the_system, unknown_name
from ditbench.harness.common.paths import CONF
from ditbench.harness.records.record import Record
from ditbench.harness.report import comparison_table
from ditbench.harness.run import run, say
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep.launch import compose

# Of this process: Hydra does not hand back what a job returns in a sweep.
_done: list[Record] = []
_refused: list[UserError] = []  # jobs that left no record: a value that cannot be used, a model that is not there


def launch(arguments: list[str]) -> int:
    """Run what the arguments say → exit code (0, or 3 when a run failed).

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    from ditbench.harness.cli.main import EXIT_FAILED_RUNS

    compose.register()
    overrides = [a for a in arguments if ("=" in a or a.startswith("~")) and not a.startswith("-")]
    arguments = overrides + [a for a in arguments if a not in overrides]  # Hydra wants them in one piece
    compose.check_overrides(overrides)
    _done.clear()
    _refused.clear()
    with _arguments(arguments), _hydra_errors_explained():
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    if _done:
        print(comparison_table(_done))
    failed = [record for record in _done if record.status == "failed"]
    for record in failed:
        say(f"failed: {record.model} {record.method} {record.config['bits']['label']}: {record.error}")
    if _refused:
        *others, last = {str(error): error for error in _refused}.values()
        for error in others:
            say(f"ditbench: {error}")
        raise last
    return EXIT_FAILED_RUNS if failed else 0


def job(config: DictConfig) -> str:
    """One Hydra job: the configuration becomes a run, the run a record. A job that is refused does not stop a sweep."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    try:
        record = run(parse(values))  # type: ignore[arg-type]
    except UserError as error:
        _refused.append(error)
        return "refused"
    except OSError as error:
        _refused.append(of_the_system(error))
        return "refused"
    if record.folder not in [other.folder for other in _done]:
        _done.append(record)
    return record.status


def composed(jobs: Iterable[Iterable[str]]) -> list[dict[str, Any]]:
    """The resolved configuration that each job's overrides make; nothing is run.

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    compose.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"), _hydra_errors_explained():
        made = []
        for overrides in map(list, jobs):
            compose.check_overrides(overrides)
            config = hydra.compose("config", overrides)
            made.append(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        return made  # type: ignore[return-value]


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """Hydra reads the command line itself; HYDRA_FULL_ERROR makes it raise instead of printing and leaving."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["ditbench run", *arguments], "1"
    try:
        yield
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def _hydra_errors_explained() -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(error) from error


def _explained(error: Exception) -> UserError:
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        node, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
        if node is not None and key is not None and "not in struct" in str(cause):
            section = getattr(cause, "full_key", key).rpartition(".")[0]
            return unknown_name(f"setting of {section}" if section else "setting", str(key), map(str, node))
        if isinstance(cause, OverrideParseException):
            return compose.not_an_override(cause)
        if str(cause).startswith("Ambiguous value for argument"):
            return UserError(f"{str(cause).splitlines()[0]}: add -m to sweep over it, or write name=[a,b] for a list")
    return UserError(str(chain[-1]).strip().split("\n")[0] or str(error).split("\n")[0])
