"""What is timed: the same transformer in bf16 and in each format, eager, with its blocks compiled, and as a recorded call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.bench.engines.base import GRAPH
from ditbench.harness.build.build import float_copy
from ditbench.harness.build.compiled import compiled
from ditbench.harness.build.flat_calls import output_of
from ditbench.harness.build.graphs import Graphed
from ditbench.harness.calibration.lazy import LazyCalibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.measurement.latency import backends_of, kind_of, resident_bytes
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.target import Target
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.quantize import calibrate, quantize, recording_key

EAGER, COMPILED = "eager", "compiled"
MODES = (EAGER, COMPILED, GRAPH)
BASELINE = "bf16"


@dataclass(frozen=True)
class Candidate:
    """backend: of the quantized layers, "torch" where there are none. held_bytes: of all tensors of the model."""

    label: str
    mode: str
    model: nn.Module
    backend: str
    held_bytes: int


def baseline(target: Target, device: torch.device, modes: tuple[str, ...]) -> Iterator[Candidate]:
    model = float_copy(target, dtype=torch.bfloat16, device=device)
    yield from in_modes(BASELINE, model, target, modes)


def quantized(config: RunConfig, model: LoadedModel, target: Target, modes: tuple[str, ...]) -> Iterator[Candidate]:
    """The configuration's method at its bits, on real kernels.

    Raises:
        UserError: some layer has none here: what is simulated has no speed.
    """
    made = quantize(config, model, target, _recording(config, model))  # type: ignore[arg-type]
    if kind_of(made.model, bool(made.recipe.attention)) != "measured":
        raise UserError(f"bench: {config.bits.label} is simulated on {config.device} (ditbench list backends)")
    yield from in_modes(config.bits.label, made.model, target, modes)


def _recording(config: RunConfig, model: LoadedModel) -> LazyCalibration:
    """Made when a method asks for it, which is when a model that draws nothing, or has no prompts, says so."""
    try:
        key = recording_key(config, model)
    except UserError:
        key = canonical_sha256({"recording": None, "model": model.fingerprint})
    return LazyCalibration(key, config.cache_dir, lambda: calibrate(config, model))


def in_modes(label: str, model: nn.Module, target: Target, modes: tuple[str, ...]) -> Iterator[Candidate]:
    size, backend = resident_bytes(model), backends_of(model)
    for mode in modes:
        yield Candidate(label, mode, in_mode(mode, model, target), backend, size)


def in_mode(mode: str, model: nn.Module, target: Target) -> nn.Module:
    """On the same tensors."""
    if mode == COMPILED:
        return compiled(model, target.blocks)
    return Graphed(model) if mode == GRAPH else model


@torch.no_grad()
def called(model: nn.Module, device: torch.device, arguments: dict[str, Any]) -> Tensor:
    """The prediction of a model in bf16 for the arguments that the family makes."""
    return output_of(model(**placed(arguments, torch.bfloat16, device)))
