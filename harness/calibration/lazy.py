"""A calibration that is recorded when somebody first asks for it: round-to-nearest never does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.memory import PeakMemory


class LazyCalibration:
    """Stands for the `Calibration` that `record` makes. key: which that has. saved_s, fits: where what the cache saves is noted."""

    derived, saved = Calibration.derived, Calibration.saved

    def __init__(
        self,
        key: str,
        cache: Path | None,
        record: Callable[[], Calibration],
        *,
        whole: str | None = None,
        saved_s: dict[str, float] | None = None,
        fits: dict[str, PeakMemory] | None = None,
    ) -> None:
        self.key, self.cache, self._record, self.whole = key, cache, record, whole
        self.saved_s: dict[str, float] = {} if saved_s is None else saved_s
        self.fits: dict[str, PeakMemory] = {} if fits is None else fits

    def with_own_notes(self) -> LazyCalibration:
        return LazyCalibration(self.key, self.cache, lambda: self._recording, whole=self.whole)

    @property
    def recorded(self) -> Calibration:
        """What it stands for, with its notes."""
        return replace(self._recording, saved_s=self.saved_s, fits=self.fits)

    @cached_property
    def _recording(self) -> Calibration:
        return self._record()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recording, name)
