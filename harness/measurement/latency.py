"""Latency and memory of one denoising step against the same model in bf16: same process, same device, interleaved."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditbench.harness.backends.base import AUTO
from ditbench.harness.build.build import clock_of, float_copy
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.offload import offloaded
from ditbench.harness.common.devices import device_name, memory_of, synchronize
from ditbench.harness.measurement.timing import in_turns
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.target import Target

NOT_TIMED = "not timed"  # the kind of what could run here, and was not measured
OFFLOADED = "blocks are offloaded, their time is that of the bus"


def kind_of(model: nn.Module, quantized_attention: bool) -> str:
    """ "measured" when every quantized layer runs on a real kernel (or none is quantized), else "simulated"."""
    kinds = {layer.kind for layer in _rounding(model)}
    return "simulated" if "simulated" in kinds or quantized_attention else "measured"


def backends_of(model: nn.Module) -> str:
    return "+".join(sorted({layer.backend for layer in _rounding(model)})) or "torch"


def _rounding(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear) and module.rounds]


@torch.no_grad()
def measure(
    model: LoadedModel,
    target: Target,
    quantized: nn.Module,
    *,
    kind: str,
    samples: int,
    repeats: int,
    warmup: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    memory: str = AUTO,
) -> dict[str, Any]:
    """The record's `efficiency` field without the byte counts. dtype: of what is not quantized in `quantized`.

    One latency is one call of the transformer on `samples` samples with guidance (2 · samples rows); where the model changes
    with the range of steps, the mean of its calls over the steps. A simulated model gets no latency, speed-up or peak
    memory: its arithmetic is not the one it stands for. Nor does one whose blocks, or those of the baseline beside it, do not fit on
    the device (memory=offload, or auto): its time would be that of the bus; the record then says `not_timed`, and is of that kind.
    """
    found: dict[str, Any] = {
        "kind": kind,
        "backend": backends_of(quantized),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "step_rows": 2 * samples,
        "baseline": "the same transformer in bf16, eager, interleaved in the same process",
        "latency_ms": None,
        "baseline_latency_ms": None,
        "speedup": None,
        "peak_memory_bytes": None,
        "baseline_peak_memory_bytes": None,
    }
    if kind != "measured":
        return found
    if offloaded(quantized):
        return found | {"kind": NOT_TIMED, "not_timed": OFFLOADED}
    baseline = float_copy(target, dtype=torch.bfloat16, device=device, memory=memory)
    if offloaded(baseline):
        return found | {"kind": NOT_TIMED, "not_timed": f"the baseline beside it: {OFFLOADED}"}
    step_inputs = model.step_inputs(2 * samples, device)
    baseline_inputs, inputs = (placed(step_inputs, wanted, device) for wanted in (torch.bfloat16, dtype))
    calls = {
        "baseline": partial(_mean_call, baseline, baseline_inputs, device),
        "quantized": partial(_mean_call, quantized, inputs, device),
    }
    times = in_turns(calls, repeats=repeats, warmup=warmup, title="measure")
    found["latency_ms"] = quantiles(times["quantized"])
    found["baseline_latency_ms"] = quantiles(times["baseline"])
    found["speedup"] = found["baseline_latency_ms"]["median"] / found["latency_ms"]["median"]
    peaks = [peak_memory_bytes(quantized, inputs, device) for _ in _each_range(quantized)]
    found["peak_memory_bytes"] = None if None in peaks else max(each or 0 for each in peaks)
    found["baseline_peak_memory_bytes"] = peak_memory_bytes(baseline, baseline_inputs, device)
    return found


def quantiles(times_ms: list[float]) -> dict[str, float]:
    return {name: float(np.quantile(times_ms, q)) for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}


def peak_memory_bytes(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> int | None:
    """Peak of torch's allocator over one call: the most that is live at a time above what was live before, plus the
    model's own tensors (parameters, buffers and prepacked weights). None for a device whose allocator does not tell.
    """
    functions = memory_of(device)
    if functions is not None:
        functions.reset_peak_memory_stats(device)
        before = functions.memory_allocated(device)
        _timed_call(model, inputs, device)
        return functions.max_memory_allocated(device) - before + resident_bytes(model)
    if device.type != "cpu":
        return None  # the profiler below sees what the CPU allocates, which is not where the model is
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model(**inputs)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + resident_bytes(model)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all distinct tensors the model holds, whether or not they are part of its state."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """torch's profiler writes its own starts and stops straight to file descriptor 2."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _mean_call(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> float:
    """Seconds of a call, the mean over the steps."""
    return sum(share * _timed_call(model, inputs, device) for share in _each_range(model))


def _each_range(model: nn.Module) -> Iterator[float]:
    """Go through the model's ranges of steps: the share of the steps that lie in each."""
    clock = clock_of(model)
    for index, steps in enumerate(clock.ranges):
        clock.enter(index)
        yield len(steps) / (clock.num_steps or 1)


def _timed_call(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    model(**inputs)
    synchronize(device)
    return time.perf_counter() - start
