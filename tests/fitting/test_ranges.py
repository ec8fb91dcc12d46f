"""Plans by ranges of denoising steps: the built model follows the plan, holds what is counted, and survives a file."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ditbench.harness.build.build import build, clock_of, quant_layers
from ditbench.harness.build.export import load_quantized, save_quantized
from ditbench.harness.build.layer import RangedLinear
from ditbench.harness.fitting import mixed_precision, registry
from ditbench.harness.fitting.bit_allocation import Unit, fixed_units, merged, merged_by_range, units_of
from ditbench.harness.fitting.conformance import DYNAMIC, SMALL_DIT, STATIC
from ditbench.harness.measurement import latency
from ditbench.harness.measurement.layer_errors import error_atlas, layer_table
from ditbench.harness.measurement.parity import layer_parity
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.accounting import account, layer_bytes, stored_bytes
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.steps import StepClock, range_starts, step_ranges
from ditbench.harness.quant.target import Target

STEPS, STARTS = 4, (0, 1, 3)  # of small_calibration
FORMATS = [DYNAMIC.with_widths(4, 4), DYNAMIC.with_widths(4, 8), DYNAMIC.with_widths(8, 8)]
STATICS = [STATIC.with_widths(4, 8), STATIC.with_widths(8, 8)]
CASES = {  # method, scope, formats: folds that agree, online rotations, low-rank branches, tables by step, tied units
    "smoothquant": ("smoothquant", "all", [*FORMATS, Bits(None, None)]),
    "quarot": ("quarot", "blocks", FORMATS),
    "svdquant": ("svdquant", "blocks", FORMATS[1:]),
    "htg": ("htg", "all", STATICS),
    "vidit_q": ("vidit_q", "blocks", FORMATS),
}
LAYER = "transformer_blocks.1.ff.net.2"


class Planned(NamedTuple):
    """recipe: of a plan that goes through the candidates; alone: that of each range, as a plan for all steps."""

    target: Target
    recipe: ModelRecipe
    alone: list[ModelRecipe]
    recipes: list[ModelRecipe]
    units: list[Unit]
    chosen_RU: np.ndarray


@pytest.fixture(scope="module")
def planned(small_model, small_calibration):
    """planned(case) → Planned."""

    @cache
    def make(case: str):
        name, scope, formats = CASES[case]
        module, target = registry.method(name), small_model.target(scope)
        params, recipes = module.Params(), []
        for bits in formats:
            state = module.fit(target, small_calibration, bits, params)
            recipes.append(module.apply(target, state, bits, params))
        units = units_of(target, recipes)
        fixed = fixed_units(target, recipes, units)
        chosen_RU = np.array(
            [[(u + (0 if u in fixed else index)) % len(formats) for u in range(len(units))] for index in (0, 1, 0)]
        )
        chosen_R = [{n: k for unit, k in zip(units, row, strict=True) for n in unit} for row in chosen_RU.tolist()]
        alone = [merged(target, recipes, chosen) for chosen in chosen_R]
        recipe = merged_by_range(target, recipes, chosen_R, STARTS, STEPS)
        return Planned(target, recipe, alone, recipes, units, chosen_RU)

    return make


every_case = pytest.mark.parametrize("case", CASES)


def at_step(model, calibration, step):
    with torch.no_grad():
        return calibration.call(model, step, calibration.rows(step, 3))[0]


@pytest.mark.parametrize("backend", ["auto", "simulate"])
@every_case
def test_at_each_step_the_model_is_the_one_built_for_its_range_bit_for_bit(case, backend, planned, small_calibration):
    target, recipe, alone, *_ = planned(case)
    model = build(target, recipe, backend=backend)
    assert any(isinstance(module, RangedLinear) for module in model.modules())
    for steps, own in zip(step_ranges(STARTS, STEPS), alone, strict=True):
        uniform = build(target, own, backend=backend)
        for step in steps:
            expected = at_step(uniform, small_calibration, step)
            assert torch.equal(at_step(model, small_calibration, step), expected)
    first, second = (build(target, own, backend=backend) for own in alone[:2])
    assert not torch.equal(at_step(first, small_calibration, 1), at_step(second, small_calibration, 1))


@every_case
def test_without_rounding_it_is_the_float_model(case, planned, small_calibration):
    target, recipe, *_ = planned(case)
    exact = build(target, recipe.without_rounding(), dtype=torch.float64)
    plain = build(target, ModelRecipe({}), dtype=torch.float64)
    ours, theirs = (at_step(model, small_calibration, 3) for model in (exact, plain))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-10


@every_case
def test_the_bytes_counted_are_those_of_the_file_and_of_the_model(case, planned, small_model, tmp_path):
    """What only some of a part's tensors share (one factor of two branches, one of two tables), the model holds once."""
    target, recipe, alone, *_ = planned(case)
    macs = small_model.macs
    _, size = account(target, recipe, macs, "")
    described = save_quantized(tmp_path / "export", target, recipe, dtype=torch.bfloat16, about={})
    assert described["tensors"]["bytes"] == size["model_bytes"]
    model = build(target, recipe, backend="simulate")
    buffers = {name for name, _ in target.transformer.named_buffers()}
    held = {id(t): t for name, t in model.state_dict(keep_vars=True).items() if name not in buffers}
    index_bytes = {torch.int64: 2}
    held_bytes = sum(t.numel() * index_bytes.get(t.dtype, t.itemsize) for t in held.values())
    assert held_bytes <= size["model_bytes"] if case in ("svdquant", "htg") else held_bytes == size["model_bytes"]
    of_each = [account(target, own, macs, "")[1]["model_bytes"] for own in alone]
    assert max(of_each) < size["model_bytes"]


@every_case
def test_a_plan_costs_what_its_recipe_holds(case, planned, small_model):
    """The constraint of the MILP against the accounting of what was built."""
    target, recipe, _, recipes, units, chosen_RU = planned(case)
    macs = small_model.macs
    shares_R = np.diff((*STARTS, STEPS)) / STEPS
    costs, rest = mixed_precision._bytes(None, small_model, target, recipes, [], units, shares_R)
    assert costs.of(chosen_RU) + rest == account(target, recipe, macs, "")[1]["model_bytes"]
    costs, rest = mixed_precision._average_weight_bits(None, small_model, target, recipes, [], units, shares_R)
    assert costs.of(chosen_RU) + rest == pytest.approx(mixed_precision.weight_bits(target, recipe))


def test_one_weight_under_two_activation_formats_is_counted_and_held_once(small_target, small_calibration):
    rtn = registry.method("rtn")
    recipes = [rtn.apply(small_target, {}, bits, rtn.Params()) for bits in FORMATS]
    everything = [dict.fromkeys(small_target.layers, k) for k in range(3)]
    plans = {
        "acts": merged_by_range(small_target, recipes, everything[:2], (0, 2), STEPS),
        "weights": merged_by_range(small_target, recipes, everything[1:], (0, 2), STEPS),
    }
    w4, w8 = (stored_bytes(recipes[k].layers[LAYER], folded=False) for k in (0, 2))
    assert layer_bytes(small_target, plans["acts"], LAYER)[0] == w4
    assert layer_bytes(small_target, plans["weights"], LAYER)[0] == w4 + w8
    alone = latency.resident_bytes(build(small_target, recipes[0], backend="simulate"))
    assert latency.resident_bytes(build(small_target, plans["acts"], backend="simulate")) == alone


def test_effective_bits_are_means_over_the_steps_and_stored_bits_are_not(small_model, small_target):
    rtn = registry.method("rtn")
    recipes = [rtn.apply(small_target, {}, bits, rtn.Params()) for bits in (FORMATS[0], FORMATS[2])]
    everything = [dict.fromkeys(small_target.layers, k) for k in (0, 1)]
    recipe = merged_by_range(small_target, recipes, everything, (0, 1), STEPS)  # one step, three steps
    macs = small_model.macs
    (low, high), (found, _) = (
        [account(small_target, each, macs, "")[0] for each in recipes],
        account(small_target, recipe, macs, ""),
    )
    assert found["act_bits_effective"] == pytest.approx(
        (low["act_bits_effective"] + 3 * high["act_bits_effective"]) / 4
    )
    both = low["weight_bits_quantized_layers"] + high["weight_bits_quantized_layers"]
    assert found["weight_bits_quantized_layers"] == pytest.approx(both)
    assert found["mac_share_quantized"] == pytest.approx(low["mac_share_quantized"])
    half = {name: (layer, LayerRecipe()) for name, layer in recipes[0].layers.items()}
    halved = ModelRecipe(recipes[0].layers, num_steps=STEPS, variants=half, starts=(0, 1))
    found = account(small_target, halved, macs, "")[0]
    assert found["mac_share_quantized"] == pytest.approx(low["mac_share_quantized"] / 4)
    assert found["float_layers"] == low["float_layers"]


@every_case
def test_a_reloaded_export_computes_the_same_bit_for_bit(case, planned, small_calibration, tmp_path):
    target, recipe, *_ = planned(case)
    save_quantized(tmp_path / "export", target, recipe, dtype=torch.bfloat16, about={})
    another = load_model(ModelSpec("another", "dit", random=SMALL_DIT, seed=1)).transformer
    again, model = load_quantized(tmp_path / "export", another), build(target, recipe)
    for step in range(STEPS):
        assert torch.equal(at_step(again, small_calibration, step), at_step(model, small_calibration, step))
    variants = [len(module.variants) for module in again.modules() if isinstance(module, RangedLinear)]
    assert variants and set(variants) == {2}  # of three ranges


@pytest.fixture
def compiled_once():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def test_a_compiled_layer_has_no_graph_break_and_is_compiled_once_for_each_range(planned, normal, compiled_once):
    target, recipe, *_ = planned("smoothquant")
    model = build(target, recipe, backend="simulate")
    layer, x = model.get_submodule(LAYER), normal(2, 16, 192).bfloat16()
    assert isinstance(layer, RangedLinear)
    expected = []
    for step in range(STEPS):
        model.clock.set(step, STEPS)
        expected.append(layer(x))
    run = torch.compile(layer, backend=compiled_once, fullgraph=True, dynamic=False)
    for _ in range(2):
        for step in range(STEPS):
            model.clock.set(step, STEPS)
            assert torch.equal(run(x), expected[step])
    assert compiled_once.frame_count == len(STARTS)


def test_a_compiled_model_that_sets_its_own_clock_is_compiled_for_ranges_and_not_for_steps(compiled_once):
    """As a hook of a pipeline does, inside what is compiled: the step is then a number of the graph."""
    clock = StepClock(12, (0, 5, 9))

    @torch.compile(backend=compiled_once, fullgraph=True)
    def call(x, step):
        clock.set(step, 12)
        return x + clock.range

    for step in range(12):
        assert float(call(torch.zeros(()), step)) == (step >= 5) + (step >= 9)
    assert compiled_once.frame_count <= 2 * len(clock.starts)  # the first step of all is taken as a constant


def test_the_table_of_layers_has_what_runs_and_the_mean_width(planned, small_calibration):
    target, recipe, *_ = planned("quarot")
    model = build(target, recipe, dtype=torch.float32, backend="simulate")
    atlas = error_atlas(target, recipe, model, small_calibration)
    rows = layer_table(model, atlas)
    for name, row in rows.items():
        widths = [(each.weight.spec.bits, each.act.spec.bits, part) for each, part in recipe.shares(name)]
        assert row["weight_bits"] == pytest.approx(sum(w * part for w, _, part in widths))
        assert row["act_bits"] == pytest.approx(sum(a * part for _, a, part in widths))
    assert set(rows) == set(target.layers)
    assert any(row["weight_bits"] == 6 for row in rows.values())


def test_the_atlas_sees_at_each_step_the_error_of_its_range(planned, small_calibration):
    target, recipe, alone, *_ = planned("quarot")
    found = error_atlas(target, recipe, build(target, recipe, backend="simulate"), small_calibration)
    for index, steps in enumerate(step_ranges(STARTS, STEPS)):
        model = build(target, alone[index], backend="simulate")
        expected = error_atlas(target, alone[index], model, small_calibration)
        assert found.names == expected.names
        assert (found.noise_LS[:, list(steps)] == expected.noise_LS[:, list(steps)]).all()


def test_parity_compares_the_layers_of_the_clocks_range(planned, small_calibration, monkeypatch):
    target, recipe, *_ = planned("quarot")
    model = build(target, recipe, dtype=torch.float32, backend="simulate")
    for index in range(len(STARTS)):
        for layer in quant_layers(model, index).values():
            layer.kind = "measured"  # so that simulated is held against simulated
    for step in (0, 1):
        clock_of(model).set(step, STEPS)
        found = layer_parity(target, recipe, model, lambda m, step=step: at_step(m, small_calibration, step))
        assert set(found) == set(target.layers)
        assert all(each.largest == 0 for each in found.values())


def test_a_latency_is_the_mean_over_the_steps(planned, monkeypatch):
    target, recipe, *_ = planned("quarot")
    model = build(target, recipe, backend="simulate")
    monkeypatch.setattr(latency, "_timed_call", lambda m, inputs, device: [1.0, 10.0, 100.0][clock_of(m).range])
    seconds = latency._mean_call(model, {}, torch.device("cpu"))
    assert seconds == pytest.approx((1 * 1 + 2 * 10 + 1 * 100) / STEPS)


@pytest.mark.parametrize(
    ("steps", "ranges", "starts"), [(20, 1, (0,)), (20, 3, (0, 6, 13)), (5, 5, (0, 1, 2, 3, 4)), (10, 4, (0, 2, 5, 7))]
)
def test_ranges_are_consecutive_and_nearly_equal(steps, ranges, starts):
    assert range_starts(steps, ranges) == starts
    found = step_ranges(starts, steps)
    assert [step for each in found for step in each] == list(range(steps))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    clock = StepClock(steps, starts)
    for index, each in enumerate(found):
        for step in each:
            clock.set(step, steps)
            assert clock.range == index
    clock.enter(0)
    assert (clock.range, int(clock.step)) == (0, 0)
