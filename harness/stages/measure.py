"""Measure what was built: latency and memory, kernels against simulation, the error of each layer."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from ditbench.harness.build.build import clock_of
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.devices import BESIDE
from ditbench.harness.measurement import latency
from ditbench.harness.measurement.layer_errors import ErrorAtlas, error_atlas
from ditbench.harness.measurement.parity import layer_parity
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.quant.steps import step_ranges
from ditbench.harness.quant.target import Target
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.quantize import Quantized

PARITY_ROWS = 2


def measure(config: RunConfig, model: LoadedModel, target: Target, quantized: Quantized) -> dict[str, Any]:
    """The record's `efficiency` without bytes and parity."""
    kind = latency.kind_of(quantized.model, bool(quantized.recipe.attention))
    return timed(config, model, target, quantized.model, kind)


def timed(config: RunConfig, model: LoadedModel, target: Target, transformer: nn.Module, kind: str) -> dict[str, Any]:
    """A transformer beside the float one, as `measure.…` says. timed_beside: how many other workers of the sweep used this processor."""
    section = config.section("measure")
    beside = int(os.environ.get(BESIDE, "0")) if config.device.type == "cpu" else 0
    return {"timed_beside": beside} | latency.measure(
        model,
        target,
        transformer,
        kind=kind,
        samples=section["samples"],
        repeats=section["repeats"],
        warmup=section["warmup"],
        device=config.device,
        dtype=getattr(torch, config.section("generate")["dtype"]),
        memory=config.memory,
        compile=section["compile"],
    )


def parity(target: Target, quantized: Quantized, calibration: Calibration) -> dict[str, Any] | None:
    """The worst layer of the real kernels against simulated execution, on two recorded calls of each range of steps; None if
    all is simulated.
    """
    found = []
    for steps in step_ranges(quantized.recipe.starts, calibration.num_steps):
        step = steps[len(steps) // 2]
        clock_of(quantized.model).set(step, calibration.num_steps)
        call = partial(calibration.call, step=step, inputs=calibration.rows(step, PARITY_ROWS))
        found += layer_parity(target, quantized.recipe, quantized.model, call).items()
    if not found:
        return None
    name, worst = max(found, key=lambda each: each[1].relative)
    return {"layers": len({name for name, _ in found}), "worst_layer": name} | asdict(worst)


def layer_errors(
    config: RunConfig, target: Target, quantized: Quantized, calibration: Calibration
) -> ErrorAtlas | None:
    wanted = config.section("measure")["layer_errors"]
    return error_atlas(target, quantized.recipe, quantized.model, calibration) if wanted else None
