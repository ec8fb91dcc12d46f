"""launcher=joblib: several processes on this machine, each with devices of its own; each loads its models once (loky's workers
stay for all jobs).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
from filelock import FileLock, Timeout

from ditbench.harness.common.devices import AUTO, visible_devices
from ditbench.harness.common.errors import reason
from ditbench.harness.common.interrupts import Terminated
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

ELSEWHERE = False
ROUNDS = (False, False, True)  # alone: when workers have died twice, each job that is left has one to itself
DIED = "its worker died (killed, or out of memory)"
_place: FileLock | None = None  # of this process, if it is a worker


@dataclass(frozen=True)
class Settings:
    """workers: auto is one for every `devices` devices, on a CPU 2; threads: of torch in each worker, auto shares out the cores."""

    workers: int | str = AUTO
    devices: int = 1
    threads: int | str = AUTO
    per_run: int = 1

    def __post_init__(self) -> None:
        number_or_auto(self, "workers", "threads")
        least(self, workers=1, devices=1, threads=1)


@dataclass(frozen=True)
class Share:
    """What the workers share out: each takes the first place that is free, and keeps it until it ends.

    devices: of each place, as CUDA_VISIBLE_DEVICES takes them; empty where there are none.
    """

    folder: str
    devices: tuple[str, ...]
    threads: int
    workers: int


def run(jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[int, Outcome]]:
    library("joblib", "joblib")
    refuse_own_devices(jobs)
    with tempfile.TemporaryDirectory(prefix="ditbench-workers-") as folder:
        left = dict(enumerate(jobs))
        workers, share = shared(settings, len(jobs), folder, any(job.raw["device"] == "cpu" for job in jobs))
        say(f"joblib: {workers} workers, {share.threads} threads each{_devices_of(share)}")
        for alone in ROUNDS:
            batches = [[each] for each in left] if alone else [list(left)]
            for batch in batches:
                for place, outcome in _round({place: left[place] for place in batch}, workers, share):
                    del left[place]
                    yield place, outcome
            if left and not alone:
                say(f"joblib: a worker died; {len(left)} jobs without an outcome begin again from what is kept")
            if not left:
                return
        for place in left:
            yield place, Outcome(LOST, DIED)


def _round(jobs: dict[int, Job], workers: int, share: Share) -> Iterator[tuple[int, Outcome]]:
    """What these workers bring back; they are gone afterwards, and where one dies nothing more comes."""
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    pool = Parallel(n_jobs=workers, batch_size=1, pre_dispatch="1.5 * n_jobs", return_as="generator_unordered")
    try:
        yield from pool(delayed(_in_worker)(place, job, share) for place, job in jobs.items())
    except BrokenProcessPool:
        return
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def shared(settings: Settings, jobs: int, folder: str, on_cpu: bool = False) -> tuple[int, Share]:
    """(number of workers, what each place has)."""
    there = [] if on_cpu else visible_devices()
    devices = [
        ",".join(there[first : first + settings.devices])
        for first in range(0, len(there) - settings.devices + 1, settings.devices)
    ]
    workers = (len(devices) or ON_CPU) if settings.workers == AUTO else int(settings.workers)
    workers = min(workers, jobs)
    if devices:  # more workers than devices share them, in turn
        devices = [devices[place % len(devices)] for place in range(workers)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(cores // workers, torch.get_num_threads())) if settings.threads == AUTO else settings.threads
    return workers, Share(folder, tuple(devices), int(threads), workers)


def _in_worker(place: int, job: Job, share: Share) -> tuple[int, Outcome]:
    try:
        take_place(share)
        return place, do(job)
    except Terminated:
        return place, Outcome(LOST, "its worker was asked to end (SIGTERM)")
    except Exception as error:  # of taking a place; `do` has an outcome for its own
        return place, Outcome(LOST, reason(error))


def take_place(share: Share) -> None:
    """Once in a worker's life, before anything asks for a device."""
    global _place
    if _place is not None:
        return
    number = 0
    while _place is None:
        lock = FileLock(Path(share.folder) / f"{number}.lock")
        try:
            lock.acquire(timeout=0)
            _place = lock
        except Timeout:
            number += 1
    if share.devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = share.devices[number % len(share.devices)]
    Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    settle(share.threads, share.workers)


def end_with(parent: int, every_s: float = 1.0) -> None:
    """End this process soon after its parent, however that ended: killed, it could not end its workers."""
    while os.getppid() == parent:
        time.sleep(every_s)
    os._exit(1)  # as if it were killed too: whatever it is at, the next one goes on from what is kept


def _devices_of(share: Share) -> str:
    return f", devices {' | '.join(share.devices)}" if share.devices else ""
