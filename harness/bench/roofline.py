"""What this device can do at most, measured: matrix products in each precision, and copying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ditbench.harness.measurement.timing import interleaved

SIDE, SIDE_ON_CPU = 8192, 2048  # of the square matrices multiplied
COPIED_BYTES, COPIED_BYTES_ON_CPU = 2**30, 2**28


def roofline(device: torch.device, repeats: int) -> dict[str, float]:
    """{"bf16 TFLOP/s", "int8 TOP/s", "fp8 TFLOP/s", "copy GB/s"}: best of the repeats; what the device lacks is absent."""
    on_cpu = device.type == "cpu"
    side, copied = (SIDE_ON_CPU, COPIED_BYTES_ON_CPU) if on_cpu else (SIDE, COPIED_BYTES)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = products(device, side) | {"copy GB/s": lambda: target.copy_(source)}
    times = interleaved(calls, device, repeats=repeats, warmup=2)
    work = dict.fromkeys(calls, 2 * side**3 / 1000000000000.0) | {"copy GB/s": 2 * copied / 1e9}  # read and written
    return {name: work[name] / (min(times[name]) / 1e3) for name in calls}


def products(device: torch.device, side: int) -> dict[str, Callable[[], object]]:
    """Square products by the fastest library call that torch has for each precision."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    found: dict[str, Callable[[], object]] = {"bf16 TFLOP/s": lambda: a @ a.T}
    eight = torch.randint(-127, 127, (side, side), dtype=torch.int8, device=device)
    if device.type == "cuda":
        found["int8 TOP/s"] = lambda: torch._int_mm(eight, eight.T)
        if torch.cuda.get_device_capability(device) >= (8, 9):
            small, one = a.to(torch.float8_e4m3fn), torch.ones((), device=device)
            found["fp8 TFLOP/s"] = lambda: torch._scaled_mm(small, small.T, one, one, out_dtype=torch.bfloat16)
    if device.type != "cpu":
        return found
    from ditbench.harness.backends import onednn_int8

    if onednn_int8.cpu_lacks() is None:
        packed = torch.ops.onednn.qlinear_prepack(eight, None)
        unsigned, ones = eight.view(torch.uint8), torch.ones(side)
        zeros = torch.zeros(side, dtype=torch.long)
        found["int8 TOP/s"] = lambda: torch.ops.onednn.qlinear_pointwise(
            *(unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        )
    return found
