"""Wall times of several calls that take turns, so that a busy moment of the machine falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from ditbench.harness.common.devices import synchronize
from ditbench.harness.common.progress import progress


@torch.no_grad()
def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """{name: milliseconds of each counted call}. Warm-up calls, compilation among them, are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in progress(range(warmup + repeats), desc="bench"):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
