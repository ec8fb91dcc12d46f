"""launcher=ray: actors on a Ray cluster, or on one that is started for the sweep; each loads its models once. Where they stand on
several machines, results_dir and cache_dir have to be folders that all of them see.

An actor that dies (killed, its node gone) is replaced, and its job begins again from the cache's artifacts.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditbench.harness.common.devices import AUTO
from ditbench.harness.common.errors import UserError, first_words
from ditbench.harness.common.watch import say
from ditbench.harness.sweep.engines.base import (
    LOST,
    ON_CPU,
    Job,
    Outcome,
    do,
    least,
    library,
    number_or_auto,
    refuse_own_devices,
    settle,
)

ELSEWHERE = True


@dataclass(frozen=True)
class Settings:
    """address: of a running cluster ("auto": the one of this machine); null starts one here, which ends with the sweep.

    workers: auto is one for every `devices` GPUs of the cluster, without GPUs 2 or one a node; cpus: of a worker, and torch's threads;
    restarts: how often a job whose worker died begins again; runtime_env: as Ray takes it.
    """

    address: str | None = None
    workers: int | str = AUTO
    devices: int | str = AUTO
    cpus: int = 1
    restarts: int = 2
    runtime_env: dict[str, Any] = field(default_factory=dict)
    per_run: int = 1

    def __post_init__(self) -> None:
        number_or_auto(self, "workers", "devices")
        least(self, workers=1, devices=0, cpus=1, restarts=0)


def run(jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[int, Outcome]]:
    ray = library("ray", "ray")
    refuse_own_devices(jobs)
    connect(ray, settings)
    try:
        workers, devices = shared(ray, settings, len(jobs))
        say(f"Ray: {workers} workers, {settings.cpus} CPUs{f' and {devices} GPUs' * bool(devices)} each")
        yield from _ended(ray, jobs, settings, workers, devices)
    finally:
        ray.shutdown()


def connect(ray: Any, settings: Settings) -> None:
    """Raises UserError: no cluster answers at that address."""
    environment = dict(settings.runtime_env)
    # What is imported here is imported there: workers of a cluster that runs already know nothing of this process's path.
    variables = {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    environment["env_vars"] = variables | environment.get("env_vars", {})
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without GPUs is left with what it sees
    try:
        ray.init(
            address=settings.address or "local",
            runtime_env=environment,
            logging_level=logging.ERROR,
            include_dashboard=False if settings.address is None else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"launcher.address={settings.address}" if settings.address else "a cluster of this machine's own"
        raise UserError(f"launcher=ray: {where} does not start or answer ({first_words(error)})") from error


def shared(ray: Any, settings: Settings, jobs: int) -> tuple[int, int]:
    """(number of workers, GPUs of each) of what the cluster has."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    devices = min(1, gpus) if settings.devices == AUTO else int(settings.devices)
    workers = settings.workers
    if workers == AUTO:
        workers = gpus // devices if devices else max(ON_CPU, len(ray.nodes()))
    most = min(int(there.get("CPU", 0)) // settings.cpus, gpus // devices if devices else jobs)
    if most < 1:
        raise UserError(
            f"launcher=ray: a worker asks for {settings.cpus} CPUs and {devices} GPUs, the cluster has {int(there.get('CPU', 0))} and "
            f"{gpus}; set launcher.cpus and launcher.devices"
        )
    return max(1, min(int(workers), most, jobs)), devices


class Worker:
    """An actor: one process, which keeps what it has loaded."""

    def __init__(self, threads: int, workers: int) -> None:
        settle(threads, workers)

    def do(self, job: Job) -> Outcome:
        return do(job)


def _ended(
    ray: Any, jobs: Sequence[Job], settings: Settings, workers: int, devices: int
) -> Iterator[tuple[int, Outcome]]:
    """Each worker has one job at a time; whose worker died goes back to the end of the line."""
    kind = ray.remote(num_cpus=settings.cpus, num_gpus=devices)(Worker)
    waiting, begun = list(range(len(jobs))), dict.fromkeys(range(len(jobs)), 0)
    free = [kind.remote(settings.cpus, workers) for _ in range(workers)]
    busy: dict[Any, tuple[int, Any]] = {}
    while waiting or busy:
        while waiting and free:
            place, worker = waiting.pop(0), free.pop(0)
            begun[place] += 1
            busy[worker.do.remote(jobs[place])] = place, worker
        (ready,), _ = ray.wait(list(busy), num_returns=1)
        place, worker = busy.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayError as error:
            free.append(kind.remote(settings.cpus, workers))
            if begun[place] <= settings.restarts:
                say(f"{jobs[place].title}: its worker died; it begins again from what is kept")
                waiting.append(place)
                continue
            outcome = Outcome(LOST, f"its worker died {begun[place]} times ({first_words(error)})")
        else:
            free.append(worker)
        yield place, outcome
