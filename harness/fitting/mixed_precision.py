"""bits=mixed: fit the method once per candidate format, measure each unit's error in each, choose under the budget.

The error of a unit in a candidate is that of the transformer's output when nothing else is rounded, Σ (y − ŷ)² / Σ y² of each
denoising step looked at, averaged over those steps, on the calibration's inputs. It is measured once and kept in their cache.
With bits.ranges it is measured in each range of steps and weighted with the range's share of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditbench.harness.backends import simulate
from ditbench.harness.backends.base import AUTO
from ditbench.harness.build.attention import quantize_attention, set_attention
from ditbench.harness.build.build import build, build_module, clock_of, quant_layers, set_submodule
from ditbench.harness.calibration.recording import Calibration, spread
from ditbench.harness.common.artifacts import obtain
from ditbench.harness.common.code_identity import STATE, code_identity
from ditbench.harness.common.devices import in_float64, synchronize
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256, read_json, write_json
from ditbench.harness.common.progress import progress
from ditbench.harness.fitting.bit_allocation import (
    Costs,
    Unit,
    fixed_units,
    merged,
    merged_by_range,
    readers_of_one_tensor,
    solve,
    units_of,
)
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.accounting import account, act_bits, held_parts, layer_bytes
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import FLOAT_BITS, Bits, MixedBits
from ditbench.harness.quant.steps import range_starts, step_ranges
from ditbench.harness.quant.target import Target, weight_matrix

MAX_STEPS, ROWS = 4, 4  # of the calibration's inputs, spread over the steps and over each step's rows
ERRORS = "errors.json"
LEAST_STEPS = 2  # of each range of steps, even if there are many
Fit = Callable[[Bits], tuple[ModelRecipe, dict[str, Tensor]]]


@dataclass(frozen=True)
class Timing:
    """How a budget of latency is measured: on `rows` rows of a call, what is not quantized in dtype."""

    dtype: torch.dtype
    device: torch.device
    backend: str
    rows: int
    warmup: int
    repeats: int


def quantize(
    bits: MixedBits,
    model: LoadedModel,
    target: Target,
    recording: Calibration,
    fit: Fit,
    *,
    made_by: Mapping[str, Any],
    timing: Timing,
) -> tuple[ModelRecipe, dict[str, Tensor], dict[str, Any]]:
    """The recipe of the plan, the states of all candidates ("<label>/<name>"), and what the record's `bits` says of it.

    made_by: what makes the method's recipes beside recording and widths (method, source, seed), for the cache.

    Raises:
        UserError: no plan keeps the budget; a budget of latency where a layer is only simulated; recipes that change with the steps.
    """
    labels = [each.label.lower() for each in bits.candidates]
    fitted = [fit(each) for each in bits.candidates]
    recipes = [recipe for recipe, _ in fitted]
    if any(recipe.variants for recipe in recipes):
        raise UserError(
            "bits=mixed: this method's recipes change with the steps by themselves (method.delta), which a plan would not keep; "
            "set method.delta=null, or take one format"
        )
    state = {f"{label}/{name}": t for label, (_, own) in zip(labels, fitted, strict=True) for name, t in own.items()}
    units = units_of(target, recipes)
    starts = range_starts(recording.num_steps, bits.ranges)
    ranges = step_ranges(starts, recording.num_steps)
    shares_R = np.array([len(steps) / recording.num_steps for steps in ranges])
    measured_KUR = [
        _cached(made_by, label, recipe, units, looked_at(ranges), target, recording)
        for label, recipe in zip(labels, recipes, strict=True)
    ]
    errors_RUK = np.array(measured_KUR).T * shares_R[:, None, None]
    costs, rest = COSTS[bits.budget](timing, model, target, recipes, labels, units, shares_R)
    pairs, acts = readers_of_one_tensor(target, units), [each.act for each in bits.candidates]

    def planned(fixed: Sequence[int]) -> np.ndarray:
        try:
            return solve(errors_RUK, costs, bits.limit - rest, pairs, acts, fixed)
        except UserError as error:
            raise UserError(
                f"bits.budget.{bits.budget}={bits.limit}: {error} (less {rest:.6g} for the rest)"
            ) from error

    def error_of(chosen_RU: np.ndarray) -> float:
        each_range, each_unit = np.indices(chosen_RU.shape)
        return float(errors_RUK[each_range, each_unit, chosen_RU].sum())

    chosen_RU = planned(fixed_units(target, recipes, units))
    plan = {
        "candidates": labels,
        "budget": {bits.budget: bits.limit},
        "predicted": {bits.budget: costs.of(chosen_RU) + rest},
        "predicted_error": error_of(chosen_RU),
        "uniform_errors": dict(zip(labels, errors_RUK.sum((0, 1)).tolist(), strict=True)),
    }
    if bits.ranges == 1:
        (chosen_U,) = chosen_RU
        plan |= {"plan": {name: labels[k] for unit, k in zip(units, chosen_U, strict=True) for name in unit}}
    else:
        plan |= {
            "predicted_error_of_one_range": error_of(planned(range(len(units)))),
            "ranges": [[steps.start, steps.stop - 1] for steps in ranges],
            "plan": {
                name: [labels[k] for k in chosen_R]
                for unit, chosen_R in zip(units, chosen_RU.T, strict=True)
                for name in unit
            },
        }
    recipe = planned_recipe(target, plan, recipes)
    return recipe, state, {"label": f"mixed-{weight_bits(target, recipe):.1f}", "mixed": plan}


def of_state(
    target: Target,
    plan: dict[str, Any],
    state: dict[str, Tensor],
    apply: Callable[[str, dict[str, Tensor]], ModelRecipe],
) -> ModelRecipe:
    """The recipe again, from a record's plan and the saved state. apply: (label, its state) → recipe."""
    recipes = []
    for label in plan["candidates"]:
        own = {n.removeprefix(f"{label}/"): tensor for n, tensor in state.items() if n.startswith(f"{label}/")}
        recipes.append(apply(label, own))
    return planned_recipe(target, plan, recipes)


def planned_recipe(target: Target, plan: dict[str, Any], recipes: Sequence[ModelRecipe]) -> ModelRecipe:
    """The recipe that a record's plan makes of those of its candidates."""
    place = {label: k for k, label in enumerate(plan["candidates"])}
    if "ranges" not in plan:
        return merged(target, recipes, {name: place[label] for name, label in plan["plan"].items()})
    chosen_R = [
        {name: place[labels[index]] for name, labels in plan["plan"].items()} for index in range(len(plan["ranges"]))
    ]
    starts, (_, last) = tuple(first for first, _ in plan["ranges"]), plan["ranges"][-1]
    return merged_by_range(target, recipes, chosen_R, starts, last + 1)


def weight_bits(target: Target, recipe: ModelRecipe) -> float:
    """Stored bits per weight over the protocol's layers, scales and all that belongs to the weight counted."""
    stored = sum(layer_bytes(target, recipe, name)[0] for name in target.layers)
    return 8 * stored / sum(weight_matrix(target.module(name)).numel() for name in target.layers)


def looked_at(ranges: Sequence[range]) -> list[list[int]]:
    """For each range of steps, those at which errors are measured."""
    wanted = max(LEAST_STEPS, MAX_STEPS // len(ranges))
    return [[steps[index] for index in spread(len(steps), wanted)] for steps in ranges]


@torch.no_grad()
def sensitivities(
    target: Target,
    recipe: ModelRecipe,
    units: Sequence[Unit],
    steps_R: Sequence[Sequence[int]],
    calibration: Calibration,
) -> list[list[float]]:
    """The relative squared error of the output for each unit, rounded alone, in each range; simulated, in float32.

    One model is there, without any rounding. Each unit's modules, built for that time, take their places in it in turn.
    """
    settings: dict[str, Any] = {"dtype": torch.float32, "device": calibration.device, "backend": simulate.NAME}
    exact = build(target, recipe.without_rounding(), **settings, memory=AUTO)
    settings["clock"] = clock_of(exact)
    rounds = {name for name, layer in recipe.layers.items() if layer.weight is not None or layer.act is not None}
    outputs = {step: _output(exact, calibration, step) for steps in steps_R for step in steps}
    errors = []
    for unit in progress(units, total=len(units), desc="sensitivities"):
        if not any(name in rounds or name in recipe.attention for name in unit):
            errors.append([0.0] * len(steps_R))
            continue
        before = {n: exact.get_submodule(n) for n in unit if n in recipe.layers}
        operands = [name for name in unit if name in recipe.attention]
        for name in before:
            set_submodule(exact, name, build_module(target, recipe, name, **settings).eval().requires_grad_(False))
        for name in operands:
            quantize_attention(exact, name, recipe.attention[name], clock_of(exact), calibration.device)
        found = {}
        for step in outputs:
            noise = (_output(exact, calibration, step) - outputs[step]).square().sum()
            found[step] = float(noise / outputs[step].square().sum())
        for name, module in before.items():
            set_submodule(exact, name, module)
        for name in operands:
            set_attention(exact, name, None)
        errors.append([float(np.mean([found[step] for step in steps])) for steps in steps_R])
    return errors


def _output(model: nn.Module, calibration: Calibration, step: int) -> Tensor:
    return in_float64(calibration.call(model, step, calibration.rows(step, ROWS)).sample)


def _cached(
    made_by: Mapping[str, Any],
    label: str,
    recipe: ModelRecipe,
    units: list[Unit],
    steps_R: list[list[int]],
    target: Target,
    recording: Calibration,
) -> list[list[float]]:
    key = canonical_sha256(
        {
            **made_by,
            "recording": recording.key,
            "label": label,
            "of": [target.layers, target.attention, units],
            "steps": steps_R,
            "code": code_identity(*STATE),
        }
    )
    address = recording.derived("sensitivities", key, f"the sensitivities at {label}")
    kept = obtain(address, lambda: sensitivities(target, recipe, units, steps_R, recording), _write, _read)
    recording.saved(f"sensitivities {key}", kept.saved_s)
    return kept.value


def _write(errors: list[list[float]], folder: Path) -> None:
    write_json(folder / ERRORS, errors)


def _read(folder: Path) -> list[list[float]]:
    return read_json(folder / ERRORS)


def _bytes(timing, model, target, recipes, labels, units, shares_R) -> tuple[Costs, float]:
    """Of the stored transformer: of each unit, and of the rest."""
    parts_UK = [[_parts(target, recipe, unit) for recipe in recipes] for unit in units]
    whole_K = [account(target, recipe, model.macs_on(target.device), "")[1]["model_bytes"] for recipe in recipes]
    of_units_K = [sum(sum(of_unit[k].values()) for of_unit in parts_UK) for k in range(len(recipes))]
    rest = max(whole - own for whole, own in zip(whole_K, of_units_K, strict=True))
    return Costs.of_parts(parts_UK, len(shares_R)), float(rest)


def _average_weight_bits(timing, model, target, recipes, labels, units, shares_R) -> tuple[Costs, float]:
    """8 · bytes of weights / number of weights, over the protocol's layers."""
    count = sum(weight_matrix(target.module(name)).numel() for name in target.layers)
    own = [tuple(name for name in unit if name in target.layers) for unit in units]
    parts_UK = [[_parts(target, recipe, unit, without="bias") for recipe in recipes] for unit in own]
    return Costs.of_parts(parts_UK, len(shares_R), count / 8), 0.0


def _average_act_bits(timing, model, target, recipes, labels, units, shares_R) -> tuple[Costs, float]:
    """Mean over the steps and the multiplications of the protocol's layers."""
    macs = model.macs_on(target.device)
    total = sum(macs[name] for name in target.layers)
    widths = {name: weight_matrix(target.module(name)).shape[1] for name in target.layers}

    def bits(recipe: ModelRecipe, unit: Unit) -> float:
        acts = {name: recipe.layers.get(name, LayerRecipe()).act for name in unit if name in target.layers}
        return sum(macs[name] * act_bits(act, widths[name]) for name, act in acts.items()) / total

    bits_UK = np.array([[bits(recipe, unit) for recipe in recipes] for unit in units])
    untouched = set(target.layers).difference(*units)
    return Costs(shares_R[:, None, None] * bits_UK), FLOAT_BITS * sum(macs[name] for name in untouched) / total


def _parts(target: Target, recipe: ModelRecipe, unit: Unit, without: str = "") -> dict[object, int]:
    """Bytes of what a unit holds; in all candidates by the same key what is the same."""
    return {
        (name, part): size
        for name in unit
        if name not in target.attention
        for part, size in held_parts(target, recipe, name).items()
        if part[0] != without
    }


def _latency_ms(timing, model, target, recipes, labels, units, shares_R) -> tuple[Costs, float]:
    """Of each unit's layers inside a call, per candidate; the rest of the call is the slowest candidate's. By ranges, of the
    mean step.

    Raises:
        UserError: a layer of a candidate has no kernel here that computes in its format.
    """
    inputs = placed(model.step_inputs(timing.rows, timing.device), timing.dtype, timing.device)
    columns, rests = [], []
    for label, recipe in zip(labels, recipes, strict=True):
        built = build(target, recipe, dtype=timing.dtype, device=timing.device, backend=timing.backend)
        for name, layer in quant_layers(built).items():
            if layer.rounds and layer.kind != "measured" or recipe.attention:
                raise UserError(
                    f"bits.budget.latency_ms: {name} as {label} is simulated on this device (backend {layer.backend}), "
                    "so its latency is not known; take formats that run here (ditbench list backends), or another budget"
                )
        times_ms, call_ms = layer_times(built, units, inputs, timing.warmup, timing.repeats, timing.device)
        columns.append(times_ms)
        rests.append(call_ms - sum(times_ms))
    return Costs(shares_R[:, None, None] * np.array(columns).T), max(rests)


@torch.no_grad()
def layer_times(
    model: nn.Module, units: Sequence[Unit], inputs: dict[str, Any], warmup: int, repeats: int, device: torch.device
) -> tuple[list[float], float]:
    """(ms of each unit's layers in one call, ms of the whole call), medians over the repeats."""
    unit_of = {name: index for index, unit in enumerate(units) for name in unit}
    spent, started = np.zeros(len(units)), {"at": 0.0}

    def now() -> float:
        synchronize(device)
        return perf_counter()

    def leave(index: int):
        def add(*_: Any) -> None:
            spent[index] += 1000 * (now() - started["at"])

        return add

    handles = []
    for name, index in unit_of.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_: started.update(at=now())))
        handles.append(module.register_forward_hook(leave(index)))
    rows, whole = [], []
    for repeat in range(warmup + repeats):
        spent[:] = 0
        start = now()
        model(**inputs)
        if repeat >= warmup:
            whole.append(1000 * (now() - start))
            rows.append(spent.copy())
    for handle in handles:
        handle.remove()
    return np.median(rows, axis=0).tolist(), float(np.median(whole))


COSTS = {
    "bytes": _bytes,
    "average_weight_bits": _average_weight_bits,
    "average_act_bits": _average_act_bits,
    "latency_ms": _latency_ms,
}
