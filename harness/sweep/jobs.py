"""The jobs of a sweep, looked at before any of them starts: which runs they are, which are recorded already, which are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from ditbench.harness.common.devices import AUTO
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import own_configurations
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.records import attempts, sweeps
from ditbench.harness.records.record import failed_metrics
from ditbench.harness.records.sweeps import Job, Sweep
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.evaluate import refuse_skipped_metrics
from ditbench.harness.stages.identity import run_id, title
from ditbench.harness.sweep.compose import resolved
from ditbench.harness.sweep.multirun import Multirun

OF, JOB = "sweep.of", "sweep.job"


@dataclass
class Planned:
    """A job, and what is known of it here. home: None where its name cannot be an experiment's. config: as composed. run: None of a
    refused one. done: it is recorded already.
    """

    job: Job
    home: Path | None
    config: DictConfig
    run: RunConfig | None = None
    error: UserError | None = None
    done: bool = False

    @property
    def to_do(self) -> bool:
        return self.run is not None and not self.done and self.job.same_as is None


def planned(multirun: Multirun, stamp: str, jobs: Mapping[int, Iterable[str]], here: bool) -> list[Planned]:
    """jobs: {number: overrides}; here: whether they run on this machine. Each is composed once; no weights are loaded.

    Raises:
        UserError: one cannot be composed.
    """
    found: list[Planned] = []
    models: dict[str, LoadedModel | None] = {}
    first: dict[tuple[Path | None, str], int] = {}
    for number, overrides in jobs.items():
        given = (*overrides, f"{OF}={stamp}", f"{JOB}={number}")
        config = multirun.composed(number, given)
        each = _looked_at(Job(number, tuple(overrides), ""), config, models, here)
        found.append(each)
        if each.job.run_id is not None:
            before = first.setdefault((each.home, each.job.run_id), number)
            each.job = replace(each.job, same_as=before if before != number else None)
    return found


def _looked_at(job: Job, config: DictConfig, models: dict[str, LoadedModel | None], here: bool) -> Planned:
    raw = resolved(without_hydra(config))
    home = None
    try:
        home = attempts.experiment_folder(Path(str(raw["results_dir"])).expanduser(), str(raw["name"]))
        run, device_is_here = parsed(raw, here)
        if (key := repr(run.model)) not in models:
            models[key] = _bare(run.model)
        model = models[key]
        if model is not None and device_is_here and run.strict:
            refuse_skipped_metrics(run, model)
    except UserError as error:
        return Planned(replace(job, title=_title(raw), refused=str(error)), home, config, error=error)
    job = replace(job, title=title(run))
    if model is None or not device_is_here:
        return Planned(job, home, config, run)
    job = replace(job, run_id=(its_id := run_id(run, model)))
    done = attempts.finished(run.results_dir, run.name, its_id)
    is_done = done is not None and not failed_metrics(done) and not run.force
    return Planned(replace(job, before=sweeps.attempts_before(home, its_id)), home, config, run, done=is_done)


def parsed(raw: dict[str, Any], here: bool) -> tuple[RunConfig, bool]:
    """The job's run, and whether its device is one of this machine. here: whether it runs on this machine; one that does not may
    ask for a device that only its own machine has.

    Raises:
        UserError: a value that cannot be used.
    """
    try:
        return parse(raw), here or raw["device"] != AUTO
    except UserError:
        if here:
            raise
        run = parse(raw | {"device": AUTO})  # raises the same if it is not about the device
        try:
            device = torch.device(str(raw["device"]))
            return replace(run, raw=run.raw | {"device": raw["device"]}, device=device), False
        except RuntimeError:
            pass
        raise


def parse_job(raw: dict[str, Any]) -> RunConfig:
    """The run of a job where it is carried out; if it is refused there (its device is not), that is noted beside the sweep.

    Raises:
        UserError: a value that cannot be used.
    """
    try:
        return parse(raw)
    except UserError as error:
        of, number = raw["sweep"]["of"], raw["sweep"]["job"]
        if of is not None and number is not None:
            home = attempts.experiment_folder(Path(raw["results_dir"]).expanduser(), raw["name"])
            sweeps.say_of_job((home, of), Job(number, (), _title(raw), refused=str(error)))
        raise


def manifests(multirun: Multirun, stamp: str, started: str, jobs: list[Planned]) -> list[Sweep]:
    """One for every experiment that a job belongs to."""
    folders = tuple(map(str, own_configurations()))
    of_sweep = {"hydra": tuple(multirun.hydra_overrides), "config_dirs": folders, "sweeper": multirun.sweeper}
    made = []
    for home in dict.fromkeys(each.home for each in jobs if each.home is not None):
        its = [each for each in jobs if each.home == home]
        force = any(each.run is not None and each.run.force for each in its)
        made.append(Sweep(stamp, home, started, tuple(each.job for each in its), force, **of_sweep))
    return made


def without_hydra(config: DictConfig) -> DictConfig:
    copied = config.copy()
    with open_dict(copied):
        copied.pop("hydra", None)
    return copied


def _bare(spec: ModelSpec) -> LoadedModel | None:
    """None where there is no model without its weights: the run itself will know."""
    try:
        return skeleton(spec)
    except Exception:
        return None


def _title(raw: dict[str, Any]) -> str:
    """Of a configuration that cannot be used."""
    names = [
        raw.get(section, {}).get(name) for section, name in (("model", "name"), ("method", "name"), ("bits", "label"))
    ]
    return " ".join(str(name) for name in names)
