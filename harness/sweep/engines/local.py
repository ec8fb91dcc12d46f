"""launcher=local: one job after the other, in this process, which loads models once (`launch.py` itself does it)."""

from __future__ import annotations

from dataclasses import dataclass

from ditbench.harness.common.errors import UserError

ELSEWHERE = False


@dataclass(frozen=True)
class Settings:
    per_run: int = 1

    def __post_init__(self) -> None:
        if self.per_run > 1:
            raise UserError(f"launcher.per_run={self.per_run}: launcher=local is one process; choose launcher=joblib")
