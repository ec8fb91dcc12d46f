"""The most memory a stretch of code held: of the whole process on the CPU, of torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ditbench.harness.common.devices import memory_of

PROCESS = Path("/proc/self")  # Linux only; elsewhere nothing is measured


@dataclass
class PeakMemory:
    """Bytes held when the stretch began and at most within it; None where this system does not tell."""

    before_bytes: int | None = None
    peak_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the body. The model and all that was there before are counted; `before_bytes` tells how much that was."""
    functions = memory_of(device)
    if functions is not None:
        functions.reset_peak_memory_stats(device)
        found = PeakMemory(functions.memory_allocated(device))
        yield found
        found.peak_bytes = functions.max_memory_allocated(device)
        return
    try:
        (PROCESS / "clear_refs").write_text("5")  # the high-water mark falls back to what is held now
        found = PeakMemory(_status_bytes("VmRSS"))
    except OSError:
        yield PeakMemory()
        return
    yield found
    found.peak_bytes = max(found.before_bytes or 0, _status_bytes("VmHWM"))  # the kernel counts in coarse steps


def trim() -> None:
    """Give memory that the process no longer uses back to the system.

    glibc keeps the holes that temporaries leave between tensors that stay. They are most of what is held where a model is
    rebuilt layer by layer through float64.
    """
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, not of musl
        if release is not None:
            release(0)


def _status_bytes(field: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
