"""A bit plan: for every layer one of several candidate formats, with the least error that a budget allows.

With e_uk the error of unit u in candidate k, c_uk its cost, and x_uk ∈ {0, 1} whether u takes k:

    minimise Σ e_uk x_uk   subject to   Σ_k x_uk = 1,   Σ c_uk x_uk ≤ budget,
    and for units u, v that read one tensor, for every activation format a:   Σ_{k of a} x_uk = Σ_{k of a} x_vk

solved to optimality by SciPy's MILP (HiGHS). Errors of different units are taken to add up.

Each candidate is a recipe of the whole model, fitted as if all of it had that format; a plan takes each layer's recipe from
its candidate. Layers are chosen together (a unit) where recipes of different candidates would not fit each other: the
readers of a folded transform and the quantized layer whose rows take it over, if the candidates' transforms differ; an
attention module's operands and its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from harness.errors import UserError
from harness.quant.recipe import LayerRecipe, ModelRecipe
from harness.quant.serialize import encode
from harness.quant.target import Site, TableRows, Target
from harness.quant.transforms import Transform

TOLERANCE = 1e-6  # up to which HiGHS keeps a constraint; a budget is kept, so that it is asked again for a little less
ROUNDING = 1e-12  # of sums of costs, in float64
Unit = tuple[str, ...]  # names of layers, and of attention modules


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


def readers_of_one_site(target: Target, units: Sequence[Unit]) -> list[tuple[int, int]]:
    """Pairs of units with layers to quantize that read the same tensor."""
    place = {name: index for index, unit in enumerate(units) for name in unit}
    pairs = set()
    for site in target.sites:
        found = sorted({place[name] for name in site.consumers if name in place and name in target.layers})
        pairs |= set(combinations(found, 2))
    return sorted(pairs)


def solve(
    errors_UK: np.ndarray,
    costs_UK: np.ndarray,
    budget: float,
    pairs: Sequence[tuple[int, int]] = (),
    acts_K: Sequence[object] = (),
) -> np.ndarray:
    """The candidate of every unit, int64 (U,).

    pairs: units whose candidates must have the same activation format. acts_K: that of each candidate.

    Raises:
        UserError: even the cheapest plan costs more than the budget.
    """
    least = costs_UK[np.arange(len(costs_UK)), _milp(costs_UK, costs_UK, np.inf, pairs, acts_K)].sum()
    if least > budget:
        raise UserError(f"the least that these candidates can take is {least:.6g}, above the budget of {budget:.6g}")
    limit = budget
    while True:
        chosen = _milp(errors_UK, costs_UK, limit, pairs, acts_K)
        excess = costs_UK[np.arange(len(costs_UK)), chosen].sum() - budget
        if excess <= ROUNDING * budget:
            return chosen
        limit -= excess + TOLERANCE * costs_UK.max()


def _milp(
    errors_UK: np.ndarray,
    costs_UK: np.ndarray,
    limit: float,
    pairs: Sequence[tuple[int, int]],
    acts_K: Sequence[object],
) -> np.ndarray:
    units, candidates = errors_UK.shape
    one_each = csr_array(np.kron(np.eye(units), np.ones(candidates)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if np.isfinite(limit):
        unit = max(costs_UK.max(), 1e-300)
        constraints.append(LinearConstraint(costs_UK.reshape(1, -1) / unit, -np.inf, limit / unit))
    rows = []
    for first, second in pairs:
        for act in set(acts_K):
            row_UK = np.zeros((units, candidates))
            row_UK[first] += [each == act for each in acts_K]
            row_UK[second] -= [each == act for each in acts_K]
            rows.append(row_UK.ravel())
    if rows:
        constraints.append(LinearConstraint(csr_array(np.array(rows)), 0, 0))
    scaled_UK = 1e3 * errors_UK / max(errors_UK.max(), 1e-300)  # against HiGHS' absolute gap of 1e-6
    found = milp(
        scaled_UK.ravel(),
        integrality=np.ones(units * candidates),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, f"a plan exists, and HiGHS says: {found.message}"
    return found.x.reshape(units, candidates).argmax(1)


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
    first, *others = (recipe.layers.get(site.consumers[0], LayerRecipe()).transform for recipe in recipes)
    return all(_equal(first, other) for other in others)


def _equal(first: Transform, second: Transform) -> bool:
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    try:
        same = encode(first, "", ours) == encode(second, "", theirs)
    except UserError:  # a plugin's own rotation, of which nothing is known
        return first is second
    return same and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
