"""Other libraries in a benchmark: each in a process of its own, which answers when it is its turn and sleeps otherwise.

A process has the model of the benchmark's configuration, made again there (with the same weights: they are read or drawn from a seed).
What happens in it is told over a pipe, in Python's own values; a process that dies, or an engine that raises, costs its rows.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from ditbench.harness.bench.engines.base import Engine, Rival, Work, known_engines
from ditbench.harness.bench.profiles import Profile
from ditbench.harness.common.devices import synchronize
from ditbench.harness.common.errors import reason
from ditbench.harness.common.watch import say

MOST = 200  # characters of a reason
STOP_S = 10.0


@dataclass(frozen=True)
class Job:
    """raw: the configuration of a run. layers: what ours quantizes. See `engines.base.Work`."""

    engine: str
    raw: dict[str, Any]
    layers: tuple[str, ...]
    modes: tuple[str, ...]
    threads: int


@dataclass
class Remote:
    """A rival in another process, as the benchmark sees it. why: it no longer runs."""

    label: str
    mode: str
    engine: str
    held_bytes: int | None
    index: int
    connection: Connection = field(repr=False)
    why: str | None = None
    can_profile: bool = False

    def output(self, batch: int) -> torch.Tensor | None:
        """The prediction for the inputs of so many rows, float32; None if it failed."""
        found = self._ask("output", batch)
        return None if found is None else torch.from_numpy(found)

    def seconds(self, batch: int) -> float:
        """Of one call, as its own process measures it; NaN if it failed."""
        found = self._ask("seconds", batch)
        return math.nan if found is None else found

    def profile(self, batch: int) -> Profile | None:
        """Where the time of a call of its own went; None if it failed."""
        return self._ask("profile", batch)

    def _ask(self, what: str, batch: int) -> Any:
        if self.why is not None:
            return None
        try:
            self.connection.send((what, self.index, batch))
            ended, found = self.connection.recv()
        except (EOFError, OSError):
            ended, found = False, "its process ended"
        if not ended:
            self.why = found
        return found if ended else None


@contextmanager
def workers(jobs: Sequence[Job], device: torch.device, refused: dict[str, str]) -> Iterator[list[Remote]]:
    """Start them, one after the other → what they can run. Engines that cannot are named in refused, with the reason."""
    why = {job.engine: known_engines()[job.engine].unavailable(device) for job in jobs}
    refused |= {name: each for name, each in why.items() if each is not None}
    context = multiprocessing.get_context("spawn")  # a fork would share the locks of torch's threads
    started: list[tuple[Any, Connection]] = []
    remotes: list[Remote] = []
    try:
        for job in jobs:
            if job.engine in refused:
                continue
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, job), daemon=True)
            say(f"bench: {job.engine} starts, in a process of its own")
            process.start()
            theirs.close()
            started.append((process, ours))
            remotes += _greeted(job, ours, refused)
        yield remotes
    finally:
        for process, connection in started:
            _stop(process, connection)


def _greeted(job: Job, connection: Connection, refused: dict[str, str]) -> list[Remote]:
    try:
        well, found = connection.recv()
    except EOFError:
        well, found = False, "its process ended before it could run anything"
    if not well:
        refused[job.engine] = found
        return []
    return [
        Remote(label, mode, job.engine, held, index, connection, can_profile=can_profile)
        for index, (label, mode, held, can_profile) in enumerate(found)
    ]


def _stop(process: Any, connection: Connection) -> None:
    with suppress(OSError):  # it may have ended
        connection.send(None)
    process.join(STOP_S)
    if process.is_alive():
        process.kill()
        process.join()
    connection.close()


def serve(connection: Connection, job: Job) -> None:
    """What a process does: make the engine's models, then answer until it is told to end."""
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    try:
        inputs, device, rivals = _made(job)
    except Exception as error:
        connection.send((False, reason(error)[:MOST]))
        return
    told = [(rival.label, rival.mode, rival.held_bytes, rival.profile is not None) for rival in rivals]
    connection.send((True, told))
    try:
        while (asked := connection.recv()) is not None:
            connection.send(answer(asked, inputs, device, rivals))
    except (EOFError, KeyboardInterrupt):
        return  # whoever asked is gone


def _made(job: Job) -> tuple[Any, torch.device, list[Rival]]:
    from ditbench.harness.stages.config import parse
    from ditbench.harness.stages.loaded import model_of
    from ditbench.harness.stages.quantize import target_of

    engine: Engine = known_engines()[job.engine]
    config = parse(job.raw)
    model = model_of(config.model)

    @cache  # text encoders may run for them
    def inputs(batch: int) -> dict[str, Any]:
        return model.step_inputs(batch, config.device)

    work = Work(target_of(config, model), job.layers, (inputs(2), inputs(3)), config.device, job.modes, job.threads)
    return inputs, config.device, list(engine.rivals(work))


def answer(asked: tuple[str, int, int], inputs: Any, device: torch.device, rivals: Sequence[Rival]) -> tuple[bool, Any]:
    """asked: ("output", "seconds" or "profile", which rival, how many rows) → (True, the array, the seconds or the profile), or
    (False, why not).
    """
    what, index, batch = asked
    try:
        arguments = inputs(batch)
        if what == "profile":
            profile = rivals[index].profile
            assert profile is not None
            return True, profile(arguments)
        synchronize(device)
        start = time.perf_counter()
        y = rivals[index].call(arguments)
        synchronize(device)
        seconds = time.perf_counter() - start
        return True, seconds if what == "seconds" else np.ascontiguousarray(y.float().cpu().numpy())
    except Exception as error:
        return False, reason(error)[:MOST]
