"""Drawing into a store with a sampler that only paints each sample's seed, in this process or in one that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from ditbench.harness.common.artifacts import Address
from ditbench.harness.generation.generate import draw
from ditbench.harness.models.base import Drawn, Sampler
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.store import SampleStore, open_store

PIECE, SECONDS = 2, 0.05


def wanted(n: int) -> Conditions:
    return Conditions(tuple(range(n)), torch.arange(n) % 3)


def store_in(cache: Path, n: int, latents: bool = True) -> SampleStore:
    return open_store(Address(cache, "samples", "b" * 32, "painted seeds"), wanted(n), lambda: PIECE, latents)


def painted(seeds: tuple[int, ...]) -> Drawn:
    """One grey level per seed."""
    levels = torch.tensor(seeds, dtype=torch.float32) / 127.5 - 1
    return Drawn(levels.view(-1, 1, 1, 1).expand(-1, 2, 2, 2), levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8))


def draw_all(store: SampleStore, n: int, log: Path | None = None, seconds: float = 0.0) -> None:
    def sample(pipe, transformer, part, sampler, on_call, correct):
        if log is not None:
            with log.open("a") as file:
                file.write(f"{part.seeds[0] // PIECE} {os.getpid()}\n")
        time.sleep(seconds)
        return painted(part.seeds)

    transformer = SimpleNamespace(clock=StepClock(1))
    model = SimpleNamespace(adapter=SimpleNamespace(sample=sample), pipe=None)
    draw(model, lambda: transformer, wanted(n), Sampler("any", 1, 1.0), store)


def process_that_draws(cache: Path, n: int, log: Path) -> multiprocessing.Process:
    """Started; a fork, which needs not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=lambda: draw_all(store_in(cache, n), n, log, SECONDS))
    process.start()
    return process  # type: ignore[return-value]
