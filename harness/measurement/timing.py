"""Wall times of several calls that take turns, so that a busy moment of the machine falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from ditbench.harness.common.devices import synchronize
from ditbench.harness.common.progress import progress


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """{name: milliseconds of each counted call}. Warm-up calls, compilation among them, are not counted."""
    each = {name: timed(call, device) for name, call in calls.items()}
    return in_turns(each, repeats=repeats, warmup=warmup, title="bench")


def timed(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """The call as one that says how many seconds it took."""

    def seconds() -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return seconds


@torch.no_grad()
def in_turns(
    calls: Mapping[str, Callable[[], float]], *, repeats: int, warmup: int, title: str
) -> dict[str, list[float]]:
    """calls: each says how many seconds it took → {name: milliseconds of each counted turn}."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in progress(range(warmup + repeats), desc=title):
        for name, seconds in calls.items():
            elapsed = seconds()
            if turn >= warmup:
                times[name].append(1e3 * elapsed)
    return times
