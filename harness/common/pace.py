"""How far something is and when it ends, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Pace:
    """Of one part of a run: seen at `started` when `first` of `total` units were there, now at `done`.

    Times are seconds of one clock. What was there at first (drawn by an earlier process) does not count as fast.
    """

    started: float
    now: float
    first: float
    done: float
    total: float | None
    unit: str

    @property
    def rate(self) -> float | None:
        """Units a second; None while nothing can be said."""
        seconds, units = self.now - self.started, self.done - self.first
        return units / seconds if seconds > 0 and units > 0 else None

    @property
    def left_s(self) -> float | None:
        if self.rate is None or self.total is None:
            return None
        return max(self.total - self.done, 0) / self.rate

    def __str__(self) -> str:
        """640/3,840 img·step, 412/s, 8 s left"""
        count = f"{self.done:,.0f}" + (f"/{self.total:,.0f}" if self.total is not None else "")
        parts = [count if self.unit == "it" else f"{count} {self.unit}"]
        if self.total is not None and self.done >= self.total:
            return parts[0]
        if self.rate is not None:
            parts.append(f"{self.rate:,.0f}/s" if self.rate >= 10 else f"{self.rate:.2g}/s")
        if self.left_s is not None:
            parts.append(f"{duration(self.left_s)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """45 s, 3:20 min, 2:05 h, 4 days"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole / 86400:.0f} days"
