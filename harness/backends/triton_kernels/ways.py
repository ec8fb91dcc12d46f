"""Which of several ways to launch a kernel a device takes: tried at the first call of a kind, remembered after it.

Whether a tile fits is known only when it is compiled: shared memory depends on the chip, the compiler's release, the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from ditbench.harness.common.errors import UserError

Way = TypeVar("Way")
FEW_SPILLED = 128  # words of a thread that lie in memory and not in registers: half a KiB; bad tiles spill ten
_taken: dict[tuple, Any] = {}


def run(key: tuple, call: Callable[[Way], Any], ways: Sequence[Way], *, timed: bool = False) -> None:
    """Call in the way that was taken for this key before; at the first call of a key, find one.

    Args:
        key: all that a compiled kernel depends on, the device among it.
        call: launches, and returns what Triton compiled.
        ways: in order of preference.
        timed: take the fastest of them, not the first that fits.

    Raises:
        UserError: the device or its compiler refuses every way.
    """
    if key not in _taken and len(ways) == 1:
        (_taken[key],) = ways
    elif key not in _taken:
        _taken[key] = (fastest if timed else first_that_fits)(call, ways)
    call(_taken[key])


def known() -> list[Any]:
    """The ways taken so far."""
    return list(_taken.values())


def forget() -> None:
    """Choose anew: for tests, which change what a device takes."""
    _taken.clear()


def kinds(arguments: Iterable[Any]) -> list[Any]:
    """What a compiled kernel, and the choice of its tile, depend on: dtype and device of tensors, other values themselves."""
    return [(a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments]


def first_that_fits(call: Callable[[Way], Any], ways: Sequence[Way]) -> Way:
    """The first that runs and keeps its values in registers, or else the one that spills least."""
    spilled: dict[Way, int] = {}
    refusal: Exception | None = None
    for way in ways:
        try:
            spilled[way] = getattr(call(way), "n_spills", None) or 0
        except Exception as error:
            if not is_refusal(error):
                raise
            refusal = error
            continue
        if spilled[way] <= FEW_SPILLED:
            return way
    return min(_some(spilled, refusal), key=spilled.__getitem__)


def fastest(call: Callable[[Way], Any], ways: Sequence[Way]) -> Way:
    """By a few timed calls of each that runs."""
    times: dict[Way, float] = {}
    refusal: Exception | None = None
    for way in ways:
        try:
            times[way] = triton.testing.do_bench(lambda way=way: call(way), warmup=5, rep=20)
        except Exception as error:
            if not is_refusal(error):
                raise
            refusal = error
    return min(_some(times, refusal), key=times.__getitem__)


def is_refusal(error: Exception) -> bool:
    """No room on this device, or a pass of the compiler gave up; other errors are ours."""
    if isinstance(error, (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)):
        return True
    return isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)


def _some(found: dict[Way, Any], refusal: Exception | None) -> dict[Way, Any]:
    if not found:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "this device"
        raise UserError(f"no tile of a kernel runs on {device}: {refusal}; use backend=simulate") from refusal
    return found
