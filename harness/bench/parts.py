"""Where the time goes: of an eager step by part of the quantized layers, and of a drawn sample by component."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ditbench.harness.backends.base import known_backends
from ditbench.harness.build.build import quant_layers
from ditbench.harness.common.devices import synchronize
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.encoded_prompts import forget_prompts
from ditbench.harness.models.parts import replaced
from ditbench.harness.samples.conditions import Conditions

LAYERS, STEP = "quantized layers", "step"
# Of the accelerators that torch's profiler sees.
ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
REST, OUTSIDE = "transforms, scales, bias, low rank", "outside the quantized layers"


@torch.no_grad()
def shares(model: nn.Module, inputs: dict[str, Any], device: torch.device, calls: int = 3) -> dict[str, float]:
    """{part: share of an eager step's time}: the kernels' own operators as their backends name them (`OPERATORS`).

    Raises:
        UserError: a device that torch's profiler does not see.
        RuntimeError: the profiler saw no time of the step.
    """
    on_cpu = device.type == "cpu"
    if not on_cpu and device.type not in ACTIVITIES:
        raise UserError(f"torch's profiler sees no time of a {device.type}")
    part_of: dict[str, str] = {}
    for backend in known_backends().values():
        part_of |= getattr(backend, "OPERATORS", {})

    inside = False

    def labelled(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # a layer whose result was put off until another reads it
            return call(*args, **kwargs)
        inside = True
        try:
            with record_function(LAYERS):
                return call(*args, **kwargs)
        finally:
            inside = False

    model(**inputs)
    activities = [ProfilerActivity.CPU, *([] if on_cpu else [ACTIVITIES[device.type]])]
    with ExitStack() as stack:
        for layer in quant_layers(model).values():
            stack.enter_context(replaced(layer, "forward", labelled))
        trace = stack.enter_context(profile(activities=activities))
        for _ in range(calls):
            with record_function(STEP):
                model(**inputs)
            synchronize(device)
    total: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # what runs on an accelerator is counted with the operator that launched it
        spent = event.cpu_time_total if on_cpu else event.device_time_total
        total[part_of.get(event.key, event.key)] += spent
    if not total[STEP]:
        raise RuntimeError("the profiler saw no time of the step")
    named = {part: total[part] for part in dict.fromkeys(part_of.values()) if total[part]}
    found = named | {REST: total[LAYERS] - sum(named.values()), OUTSIDE: total[STEP] - total[LAYERS]}
    return {part: spent / total[STEP] for part, spent in found.items()}


@torch.no_grad()
def by_component(
    model: LoadedModel, transformer: nn.Module, conditions: Conditions, sampler: Sampler, device: torch.device
) -> dict[str, float]:
    """Milliseconds of drawing the samples: {component: …}, "sampler and rest", "total". Prompts are encoded for it; taking the weights
    of text encoders and VAE to the device is of the rest.
    """
    forget_prompts(model.pipe)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str) -> Callable[..., Any]:
        def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result, milliseconds = _timed(lambda: call(*args, **kwargs), device)
            spent[name] += milliseconds
            return result

        return around

    parts = {n: part for n, part in model.pipe.components.items() if isinstance(part, nn.Module)}
    with ExitStack() as stack:
        for name, part in (parts | {"transformer": transformer}).items():
            stack.enter_context(replaced(part, "decode" if name == "vae" else "forward", timed(name)))
        _, total = _timed(lambda: model.adapter.sample(model.pipe, transformer, conditions, sampler), device)
    return dict(spent) | {"sampler and rest": total - sum(spent.values()), "total": total}


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, 1e3 * (time.perf_counter() - start)
