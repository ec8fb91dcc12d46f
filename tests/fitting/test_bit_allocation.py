"""Bit plans: the MILP against trying everything, and what must be chosen together."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from ditbench.harness.build.build import build
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.bit_allocation import Costs, fixed_units, merged, readers_of_one_tensor, solve, units_of
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC

ACTS = (4, 8, 8)  # of w4a4, w4a8, w8a8


def tables(seed: int, units: int = 5, candidates: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Errors over six orders of magnitude; whole costs, so that sums can meet a budget exactly."""
    generator = np.random.default_rng(seed)
    errors_UK = 10.0 ** generator.uniform(-7, -1, (units, candidates))
    return errors_UK, generator.integers(1, 1000, (units, candidates)).astype(float) * 1e6


def one_plan(errors_UK, costs_UK, budget, pairs=()) -> np.ndarray:
    """The plan for one range of all steps."""
    return solve(errors_UK[None], Costs(costs_UK[None]), budget, pairs, ACTS)[0]


def best(errors_UK, costs_UK, budget, pairs=()) -> float:
    """The least error of all plans."""
    every = np.arange(len(errors_UK))
    allowed = [
        errors_UK[every, list(plan)].sum()
        for plan in product(range(errors_UK.shape[1]), repeat=len(errors_UK))
        if costs_UK[every, list(plan)].sum() <= budget and all(ACTS[plan[u]] == ACTS[plan[v]] for u, v in pairs)
    ]
    return min(allowed)


@pytest.mark.parametrize("pairs", [(), ((0, 1), (2, 4))], ids=["free", "two sites"])
@pytest.mark.parametrize("seed", range(8))
def test_the_plan_is_the_best_of_all_plans_and_keeps_the_budget(seed, pairs):
    errors_UK, costs_UK = tables(seed)
    every = np.arange(len(errors_UK))
    least = costs_UK[every, one_plan(costs_UK, costs_UK, np.inf, pairs)].sum()
    for budget in np.linspace(least, costs_UK.max(1).sum(), 4):
        chosen_U = one_plan(errors_UK, costs_UK, budget, pairs)
        assert costs_UK[every, chosen_U].sum() <= budget
        assert all(ACTS[chosen_U[u]] == ACTS[chosen_U[v]] for u, v in pairs)
        assert errors_UK[every, chosen_U].sum() == pytest.approx(best(errors_UK, costs_UK, budget, pairs), rel=1e-6)


def test_a_budget_that_is_met_exactly_is_enough_and_one_less_is_not():
    errors_UK, costs_UK = tables(3)
    cheapest = costs_UK.min(1).sum()
    assert np.array_equal(one_plan(errors_UK, costs_UK, cheapest), costs_UK.argmin(1))
    with pytest.raises(UserError, match=r"these candidates take .* at least, and the budget leaves"):
        one_plan(errors_UK, costs_UK, cheapest - 1)


def test_more_budget_never_means_more_error():
    errors_UK, costs_UK = tables(5, units=8)
    every = np.arange(len(errors_UK))
    budgets = np.linspace(costs_UK.min(1).sum(), costs_UK.max(1).sum(), 25)
    errors = [errors_UK[every, one_plan(errors_UK, costs_UK, budget)].sum() for budget in budgets]
    assert all(later <= earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] == pytest.approx(errors_UK.min(1).sum()) and errors[0] > 2 * errors[-1]


RANGES, UNITS = 2, 4
SHARED = {  # of w4a4, w4a8, w8a8: the first two hold one weight; each has static ranges of its own
    "weights": lambda u, size: [{"w4": size, 4: 1e5}, {"w4": size, 8: 2e5}, {"w8": 2 * size, 8: 2e5}],
    "nothing": lambda u, size: [{k: (k + 1) * size} for k in range(3)],
    "all but a bit": lambda u, size: [{"w": 5 * size, k: (2 - k) * size} for k in range(3)],
}


def by_ranges(seed: int, shared: str | None):
    """(errors_RUK, costs, what a plan costs: written out, apart from the code)."""
    generator = np.random.default_rng(seed)
    errors_RUK = 10.0 ** generator.uniform(-7, -1, (RANGES, UNITS, 3))
    if shared is None:  # time: in each range of its own
        each_RUK = generator.integers(1, 1000, (RANGES, UNITS, 3)) * 1e-3
        return errors_RUK, Costs(each_RUK), lambda plan: sum(each_RUK[r, u, plan[r][u]] for r, u in PLACES)
    parts_UK = [SHARED[shared](u, int(generator.integers(1, 1000)) * 1000) for u in range(UNITS)]

    def stored(plan) -> float:
        held = {(u, key): size for r, u in PLACES for key, size in parts_UK[u][plan[r][u]].items()}
        return sum(held.values())

    return errors_RUK, Costs.of_parts(parts_UK, RANGES), stored


PLACES = list(product(range(RANGES), range(UNITS)))
OF_PAIRS = ((0, 1),)
FIXED = (3,)


def all_plans():
    """Every plan by ranges that keeps pairs and fixed units."""
    for flat in product(range(3), repeat=RANGES * UNITS):
        plan = np.array(flat).reshape(RANGES, UNITS)
        if all(ACTS[row[u]] == ACTS[row[v]] for row in plan for u, v in OF_PAIRS) and len(set(plan[:, 3])) == 1:
            yield plan


@pytest.mark.parametrize("shared", [None, *SHARED])
@pytest.mark.parametrize("seed", range(3))
def test_a_plan_by_ranges_is_the_best_of_all_and_keeps_the_budget(seed, shared):
    errors_RUK, costs, cost_of = by_ranges(seed, shared)
    ranges, units = np.indices((RANGES, UNITS))
    plans = list(all_plans())
    spent = np.array([cost_of(plan) for plan in plans])
    errors = np.array([errors_RUK[ranges, units, plan].sum() for plan in plans])
    for budget in np.linspace(spent.min(), spent.max(), 5):
        chosen_RU = solve(errors_RUK, costs, budget, OF_PAIRS, ACTS, FIXED)
        assert costs.of(chosen_RU) == pytest.approx(cost_of(chosen_RU)) and cost_of(chosen_RU) <= budget * (1 + 1e-9)
        assert any(np.array_equal(chosen_RU, plan) for plan in plans)
        allowed = errors[spent <= budget * (1 + 1e-9)]
        assert errors_RUK[ranges, units, chosen_RU].sum() == pytest.approx(allowed.min(), rel=1e-6)
    with pytest.raises(UserError, match="bits.budget is too small"):
        solve(errors_RUK, costs, 0.99 * spent.min(), OF_PAIRS, ACTS, FIXED)


@pytest.mark.parametrize("seed", range(4))
def test_ranges_never_mean_more_error_than_one_plan_for_all_steps_and_under_a_budget_of_time_mean_less(seed):
    errors_RUK, costs, cost_of = by_ranges(seed, None)
    same_RUK = Costs(np.broadcast_to(costs.each_RUK.mean(0), errors_RUK.shape).copy())
    ranges, units = np.indices((RANGES, UNITS))
    budget = same_RUK.each_RUK.mean(2).sum()
    found = solve(errors_RUK, same_RUK, budget, OF_PAIRS, ACTS)
    constant = solve(errors_RUK, same_RUK, budget, OF_PAIRS, ACTS, fixed=range(UNITS))
    assert np.array_equal(constant[0], constant[1])
    alone = one_plan(errors_RUK.sum(0), same_RUK.each_RUK.sum(0), budget, OF_PAIRS)
    assert np.array_equal(constant[0], alone)
    assert errors_RUK[ranges, units, found].sum() < errors_RUK[ranges, units, constant].sum()


def test_parts_of_one_range_cost_what_they_sum_to():
    parts_UK = [[{"w": 3, "s": 1}, {"w": 3}], [{}, {"w": 5}]]
    costs = Costs.of_parts(parts_UK, 1, divisor=2)
    assert costs.held == () and costs.each_RUK.tolist() == [[[2, 1.5], [0, 2.5]]]


def recipes_of(name, target, calibration, formats):
    module = registry.method(name)
    made = []
    for bits in formats:
        state = module.fit(target, calibration, bits, module.Params())
        made.append(module.apply(target, state, bits, module.Params()))
    return made


WIDTHS = [DYNAMIC.with_widths(3, 8), DYNAMIC.with_widths(8, 8)]


def test_transforms_that_do_not_depend_on_the_format_tie_nothing(small_target, small_calibration):
    recipes = recipes_of("smoothquant", small_target, small_calibration, WIDTHS)
    assert recipes[0].folded
    units = units_of(small_target, recipes)
    assert units == [(name,) for name in small_target.layers]
    assert fixed_units(small_target, recipes, units) == []


def test_readers_of_a_fold_that_differs_are_chosen_together_with_the_layer_that_takes_it_over(
    small_target, small_calibration
):
    """A method's scales may depend on the format; here they are made to differ."""
    module = registry.method("vidit_q")
    recipes = []
    for alpha in (0.4, 0.6):
        params = module.Params(alpha=alpha)
        state = module.fit(small_target, small_calibration, DYNAMIC, params)
        recipes.append(module.apply(small_target, state, DYNAMIC, params))
    units = units_of(small_target, recipes)
    readers = {n for site in small_target.sites if site.name in recipes[0].folded for n in site.consumers}
    tied = [index for index, unit in enumerate(units) if readers & set(unit)]
    assert fixed_units(small_target, recipes, units) == tied and len(tied) < len(units)
    for site in small_target.sites:
        if site.name in recipes[0].folded:
            (unit,) = [unit for unit in units if site.consumers[0] in unit]
            makers = {producer.linear for producer in site.producers} & set(small_target.layers)
            assert {*site.consumers, *makers} <= set(unit)
    attention = "transformer_blocks.0.attn1"
    assert any({f"{attention}.to_v", f"{attention}.to_out.0"} <= set(unit) for unit in units)
    assert sorted(name for unit in units for name in unit) == sorted(small_target.layers)


@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize("name", ["smoothquant", "htg", "vidit_q", "clq"])
def test_a_mixed_recipe_without_rounding_is_the_float_model(small_model, small_calibration, name, scope):
    """Whatever is chosen for each unit: folds and transforms of different candidates fit each other."""
    target = small_model.target(scope)
    formats = WIDTHS if name != "htg" else [STATIC, STATIC.with_widths(4, 8)]
    recipes = recipes_of(name, target, small_calibration, formats)
    chosen = {name: index % 2 for index, unit in enumerate(units_of(target, recipes)) for name in unit}
    recipe = merged(target, recipes, chosen)
    exact = build(target, recipe.without_rounding(), dtype=torch.float64)
    plain = build(target, type(recipe)({}), dtype=torch.float64)
    inputs = small_calibration.rows(1, 2)
    with torch.no_grad():
        ours, theirs = (small_calibration.call(model, 1, inputs)[0] for model in (exact, plain))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-10
    widths = {layer.weight.spec.bits for layer in recipe.layers.values() if layer.weight is not None}
    assert len(widths) == 2 or len(units_of(target, recipes)) == 1


def test_one_candidate_is_the_uniform_recipe(small_target, small_calibration):
    (recipe,) = recipes_of("smoothquant", small_target, small_calibration, [DYNAMIC])
    again = merged(small_target, [recipe], {name: 0 for unit in units_of(small_target, [recipe]) for name in unit})
    assert (again.folded, again.num_steps) == (recipe.folded, recipe.num_steps)
    assert all(again.layers[name] is layer for name, layer in recipe.layers.items())


def test_layers_that_read_one_tensor_are_paired(small_target):
    units = [(name,) for name in small_target.layers]
    named = {(units[u][0], units[v][0]) for u, v in readers_of_one_tensor(small_target, units)}
    attention = "transformer_blocks.0.attn1"
    assert {(f"{attention}.to_q", f"{attention}.to_k"), (f"{attention}.to_q", f"{attention}.to_v")} <= named
    assert all(u.rpartition(".")[0] == v.rpartition(".")[0] for u, v in named)


def test_attention_operands_are_chosen_with_their_layers(small_model, small_calibration):
    target = small_model.target("blocks", attention=True)
    recipes = recipes_of("rtn", target, small_calibration, [STATIC, STATIC.with_widths(4, 4)])
    units = units_of(target, recipes)
    for attention in target.attention:
        (unit,) = [unit for unit in units if attention in unit]
        assert {f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"} < set(unit)
    chosen = {name: int(name.startswith("transformer_blocks.0")) for unit in units for name in unit}
    recipe = merged(target, recipes, chosen)
    assert recipe.attention["transformer_blocks.0.attn1"].query.spec.bits == 4
    assert recipe.attention["transformer_blocks.1.attn1"].query.spec.bits == 8
