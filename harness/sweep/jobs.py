"""The jobs of a sweep, before anybody carries them out: checked, each run once, and the engine that all of them name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ditbench.harness.common.devices import AUTO
from ditbench.harness.common.errors import UserError
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.identity import title
from ditbench.harness.sweep.engines.base import Job, chosen

LAUNCHER = "launcher"


def engine_of(raws: Sequence[Mapping[str, Any]]) -> tuple[ModuleType, Any]:
    """The one engine that all jobs name, and its settings; an experiment's file may name it as well as the command.

    Raises:
        UserError: they name several, or one that cannot be used.
    """
    named = [raw[LAUNCHER] for raw in raws]
    different = next((each for each in named if each != named[0]), None)
    if different is not None:
        raise UserError(
            f"launcher: the jobs of a sweep are carried out by one, got {_said(named[0])} and {_said(different)}; write "
            "launcher=… on the command line, once"
        )
    return chosen(named[0])


def job_of(raw: Mapping[str, Any], elsewhere: bool) -> Job:
    """A resolved configuration as a job, without its launcher: who carries it out is no part of a run.

    elsewhere: its device need not be here.

    Raises:
        UserError: a value that no part of ditbench can use.
    """
    device = raw["device"]
    values = {name: value for name, value in raw.items() if name != LAUNCHER}
    config = parse(values | {"device": AUTO} if elsewhere else values)
    return Job(config.raw | {"device": device}, title(config), os.getcwd())


def prepared(raws: Iterable[Mapping[str, Any]], elsewhere: bool) -> tuple[list[Job], list[UserError]]:
    """(the jobs, each run once, and why others are refused)."""
    jobs: dict[str, Job] = {}
    refused = []
    for raw in raws:
        try:
            job = job_of(raw, elsewhere)
            jobs.setdefault(json.dumps(job.raw, sort_keys=True), job)
        except UserError as error:
            refused.append(error)
    return list(jobs.values()), refused


def _said(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in section.items() if value is not None)
