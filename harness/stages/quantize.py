"""Calibrate and quantize: what a method sees, what it returns, and the model that is built from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import build
from ditbench.harness.calibration import recording as recordings
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.memory import PeakMemory
from ditbench.harness.common.watch import say
from ditbench.harness.fitting import mixed_precision, registry
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.quant.accounting import account as account_of
from ditbench.harness.quant.experts import Experts
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits, MixedBits
from ditbench.harness.quant.target import Target
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.experts import by_steps, fitted_in_turn
from ditbench.harness.stages.states import chosen, fitted, with_attention_given


@dataclass(frozen=True)
class Quantized:
    """state: what the method learned, tensors by name. plan: of mixed precision, what the record's `bits` says of it."""

    recipe: ModelRecipe
    state: dict[str, Tensor]
    model: nn.Module
    plan: dict[str, Any] = field(default_factory=dict)


def target_of(config: RunConfig, model: LoadedModel) -> Target:
    """What the protocol quantizes, with the algebra of weights on the run's device."""
    attention = config.protocol.attention
    if config.method == registry.FLOAT and isinstance(attention, str):
        attention = False  # what the others are compared with stays in float
    target = model.target(config.protocol.scope, config.protocol.skip, attention)
    names = [name for name, _ in model.transformer.named_modules()]
    for pattern in config.protocol.skip:
        if not any(re.search(pattern, name) for name in names):
            say(f"{model.spec.name}: protocol.skip={pattern} leaves nothing in float, since no layer has such a name")
    return target.on(config.device)


def calibrate(config: RunConfig, model: LoadedModel) -> Calibration:
    n, cache = config.section("calibration")["n"], config.cache_dir
    return recordings.calibrate(
        model, config.protocol.sampler, n, config.seed, cache=cache, memory=config.memory, **_recorded(config)
    )


def recording_key(config: RunConfig, model: LoadedModel) -> str:
    """Of what `calibrate` gives; nothing is made."""
    n = config.section("calibration")["n"]
    return recordings.key_of(model, config.protocol.sampler, n, config.seed, **_recorded(config))


def quantize(config: RunConfig, model: LoadedModel, target: Target, recording: Calibration) -> Quantized:
    """The method's recipe at the run's bits, and the model built from it.

    Raises:
        UserError: see `planned`.
    """
    recipe, state, plan = planned(config, model, target, recording)
    return Quantized(recipe, state, built(config, target, recipe), plan)


def planned(
    config: RunConfig, model: LoadedModel, target: Target, recording: Calibration
) -> tuple[ModelRecipe, dict[str, Tensor], dict[str, Any]]:
    """Recipe, state and plan (see `Quantized`), with one format for all layers or one per layer (bits=mixed).

    Raises:
        UserError: the method refuses, or is none (external); bits=mixed without data, or of a method that corrects the sampler for one uniform model's error.
    """
    if config.method == registry.EXTERNAL:
        raise UserError(
            "method=external is loaded as somebody else quantized it: it has no recipe; `ditbench run` scores it"
        )
    if isinstance(target.transformer, Experts):
        return *fitted_in_turn(config, model, target, recording), {}
    recipe, state, plan = _of_one(config, model, target, recording)
    return with_attention_given(target, recipe), state, plan


def _of_one(
    config: RunConfig, model: LoadedModel, target: Target, recording: Calibration
) -> tuple[ModelRecipe, dict[str, Tensor], dict[str, Any]]:
    """Of a model that is one transformer; without what the protocol puts on its attention."""
    if not isinstance(config.bits, MixedBits):
        return *fitted(config, target, recording, config.bits), {}
    if config.section("calibration")["n"] == 0:
        raise UserError("bits=mixed measures errors on recorded calls; set calibration.n to at least 1")
    if registry.correction(config.method, {}, config.params) is not None:
        raise UserError(f"method {config.method} corrects the sampler for one format's errors; bits=mixed has several")
    fit = partial(fitted, config, target, recording)
    return mixed_precision.quantize(
        config.bits, model, target, recording, fit, made_by=_made_by(config), timing=_timing(config)
    )


def built(config: RunConfig, target: Target, recipe: ModelRecipe) -> nn.Module:
    return build(
        target, recipe, dtype=_dtype(config), device=config.device, backend=config.backend, memory=config.memory
    )


def account(
    config: RunConfig, model: LoadedModel, target: Target, recipe: ModelRecipe
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record's `bits`, and the byte counts of its `efficiency`."""
    macs = model.macs_on(config.device)
    if isinstance(target.transformer, Experts):
        macs = by_steps(macs, model, config.protocol.sampler)
    bits, size = account_of(target, recipe, macs, config.bits.label)
    forms = dict.fromkeys(each.told for each in target.attention_given.values())
    given = {"attention_format": "; ".join(forms)} if forms and recipe.attention else {}
    return bits | formats_told(config.bits) | given, size


def formats_told(bits: Bits | MixedBits) -> dict[str, str | None]:
    """What the record says of each side's grid, block, scale and rule of finding it; of a mix all that it is of."""
    of = bits.candidates if isinstance(bits, MixedBits) else (bits,)
    sides = {"weight_format": [each.weight for each in of], "act_format": [each.act for each in of]}
    return {
        name: "; ".join(dict.fromkeys(spec.told for spec in specs if spec is not None)) or None
        for name, specs in sides.items()
    }


def unreached_layers(recording: Calibration) -> dict[str, list[str]]:
    """What the record's `bits` says of layers that nothing calls: they stay in float, whatever the protocol says."""
    return {"unreached_layers": list(recording.unreached)} if recording.unreached else {}


def fit_cost(timings_s: dict[str, float], recording: Calibration, memory: PeakMemory) -> dict[str, float | None]:
    """Seconds of calibration and quantization as if nothing had been cached (what the cache saved is added), and the
    most memory that was held meanwhile, here or where a state that was found had been fitted; None where one was not told.
    """
    saved = sum(recording.saved_s.values())
    seconds = {"fit_s": timings_s["calibrate"] + timings_s["quantize"] + saved, "of_which_cached_s": saved}
    stretches = [memory, *recording.fits.values()]
    known = all(each.peak_bytes is not None for each in stretches)
    most = max(stretches, key=lambda each: each.peak_bytes or 0) if known else PeakMemory(memory.before_bytes)
    return seconds | {"peak_memory_bytes": most.peak_bytes, "memory_before_bytes": most.before_bytes}


def _recorded(config: RunConfig) -> dict[str, Any]:
    batch_size = config.section("calibration")["batch_size"]
    return {"batch_size": batch_size, "device": config.device, "prompts": config.calibration_prompts}


def _dtype(config: RunConfig) -> torch.dtype:
    return getattr(torch, config.section("generate")["dtype"])


def _made_by(config: RunConfig) -> dict[str, Any]:
    """What makes a method's recipes, beside the recording and the width of each candidate."""
    sides = {side: config.raw["bits"][side] for side in ("weight", "act")}
    source = registry.source_sha256(config.method)
    made_by = {"method": config.raw["method"], "source": source, "seed": config.seed, "bits": sides}
    return made_by | chosen(config)


def _timing(config: RunConfig) -> mixed_precision.Timing:
    section = config.section("measure")
    return mixed_precision.Timing(
        _dtype(config), config.device, config.backend, 2 * section["samples"], section["warmup"], section["repeats"]
    )
