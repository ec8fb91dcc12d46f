"""Wall time of each stage of a run, and one line to standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Timer:
    """`with timer("calibrate"): …` → seconds["calibrate"]."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = perf_counter() - start


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
