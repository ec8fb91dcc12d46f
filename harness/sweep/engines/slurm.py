"""launcher=slurm: an array of jobs, by submitit. Each task is a process of its own; what they share lies in the cache, so results_dir
and cache_dir have to be folders that every node sees.

A task that SLURM stops (preempted, requeued, out of time) goes on from the cache's artifacts when it runs again: nothing of a run's
progress is in the task. A minute and a half before its time is over SLURM sends SIGUSR2, and the task has itself requeued.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any

import torch

from ditbench.harness.common.devices import AUTO
from ditbench.harness.common.errors import UserError, first_words
from ditbench.harness.common.watch import say
from ditbench.harness.sweep.engines.base import (
    LOST,
    Job,
    Outcome,
    do,
    least,
    library,
    number_or_auto,
    refuse_own_devices,
)

ELSEWHERE = True
ASKED_EVERY_S = 5.0
GRACE_S = 30.0  # from when a task has left the queue until what it wrote must be seen: shared folders are late
ENDED_WELL = ("COMPLETED", "")


@dataclass(frozen=True)
class Settings:
    """What sbatch is told; null: as the site has it. devices: GPUs of a task, auto is 1 where the partition has any.

    folder: of scripts and logs; sbatch: more of its options by their long names, such as {nice: 100, reservation: x}; setup: lines
    of the script before Python starts; requeues: how often a task may be requeued because its time was over.
    """

    folder: str
    partition: str | None = None
    time: str | int | None = None
    account: str | None = None
    qos: str | None = None
    array_parallelism: int | None = None
    devices: int | str = AUTO
    cpus: int | None = None
    memory: str | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    requeues: int = 3
    per_run: int = 1

    def __post_init__(self) -> None:
        number_or_auto(self, "devices")
        least(self, devices=0, cpus=1, array_parallelism=1, requeues=0)


@dataclass(frozen=True)
class Task:
    """What a task of the array calls."""

    job: Job
    threads: int | None
    requeues: int

    def __call__(self) -> Outcome:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit would ignore it; so `do` hears it, and ends
        signal.signal(signal.SIGUSR2, self.out_of_time)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return do(self.job)

    def out_of_time(self, number: int, frame: object) -> None:
        """Requeue this task and end. It may not be requeued without end: a run may never get far enough to keep something."""
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < self.requeues:
            say(f"{self.job.title}: its time is over; requeued, it goes on from what is kept")
            subprocess.run(["scontrol", "requeue", own_task()], check=False)
        raise KeyboardInterrupt


def own_task() -> str:
    array, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{place}" if array else os.environ["SLURM_JOB_ID"]


def run(jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[int, Outcome]]:
    submitit = library("submitit", "slurm")
    refuse_own_devices(jobs)
    tasks = submitted(submitit, jobs, settings)
    array = tasks[0].job_id.partition("_")[0]
    say(f"SLURM: job {array}, {len(tasks)} tasks; logs in {settings.folder}; `scancel {array}` ends them")
    try:
        yield from _ended(tasks, array)
    except KeyboardInterrupt:
        say(f"SLURM: the tasks of job {array} go on without this process; `scancel {array}` ends them")
        raise


def submitted(submitit: Any, jobs: Sequence[Job], settings: Settings) -> list[Any]:
    """One array of tasks.

    Raises:
        UserError: there is no SLURM here, or it refuses the array.
    """
    try:
        executor = submitit.SlurmExecutor(folder=Path(settings.folder).expanduser().absolute())
    except RuntimeError as error:
        raise UserError(
            "launcher=slurm: no srun on this machine; start the sweep where SLURM's commands are, or choose another launcher"
        ) from error
    executor.update_parameters(**options(settings))
    try:
        return executor.submit_array([Task(job, settings.cpus, settings.requeues) for job in jobs])
    except (submitit.core.utils.FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines() or [first_words(error)]
        raise UserError(
            f"launcher=slurm: sbatch refused the sweep ({said[-1].removeprefix('sbatch: error: ')})"
        ) from error


def options(settings: Settings) -> dict[str, Any]:
    """As submitit takes them. The limit of time is passed on as it is written: submitit knows minutes only."""
    devices = (1 if has_gpus(settings.partition) else 0) if settings.devices == AUTO else settings.devices
    more = {"requeue": True} | ({"time": settings.time} if settings.time is not None else {})
    named = {
        "job_name": "ditbench",
        "wckey": None,
        "time": None,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "mem": settings.memory,
        "cpus_per_task": settings.cpus,
        "gpus_per_node": devices or None,
        "setup": settings.setup or None,
        "additional_parameters": more | {name.replace("_", "-"): value for name, value in settings.sbatch.items()},
    }
    if settings.array_parallelism is not None:
        named["array_parallelism"] = settings.array_parallelism
    return named


def has_gpus(partition: str | None) -> bool:
    """Of the partition, or of the one that SLURM takes where none is named (it has a star)."""
    where = ["--partition", partition] if partition else []
    told = _asked("sinfo", "--noheader", "--format=%P %G", *where)
    lines = [line.split(maxsplit=1) for line in told.splitlines() if len(line.split()) > 1]
    return any("gpu" in devices for name, devices in lines if partition or name.endswith("*"))


def _ended(tasks: Sequence[Any], array: str) -> Iterator[tuple[int, Outcome]]:
    """The outcome of each task, once it is there; lost: SLURM does not know the task any more, and there is none."""
    left = dict(enumerate(tasks))
    gone: dict[int, float] = {}
    while left:
        known = in_queue(array)
        for place, task in list(left.items()):
            if (outcome := _brought(task)) is None and known is not None and task.job_id not in known:
                state = state_of(task.job_id)
                gone[place] = gone.get(place, -ASKED_EVERY_S) + ASKED_EVERY_S
                if gone[place] >= (GRACE_S if state in ENDED_WELL else ASKED_EVERY_S):
                    said = f"says {state}" if state else "does not know the task any more"
                    outcome = Outcome(LOST, f"SLURM {said}; log {task.paths.stderr}")
            else:
                gone.pop(place, None)
            if outcome is not None:
                del left[place]
                yield place, outcome
        if left:
            sleep(ASKED_EVERY_S)


def _brought(task: Any) -> Outcome | None:
    if not task.paths.result_pickle.exists():
        return None
    with suppress(EOFError, FileNotFoundError):
        exception = task.exception()
        return task.result() if exception is None else Outcome(LOST, first_words(exception))
    return None


def in_queue(array: str) -> set[str] | None:
    """The tasks of an array that wait or run, as ARRAY_PLACE; None if SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%F %K", "--jobs", array]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode and "Invalid job id" not in told.stderr:
        return None
    pairs = [line.split() for line in told.stdout.splitlines() if len(line.split()) == 2]
    return {job if place == "N/A" else f"{job}_{place}" for job, place in pairs}


def state_of(task: str) -> str:
    """In a word of SLURM's: CANCELLED, TIMEOUT, NODE_FAIL, …; empty where it does not know any more."""
    told = _asked("scontrol", "--oneliner", "show", "job", task)
    states = [each.partition("=")[2] for each in told.split() if each.startswith("JobState=")]
    return states[-1] if states else ""


def _asked(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
