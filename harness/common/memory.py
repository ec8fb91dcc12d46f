"""The most memory a stretch of code held (of the whole process on the CPU, of torch's allocator on a GPU), and what is free."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ditbench.harness.common.devices import functions_of, memory_of

PROCESS = Path("/proc/self")  # Linux only; elsewhere nothing is measured
MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of a container that sees its own limits (version 2)


@dataclass
class PeakMemory:
    """Bytes held when the stretch began and at most within it; None where the system or the device does not tell."""

    before_bytes: int | None = None
    peak_bytes: int | None = None


_measured: list[tuple[torch.device, PeakMemory]] = []  # stretches that have not ended, outermost first


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the body. The model and all that was there before are counted; `before_bytes` tells how much that was.

    A stretch within another starts the mark of the most that was held anew; the outer one keeps what was seen before.
    """
    functions = memory_of(device)
    if functions is None and device.type != "cpu":  # what the process holds is not what the device holds
        yield PeakMemory()
        return
    try:
        _keep_for_outer(device)
        if functions is not None:
            functions.reset_peak_memory_stats(device)
            found = PeakMemory(functions.memory_allocated(device))
        else:
            (PROCESS / "clear_refs").write_text("5")  # the high-water mark falls back to what is held now
            found = PeakMemory(_status_bytes("VmRSS"))
    except OSError:
        yield PeakMemory()
        return
    _measured.append((device, found))
    try:
        yield found
    finally:
        _measured.pop()
    found.peak_bytes = max(found.before_bytes or 0, found.peak_bytes or 0, _most_held(device))


def _keep_for_outer(device: torch.device) -> None:
    for of, outer in _measured:
        if of == device:
            outer.peak_bytes = max(outer.peak_bytes or 0, _most_held(device))


def _most_held(device: torch.device) -> int:
    """Since the mark was last set back. Raises OSError where the system does not tell."""
    functions = memory_of(device)
    if functions is not None:
        return int(functions.max_memory_allocated(device))
    return _status_bytes("VmHWM")  # the kernel counts in coarse steps: it may be below what was held before


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device now: of a GPU what its driver has and what torch's allocator holds unused; of the CPU
    what the system, and the group of processes that we are in, may still give. None where nobody tells.
    """
    functions = functions_of(device)
    if functions is not None and hasattr(functions, "mem_get_info"):
        unused = 0
        if hasattr(functions, "memory_reserved") and memory_of(device) is not None:
            unused = functions.memory_reserved(device) - functions.memory_allocated(device)
        return int(functions.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    told = [_line_bytes(MEMINFO, "MemAvailable"), _left_in_group()]
    return min((each for each in told if each is not None), default=None)


def _left_in_group() -> int | None:
    """Of a container's limit; what files keep in memory counts as free, as it does in MemAvailable."""
    try:
        limit, used = ((GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        lines = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(lines["inactive_file"]))
    except (OSError, ValueError, KeyError):  # "max" is no number: there is no limit
        return None


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
    found = _line_bytes(PROCESS / "status", field)
    if found is None:
        raise OSError(f"{PROCESS}/status has no {field}")
    return found


def _line_bytes(path: Path, field: str) -> int | None:
    """Of a line such as "VmRSS:  1234 kB"; None if there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found[0].split()[1]) if found else None
