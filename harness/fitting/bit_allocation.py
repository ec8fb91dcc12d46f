"""A bit plan: for every layer, in every range of denoising steps, one of several candidate formats, with the least error
that a budget allows.

With e_ruk the error of unit u in candidate k in range r, and x_ruk ∈ {0, 1} whether u takes k there:

    minimise Σ e_ruk x_ruk   subject to   Σ_k x_ruk = 1,   cost ≤ budget,
    and for units u, v that read one tensor, for every activation format a:   Σ_{k of a} x_ruk = Σ_{k of a} x_rvk

What takes time costs in each range, Σ c_ruk x_ruk. What is stored costs once, however many ranges use it: for the parts h
that a unit holds in the candidates K_h,

    cost = Σ c_h y_h,   y_h ≥ Σ_{k ∈ K_h} x_ruk for every r

(w4a4 and w4a8 mostly share their weight; two widths in two ranges are two weights). Solved to optimality by SciPy's MILP
(HiGHS). Errors of different units are taken to add up.

Each candidate is a recipe of the whole model, fitted as if all of it had that format; a plan takes each layer's recipe from
its candidate. Layers are chosen together (a unit) where recipes of different candidates would not fit each other: the
readers of a folded transform and the quantized layer whose rows take it over, if the candidates' transforms differ; an
attention module's operands and its layers. Such units take one candidate for all steps: rows of a producer, or an
attention module's processor, are the same in all ranges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.serialize import content_sha256
from ditbench.harness.quant.target import Site, TableRows, Target

TOLERANCE = 1e-6  # up to which HiGHS keeps a constraint; a budget is kept, so that it is asked again for a little less
ROUNDING = 1e-12  # of sums of costs, in float64
Unit = tuple[str, ...]  # names of layers, and of attention modules


@dataclass(frozen=True)
class Held:
    """What unit `unit` holds if it takes any of `candidates` in any range."""

    unit: int
    candidates: tuple[int, ...]
    cost: float


@dataclass(frozen=True)
class Costs:
    """Of a plan: each_RUK for each range in which a unit takes a candidate, and what it holds, once."""

    each_RUK: np.ndarray
    held: tuple[Held, ...] = ()

    @staticmethod
    def of_parts(parts_UK: Sequence[Sequence[Mapping[object, int]]], ranges: int, divisor: float = 1.0) -> Costs:
        """parts_UK: {what: its size} of each unit in each candidate; what has the same key is held once."""
        sizes_UK = np.array([[sum(parts.values()) for parts in of_unit] for of_unit in parts_UK], dtype=float)
        if ranges == 1:
            return Costs(sizes_UK[None] / divisor)
        held = []
        for unit, of_unit in enumerate(parts_UK):
            by_candidates: dict[tuple[int, ...], float] = defaultdict(float)
            for key, size in {key: size for parts in of_unit for key, size in parts.items()}.items():
                by_candidates[tuple(k for k, parts in enumerate(of_unit) if key in parts)] += size
            held += [Held(unit, users, size / divisor) for users, size in by_candidates.items() if size]
        return Costs(np.zeros((ranges, *sizes_UK.shape)), tuple(held))

    def of(self, chosen_RU: np.ndarray) -> float:
        ranges, units = np.indices(chosen_RU.shape)
        once = sum(each.cost for each in self.held if np.isin(chosen_RU[:, each.unit], each.candidates).any())
        return float(self.each_RUK[ranges, units, chosen_RU].sum() + once)

    @property
    def largest(self) -> float:
        return float(max(self.each_RUK.max(), *(each.cost for each in self.held), 1e-300))


def units_of(target: Target, recipes: Sequence[ModelRecipe]) -> list[Unit]:
    """What is chosen together, in the order of execution; every name of any recipe is in exactly one unit."""
    names = list(dict.fromkeys(name for recipe in recipes for name in (*recipe.layers, *recipe.attention)))
    unit_of = {name: {name} for name in names}
    for group in _ties(target, recipes):
        joined = set().union(*(unit_of[name] for name in group))
        unit_of |= dict.fromkeys(joined, joined)
    order = {name: place for place, name in enumerate(dict.fromkeys((*target.layers, *names)))}
    distinct = {id(unit): tuple(sorted(unit, key=order.__getitem__)) for unit in unit_of.values()}
    return sorted(distinct.values(), key=lambda unit: order[unit[0]])


def merged(target: Target, recipes: Sequence[ModelRecipe], chosen: dict[str, int]) -> ModelRecipe:
    """The recipe of a plan. chosen: the candidate of every name that `units_of` gives."""
    layers = {n: recipes[k].layers[n] for n, k in chosen.items() if n in recipes[k].layers}
    folded = frozenset(
        site.name
        for site in target.sites
        for n in site.consumers[:1]
        if n in chosen and site.name in recipes[chosen[n]].folded
    )
    for site in target.sites:
        if site.name in folded and len({chosen[name] for name in site.consumers}) > 1:  # equal ones: see `units_of`
            shared = recipes[chosen[site.consumers[0]]].layers[site.consumers[0]].transform
            layers |= {name: replace(layers[name], transform=shared) for name in site.consumers}
    attention = {n: recipes[k].attention[n] for n, k in chosen.items() if n in recipes[k].attention}
    steps = next((recipe.num_steps for recipe in recipes if recipe.num_steps is not None), None)
    return ModelRecipe(layers, folded, attention, steps)


def merged_by_range(
    target: Target,
    recipes: Sequence[ModelRecipe],
    chosen_R: Sequence[dict[str, int]],
    starts: tuple[int, ...],
    steps: int,
) -> ModelRecipe:
    """The recipe of a plan by ranges of `steps` steps. chosen_R: for each range what `merged` takes."""
    first = merged(target, recipes, chosen_R[0])
    folded = {name for site in target.sites if site.name in first.folded for name in site.consumers}
    variants = {}
    for name in first.layers:
        taken = [chosen[name] for chosen in chosen_R]
        if len(set(taken)) > 1:
            made = {k: recipes[k].layers.get(name, LayerRecipe()) for k in set(taken)}
            if name in folded:  # equal ones: see `units_of`
                made = {k: replace(layer, transform=first.layers[name].transform) for k, layer in made.items()}
            made[taken[0]] = first.layers[name]
            variants[name] = tuple(made[k] for k in taken)
    return replace(first, num_steps=steps, variants=variants, starts=starts)


def fixed_units(target: Target, recipes: Sequence[ModelRecipe], units: Sequence[Unit]) -> list[int]:
    """Units that take one candidate for all steps."""
    tied = {name for group in _ties(target, recipes) for name in group}
    return [index for index, unit in enumerate(units) if not tied.isdisjoint(unit)]


def readers_of_one_tensor(target: Target, units: Sequence[Unit]) -> list[tuple[int, int]]:
    """Pairs of units with layers to quantize that read the same tensor."""
    place = {name: index for index, unit in enumerate(units) for name in unit}
    pairs = set()
    for group in (group for site in target.sites for group in site.groups):
        found = sorted({place[name] for name in group if name in place and name in target.layers})
        pairs |= set(combinations(found, 2))
    return sorted(pairs)


def solve(
    errors_RUK: np.ndarray,
    costs: Costs,
    budget: float,
    pairs: Sequence[tuple[int, int]] = (),
    acts_K: Sequence[object] = (),
    fixed: Sequence[int] = (),
) -> np.ndarray:
    """The candidate of every unit in every range, int64 (R, U).

    pairs: units whose candidates must have the same activation format. acts_K: that of each candidate. fixed: units that
    take one candidate in all ranges.

    Raises:
        UserError: even the cheapest plan costs more than the budget.
    """
    shape = errors_RUK.shape
    rules = _rules(shape, costs.held, pairs, acts_K, fixed)
    cost_N = np.concatenate([costs.each_RUK.ravel(), [each.cost for each in costs.held]])
    error_N = np.concatenate([errors_RUK.ravel(), np.zeros(len(costs.held))])
    least = costs.of(_milp(cost_N, shape, rules))
    if least - budget > ROUNDING * budget:
        left = (
            f"the budget leaves {budget:.6g}"
            if budget >= 0
            else f"what is not theirs takes {-budget:.6g} more than it has"
        )
        raise UserError(f"bits.budget is too small: these candidates take {least:.6g} at least, and {left}")
    limit = budget
    while True:
        within = LinearConstraint(cost_N[None] / costs.largest, -np.inf, limit / costs.largest)
        chosen = _milp(error_N, shape, [within, *rules])
        excess = costs.of(chosen) - budget
        if excess <= ROUNDING * budget:
            return chosen
        limit -= excess + TOLERANCE * costs.largest


def _milp(objective_N: np.ndarray, shape: tuple[int, ...], rules: Sequence[LinearConstraint]) -> np.ndarray:
    """The best plan (R, U). Variables are x_RUK, then one for each `Held`, which follows from them."""
    choices = int(np.prod(shape))
    found = milp(
        1e3 * objective_N / max(objective_N.max(), 1e-300),  # against HiGHS' absolute gap of 1e-6
        integrality=np.arange(len(objective_N)) < choices,
        bounds=Bounds(0, 1),
        constraints=rules,
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, f"a plan exists, and HiGHS says: {found.message}"
    return found.x[:choices].reshape(shape).argmax(2)


def _rules(
    shape: tuple[int, ...],
    held: Sequence[Held],
    pairs: Sequence[tuple[int, int]],
    acts_K: Sequence[object],
    fixed: Sequence[int],
) -> list[LinearConstraint]:
    ranges, units, candidates = shape
    place_RUK = np.arange(ranges * units * candidates).reshape(shape)
    one, equal, enough = [], [], []  # rows {variable: factor} that sum to 1, to 0, to at least 0
    for r in range(ranges):
        one += [dict.fromkeys(place_RUK[r, u], 1) for u in range(units)]
        for u, v in pairs:
            for act in dict.fromkeys(acts_K):
                of_act = [k for k in range(candidates) if acts_K[k] == act]
                equal.append(dict.fromkeys(place_RUK[r, u, of_act], 1) | dict.fromkeys(place_RUK[r, v, of_act], -1))
        equal += [{place_RUK[r, u, k]: 1, place_RUK[0, u, k]: -1} for u in fixed if r for k in range(candidates)]
        for h, each in enumerate(held):
            enough.append(dict.fromkeys(place_RUK[r, each.unit, each.candidates], -1) | {place_RUK.size + h: 1})
    width = place_RUK.size + len(held)
    return [
        LinearConstraint(_matrix(rows, width), least, most)
        for rows, least, most in ((one, 1, 1), (equal, 0, 0), (enough, 0, np.inf))
        if rows
    ]


def _matrix(rows: Sequence[Mapping[int, float]], width: int) -> csr_array:
    cells = [(index, column, value) for index, row in enumerate(rows) for column, value in row.items()]
    at, columns, values = zip(*cells, strict=True)
    return csr_array((values, (at, columns)), shape=(len(rows), width))


def _ties(target: Target, recipes: Sequence[ModelRecipe]) -> list[list[str]]:
    named = {name for recipe in recipes for name in recipe.layers}
    rounded = {name for recipe in recipes for name, layer in recipe.layers.items() if layer.weight is not None}
    ties = []
    for site in target.sites:
        if any(site.name in recipe.folded for recipe in recipes) and not _share_transform(site, recipes):
            makers = {p.linear for p in site.producers if not isinstance(p, TableRows)} & rounded
            ties.append([name for name in site.consumers if name in named] + sorted(makers))
    for attention in {name for recipe in recipes for name in recipe.attention}:
        ties.append([attention, *(name for name in named if name.startswith(f"{attention}."))])
    return ties


def _share_transform(site: Site, recipes: Sequence[ModelRecipe]) -> bool:
    """Whether all candidates fold one and the same transform there."""
    if not all(site.name in recipe.folded for recipe in recipes):
        return False
    transforms = [recipe.layers.get(site.consumers[0], LayerRecipe()).transform for recipe in recipes]
    return len({content_sha256(transform) for transform in transforms}) == 1
