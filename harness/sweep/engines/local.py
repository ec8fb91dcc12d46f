"""launcher=local: one job after the other, in this process; models are loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ditbench.harness.common.errors import UserError
from ditbench.harness.sweep.engines.base import Job, Outcome, do

ELSEWHERE = False


@dataclass(frozen=True)
class Settings:
    per_run: int = 1

    def __post_init__(self) -> None:
        if self.per_run > 1:
            raise UserError(f"launcher.per_run={self.per_run}: launcher=local is one process; choose launcher=joblib")


def run(jobs: Sequence[Job], settings: Settings) -> Iterator[tuple[int, Outcome]]:
    for place, job in enumerate(jobs):
        yield place, do(job)
