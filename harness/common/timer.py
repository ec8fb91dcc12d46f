"""Wall time of each stage of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from ditbench.harness.common import watch


@dataclass
class Timer:
    """`with timer("calibrate"): …` → seconds["calibrate"]."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        watch.stage(stage)
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = perf_counter() - start
