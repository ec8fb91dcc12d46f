"""Latency and memory of one denoising step against the same model in bf16: same process, same device, interleaved."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditbench.harness.backends.base import AUTO
from ditbench.harness.build.build import clock_of, float_copy
from ditbench.harness.build.compiled import compiled
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.offload import away, offloaded
from ditbench.harness.common.devices import device_name, memory_of, synchronize
from ditbench.harness.common.errors import reason
from ditbench.harness.common.plain_tensors import held_bytes
from ditbench.harness.measurement.timing import in_turns
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.target import Target

Timed = tuple[str, nn.Module, dict[str, Any]]  # the prefix of its names in the record, a model, what it is called with
NOT_TIMED = "not timed"  # the kind of what could run here, and was not measured
INTERLEAVED = "the same transformer in bf16, eager, interleaved in the same process"
COMPILED = (
    "the same transformer in bf16, its blocks compiled as the quantized one's are, interleaved in the same process"
)
ALONE = "none: what is compiled takes turns with what is not, and in bf16 the transformer does not fit beside the quantized one"
AFTERWARDS = (
    "the same transformer in bf16, eager, afterwards in the same process: both do not fit on the device at once"
)
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
    compile: bool = False,
) -> dict[str, Any]:
    """The record's `efficiency` field without the byte counts. dtype: of what is not quantized in `quantized`.

    One latency is one call of the transformer on `samples` samples with guidance (2 · samples rows); where the model changes
    with the range of steps, the mean of its calls over the steps. A simulated model gets no latency, speed-up or peak
    memory: its arithmetic is not the one it stands for. Nor does one whose blocks do not fit on the device (memory=offload, or
    auto): its time would be that of the bus; the record then says `not_timed`, and is of that kind. Where the baseline does not fit
    beside it, the two are timed one after the other; where it does not fit at all, there is no speed-up. `baseline` says which.

    compile: both are also timed with compiled blocks, all four taking turns; `compiled_speedup` is that of the compiled ones, against
        `compiled_baseline`, which says why there is none where something was in the way.
    """
    found: dict[str, Any] = {
        "kind": kind,
        "backend": backends_of(quantized),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "step_rows": 2 * samples,
        "baseline": INTERLEAVED,
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
    step_inputs = model.step_inputs(2 * samples, device)
    turns = _Turns(repeats, warmup, device)
    ours = ("", quantized, placed(step_inputs, dtype, device))
    theirs = "baseline_", placed(step_inputs, torch.bfloat16, device)
    baseline = float_copy(target, dtype=torch.bfloat16, device=device, memory=memory)
    if compile:
        found |= {"compiled_baseline": ALONE, "compiled_speedup": None}
    if not offloaded(baseline):
        also = _compiled(found, target, ours, (theirs[0], baseline, theirs[1])) if compile else ()
        found |= turns.of(ours, (theirs[0], baseline, theirs[1]), *also)
        if also:
            medians = [found[f"compiled_{name}"]["median"] for name in ("baseline_latency_ms", "latency_ms")]
            found |= {"compiled_baseline": COMPILED, "compiled_speedup": medians[0] / medians[1]}
    else:
        del baseline
        found |= turns.of(ours) | {"baseline": AFTERWARDS}
        with away(quantized, device):
            baseline = float_copy(target, dtype=torch.bfloat16, device=device, memory=memory)
            if offloaded(baseline):
                return found | {"baseline": "none: in bf16 the transformer does not fit on the device"}
            found |= turns.of((theirs[0], baseline, theirs[1]))
    found["speedup"] = found["baseline_latency_ms"]["median"] / found["latency_ms"]["median"]
    return found


def _compiled(found: dict[str, Any], target: Target, *models: Timed) -> tuple[Timed, ...]:
    """The same models with compiled blocks, once called; none where torch cannot compile them here, and `found` says why."""
    made = tuple((f"compiled_{prefix}", compiled(model, target.blocks), inputs) for prefix, model, inputs in models)
    try:
        for _, model, inputs in made:
            for _ in _each_range(model):
                model(**inputs)
    except Exception as error:  # whatever a compiler stumbles over costs the comparison, not the run
        found["compiled_baseline"] = f"none: torch cannot compile it here ({reason(error)[:200]})"
        return ()
    return made


@dataclass(frozen=True)
class _Turns:
    """Latency and peak memory of models that take turns."""

    repeats: int
    warmup: int
    device: torch.device

    def of(self, *models: Timed) -> dict[str, Any]:
        """models: (prefix of the names in the record, a model, what it is called with)."""
        calls = {prefix: partial(_mean_call, model, inputs, self.device) for prefix, model, inputs in models}
        found: dict[str, Any] = {}
        for prefix, times in in_turns(calls, repeats=self.repeats, warmup=self.warmup, title="measure").items():
            found[f"{prefix}latency_ms"] = quantiles(times)
        for prefix, model, inputs in models:
            if prefix.startswith("compiled_"):
                continue  # on the tensors of the eager one
            peaks = [peak_memory_bytes(model, inputs, self.device) for _ in _each_range(model)]
            known = [peak for peak in peaks if peak is not None]
            found[f"{prefix}peak_memory_bytes"] = max(known) if len(known) == len(peaks) else None
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
    return sum({id(t): held_bytes(t) for t in tensors}.values())


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
