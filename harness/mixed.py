"""bits=mixed: fit the method once per candidate format, measure each unit's error in each, choose under the budget.

The error of a unit in a candidate is that of the transformer's output when nothing else is rounded, Σ (y − ŷ)² / Σ y² of each
denoising step looked at, averaged over those steps, on the calibration's inputs. It is measured once and cached beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import methods
from harness.calibrate import Calibration, spread
from harness.calls import placed
from harness.config import RunConfig
from harness.environment import code_identity
from harness.errors import UserError
from harness.files import canonical_sha256, write_json
from harness.models.base import LoadedModel
from harness.progress import progress
from harness.quant.accounting import account, count_macs, layer_bytes
from harness.quant.attention import QuantAttnProcessor, set_processor
from harness.quant.build import build, clock_of, quant_layers, set_submodule
from harness.quant.plan import Unit, merged, readers_of_one_site, solve, units_of
from harness.quant.recipe import ModelRecipe
from harness.quant.spec import Bits, MixedBits
from harness.quant.target import Target, weight_matrix

MAX_STEPS, ROWS = 4, 4  # of the calibration's inputs, spread over the steps and over each step's rows
Fit = Callable[[Bits], tuple[ModelRecipe, dict[str, Tensor]]]


def quantize(
    config: RunConfig, bits: MixedBits, model: LoadedModel, target: Target, recording: Calibration, fit: Fit
) -> tuple[ModelRecipe, dict[str, Tensor], dict[str, Any]]:
    """The recipe of the plan, the states of all candidates ("<label>/<name>"), and what the record's `bits` says of it.

    Raises:
        UserError: no plan keeps the budget; a budget of latency where a layer is only simulated; a method that corrects
            the sampler for the error of one uniform model.
    """
    if methods.correction(config.method, {}, config.params) is not None:
        raise UserError(f"method {config.method} corrects the sampler for one format's errors; bits=mixed has several")
    labels = [each.label.lower() for each in bits.candidates]
    fitted = [fit(each) for each in bits.candidates]
    recipes = [recipe for recipe, _ in fitted]
    state = {f"{label}/{name}": t for label, (_, own) in zip(labels, fitted, strict=True) for name, t in own.items()}
    units = units_of(target, recipes)
    errors_UK = np.array(
        [
            _cached(config, label, recipe, units, target, recording)
            for label, recipe in zip(labels, recipes, strict=True)
        ]
    ).T
    costs_UK, rest = COSTS[bits.budget](config, model, target, recipes, labels, units)
    try:
        chosen_U = solve(
            errors_UK,
            costs_UK,
            bits.limit - rest,
            readers_of_one_site(target, units),
            [each.act for each in bits.candidates],
        )
    except UserError as error:
        raise UserError(f"bits.budget.{bits.budget}={bits.limit}: {error} (less {rest:.6g} for the rest)") from error
    chosen = {name: int(k) for unit, k in zip(units, chosen_U, strict=True) for name in unit}
    recipe = merged(target, recipes, chosen)
    every = np.arange(len(units))
    plan = {
        "candidates": labels,
        "budget": {bits.budget: bits.limit},
        "predicted": {bits.budget: float(costs_UK[every, chosen_U].sum() + rest)},
        "predicted_error": float(errors_UK[every, chosen_U].sum()),
        "uniform_errors": dict(zip(labels, errors_UK.sum(0).tolist(), strict=True)),
        "plan": {name: labels[k] for name, k in chosen.items()},
    }
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
    return merged(target, recipes, {name: plan["candidates"].index(label) for name, label in plan["plan"].items()})


def weight_bits(target: Target, recipe: ModelRecipe) -> float:
    """Stored bits per weight over the protocol's layers, scales and all that belongs to the weight counted."""
    stored = sum(layer_bytes(target, recipe, name)[0] for name in target.layers)
    return 8 * stored / sum(weight_matrix(target.module(name)).numel() for name in target.layers)


@torch.no_grad()
def sensitivities(target: Target, recipe: ModelRecipe, units: Sequence[Unit], calibration: Calibration) -> list[float]:
    """The relative squared error of the output for each unit, rounded alone; simulated, in float32.

    Two models stand side by side, one of them without any rounding, and a unit's modules change places.
    """
    exact, rounded = (
        build(target, each, dtype=torch.float32, device=calibration.device, backend="simulate")
        for each in (recipe.without_rounding(), recipe)
    )
    rounds = {name for name, layer in quant_layers(rounded).items() if layer.weight_spec or layer.act_spec}
    steps = spread(calibration.num_steps, MAX_STEPS).tolist()
    outputs = {step: _output(exact, calibration, step) for step in steps}
    errors = []
    for unit in progress(units, total=len(units), desc="sensitivities"):
        if not any(name in rounds or name in recipe.attention for name in unit):
            errors.append(0.0)
            continue
        before = {n: exact.get_submodule(n) for n in unit if n in recipe.layers}
        processors = {n: exact.get_submodule(n).processor for n in unit if n in recipe.attention}
        for name in before:
            set_submodule(exact, name, rounded.get_submodule(name))
        for name in processors:
            set_processor(exact, name, QuantAttnProcessor(recipe.attention[name], clock_of(exact)))
        found = []
        for step in steps:
            clock_of(rounded).set(step, calibration.num_steps)  # its modules keep its clock
            noise = (_output(exact, calibration, step) - outputs[step]).square().sum()
            found.append(float(noise / outputs[step].square().sum()))
        for name, module in before.items():
            set_submodule(exact, name, module)
        for name, processor in processors.items():
            set_processor(exact, name, processor)  # type: ignore[arg-type]
        errors.append(float(np.mean(found)))
    return errors


def _output(model: nn.Module, calibration: Calibration, step: int) -> Tensor:
    return calibration.call(model, step, calibration.rows(step, ROWS))[0].double()


def _cached(
    config: RunConfig, label: str, recipe: ModelRecipe, units: list[Unit], target: Target, recording: Calibration
) -> list[float]:
    made_by = {
        "method": [config.method, methods.source_sha256(config.method), asdict(config.params), config.seed],
        "bits": [label, config.raw["bits"]["weight"], config.raw["bits"]["act"]],
        "of": [list(target.layers), list(target.attention), [list(unit) for unit in units]],
        "code": code_identity(),
    }
    path = recording.cache and recording.cache / f"sensitivities-{canonical_sha256(made_by)[:16]}.json"
    if path is not None and path.exists():
        found = json.loads(path.read_text())
        recording.saved_s[f"sensitivities {label}"] = found["seconds"]
        return found["errors"]
    start = perf_counter()
    errors = sensitivities(target, recipe, units, recording)
    if path is not None:
        write_json(path, {"seconds": perf_counter() - start, "errors": errors})
    return errors


def _bytes(config, model, target, recipes, labels, units) -> tuple[np.ndarray, float]:
    """Of the stored transformer: of each unit in each candidate, and of the rest."""
    costs_UK = np.array([[sum(_stored(target, recipe, unit)) for recipe in recipes] for unit in units], dtype=float)
    macs = count_macs(model.transformer, model.step_inputs(1))
    whole_K = [account(target, recipe, macs, "")[1]["model_bytes"] for recipe in recipes]
    return costs_UK, float(max(whole_K - costs_UK.sum(0)))


def _average_weight_bits(config, model, target, recipes, labels, units) -> tuple[np.ndarray, float]:
    """8 · bytes of weights / number of weights, over the protocol's layers."""
    count = sum(weight_matrix(target.module(name)).numel() for name in target.layers)
    own = [tuple(name for name in unit if name in target.layers) for unit in units]
    stored_UK = [[sum(layer_bytes(target, recipe, name)[0] for name in unit) for recipe in recipes] for unit in own]
    return 8 * np.array(stored_UK, dtype=float) / count, 0.0


def _stored(target: Target, recipe: ModelRecipe, unit: Unit) -> list[int]:
    return [sum(layer_bytes(target, recipe, name)) for name in unit if name in recipe.layers]


def _latency_ms(config, model, target, recipes, labels, units) -> tuple[np.ndarray, float]:
    """Of each unit's layers inside a call, per candidate; the rest of the call is the slowest candidate's.

    Raises:
        UserError: a layer of a candidate has no kernel here that computes in its format.
    """
    section, dtype = config.section("measure"), getattr(torch, config.section("generate")["dtype"])
    inputs = placed(model.step_inputs(2 * section["samples"]), dtype, config.device)
    columns, rests = [], []
    for label, recipe in zip(labels, recipes, strict=True):
        built = build(target, recipe, dtype=dtype, device=config.device, backend=config.backend)
        for name, layer in quant_layers(built).items():
            if (layer.weight_spec or layer.act_spec) and layer.kind != "measured" or recipe.attention:
                raise UserError(
                    f"bits.budget.latency_ms: {name} as {label} is simulated on this device (backend {layer.backend}), "
                    "so its latency is not known; take formats that run here (ditbench list backends), or another budget"
                )
        times_ms, call_ms = layer_times(built, units, inputs, section["warmup"], section["repeats"], config.device)
        columns.append(times_ms)
        rests.append(call_ms - sum(times_ms))
    return np.array(columns).T, max(rests)


@torch.no_grad()
def layer_times(
    model: nn.Module, units: Sequence[Unit], inputs: dict[str, Any], warmup: int, repeats: int, device: torch.device
) -> tuple[list[float], float]:
    """(ms of each unit's layers in one call, ms of the whole call), medians over the repeats."""
    unit_of = {name: index for index, unit in enumerate(units) for name in unit}
    spent, started = np.zeros(len(units)), {"at": 0.0}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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


COSTS = {"bytes": _bytes, "average_weight_bits": _average_weight_bits, "latency_ms": _latency_ms}
