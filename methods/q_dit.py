"""Q-DiT (Chen et al. 2025, arXiv:2406.17343): groups of input channels in weights and activations, sizes by evolution.

With the C input channels of a layer cut into groups u of g consecutive ones, and W and X cut alike,

    Y = Σ_u Q(X_u) Q(W_u)ᵀ,   s = (max − min) / (2^b − 1),   Z = −round(min / s)

one (s, Z) per token and group (dynamic: from the input itself) and one per output channel and group. Weights by GPTQ.
The search (Alg. 1) looks for one g per layer input that keeps the output best, within a budget

    population: the preset first, then random;  best `top` of all so far;  mutations: each gene redrawn with a probability;
    crossovers: each gene from either of two parents;  filled up at random;  legal: mean(g) ≥ budget, not seen before

    paper             here             meaning
    g                 group_size       of both sides of a layer; q, k and v share their input and so their g
    (candidates)      sizes            32, 64, 128, 192, 288: all divide 1152 and 4608
    B(g) ≤ N_bitops   budget           least mean group size (None: that of the preset)

Where a size does not divide a layer's C, the divisor of C nearest to it takes its place.

Departs from the paper: the fitness is not FID but the relative squared error of the model's output against the float
model on part of the calibration (with weights rounded to nearest, as the release searches; `fitness_steps`,
`fitness_rows`), cheap enough for a CPU, and so the search is off unless asked for. Granularity and symmetry are the
method's, only the widths come from `bits`. GPTQ is calibrated on the sampler's whole trajectory, with guidance's null rows;
adaLN stays in float unless the protocol's scope says otherwise. In the release the search changes the weights' group
sizes only and GPTQ takes one size for all layers; here both sides follow it, and so does GPTQ. In FP8 groups are symmetric.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.block_stream import MAX_BYTES
from ditbench.harness.calibration.recording import Calibration, spread
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.blockwise import round_blockwise, weight_from_state, weight_state
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import E4M3, Bits, QuantSpec
from ditbench.harness.quant.target import Site, Target, weight_matrix

Candidate = tuple[int, ...]  # a group size per layer input
TRIES = 10  # times the number wanted, before a search that finds nothing new goes on with fewer


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's, but for the search: its fitness is another, and it is off."""

    group_size: int = 128  # the preset, of every layer unless searched
    weights: str = "gptq"  # gptq | rtn
    symmetric: bool = False
    damp: float = 0.01
    block: int = 128
    ahead: bool = True  # of GPTQ, see there
    max_bytes: int = MAX_BYTES  # of the hidden states kept at a time: so many rows are used
    search: str = "off"  # off | evolution
    sizes: tuple[int, ...] = (32, 64, 128, 192, 288)
    budget: float | None = None
    population: int = 50
    epochs: int = 10
    top: int = 10
    mutations: int = 25
    crossovers: int = 25
    mutation_probability: float = 0.1
    seed: int = 0
    fitness_steps: int = 4  # denoising steps that a candidate is judged at, spread over the trajectory
    fitness_rows: int = 4  # of the calibration, at each of them

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))  # Hydra gives a list
        for name, known in (("weights", ("gptq", "rtn")), ("search", ("off", "evolution"))):
            if getattr(self, name) not in known:
                raise ValueError(f"q_dit: {name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        counts = ("group_size", "population", "epochs", "top", "fitness_steps", "fitness_rows")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"q_dit: {name} must be at least 1, got {getattr(self, name)}")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"q_dit: sizes must be group sizes such as 32, 64, 128, got {list(self.sizes)}")
        if not 0.0 <= self.mutation_probability <= 1.0:
            raise ValueError(f"q_dit: mutation_probability must be in [0, 1], got {self.mutation_probability}")


FORMS = {PUBLISHED: Form({"search": "evolution", "ahead": False}, {"calibration.n": 256})}


def check_bits(bits: Bits) -> None:
    for spec in (bits.weight, bits.act):
        if spec is not None and spec.in_blocks:
            raise UserError(
                f"q_dit chooses the size of its groups, and bits={spec.name.lower()} has blocks of {spec.group_size}; take integers "
                "such as w4a8, fp8, or another method"
            )
    if bits.act is not None and not bits.act.dynamic:
        raise UserError("q_dit quantizes activations per token and group, dynamically; set bits.act.dynamic=true")


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    sites = grouped_sites(target)
    state: dict[str, Tensor] = {}
    sizes = preset(target, params.group_size)
    if params.search == "evolution" and (bits.weight or bits.act):
        sizes, best = search(target, calibration, bits, params)
        state["search/best_fitness"] = torch.tensor(best, dtype=torch.float64)
    state |= {f"{site.name}/group_size": torch.tensor(size) for site, size in zip(sites, sizes, strict=True)}
    if bits.weight is None or params.weights == "rtn":
        return state

    formats = bits_by_layer(target, bits, sizes, params)

    def round_weight(name: str, weight_OC: Tensor, hessian_CC: Tensor):
        return gptq(
            weight_OC, hessian_CC, formats[name].weight, damp=params.damp, block=params.block, ahead=params.ahead
        )

    weights = round_blockwise(target, calibration, round_weight, max_bytes=params.max_bytes)
    for name, weight in weights.items():
        state |= weight_state(name, weight)
    return state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    sizes = tuple(int(state[f"{site.name}/group_size"]) for site in grouped_sites(target))
    formats = bits_by_layer(target, bits, sizes, params)
    weights = {n: weight_from_state(n, state, formats[n].weight) for n in target.layers if f"{n}/codes" in state}
    return nearest(target, bits, state, weights=weights, bits_of_layer=formats)


def grouped_sites(target: Target) -> list[Site]:
    """One gene each: the inputs of the layers to quantize (four per block with the default scope)."""
    return [site for site in target.sites if any(name in target.layers for name in site.consumers)]


def preset(target: Target, group_size: int) -> Candidate:
    return tuple(nearest_divisor(width(target, site), group_size) for site in grouped_sites(target))


def nearest_divisor(channels: int, size: int) -> int:
    """size itself if it divides channels, else the divisor nearest to it (the larger one on ties)."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - size), -divisor))


def width(target: Target, site: Site) -> int:
    return weight_matrix(target.module(site.consumers[0])).shape[1]


def bits_by_layer(target: Target, bits: Bits, sizes: Candidate, params: Params) -> dict[str, Bits]:
    """The same group size on both sides of every layer; e4m3 has no zero point."""

    def grouped(spec: QuantSpec | None, size: int) -> QuantSpec | None:
        if spec is None:
            return None
        symmetric = params.symmetric or spec.number == E4M3
        return replace(spec, granularity="per_group", group_size=size, symmetric=symmetric)

    return {
        name: Bits(grouped(bits.weight, size), grouped(bits.act, size))
        for site, size in zip(grouped_sites(target), sizes, strict=True)
        for name in site.consumers
        if name in target.layers
    }


def search(target: Target, calibration: Calibration, bits: Bits, params: Params) -> tuple[Candidate, list[float]]:
    """The best candidate, and the best fitness so far after each epoch."""
    choices = [
        tuple(dict.fromkeys(nearest_divisor(width(target, site), size) for size in params.sizes))
        for site in grouped_sites(target)
    ]
    error = OutputError(target, calibration, bits, params)
    return evolve(choices, preset(target, params.group_size), error, params)


class OutputError:
    """The relative squared error of the model with a candidate's group sizes, on a sample of the calibration."""

    def __init__(self, target: Target, calibration: Calibration, bits: Bits, params: Params) -> None:
        self.target, self.bits, self.params, self.calibration = target, bits, params, calibration
        self.steps = spread(calibration.num_steps, params.fitness_steps).tolist()
        self.expected = list(self.outputs(float_copy(target, dtype=torch.float32, device=target.device)))

    def __call__(self, sizes: Candidate) -> float:
        formats = bits_by_layer(self.target, self.bits, sizes, self.params)
        recipe = nearest(self.target, self.bits, {}, bits_of_layer=formats)
        model = build(self.target, recipe, dtype=torch.float32, device=self.target.device)
        pairs = list(zip(self.outputs(model), self.expected, strict=True))
        noise = sum(float((ours - exact).double().square().sum()) for ours, exact in pairs)
        return noise / sum(float(exact.double().square().sum()) for _, exact in pairs)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Iterator[Tensor]:
        for step in self.steps:
            rows = self.calibration.rows(step, self.params.fitness_rows)
            yield self.calibration.call(model, step, rows).sample


def evolve(
    choices: list[tuple[int, ...]],
    first: Candidate,
    fitness: Callable[[Candidate], float],
    params: Params,
) -> tuple[Candidate, list[float]]:
    """Alg. 1 with the least fitness as the best; each candidate is evaluated once, `first` before all others.

    choices: the sizes of each gene.

    Raises:
        UserError: the preset itself is below the budget.
    """
    generator = random.Random(params.seed)
    budget = mean(first) if params.budget is None else params.budget
    if mean(first) < budget:
        raise UserError(
            f"method.budget={budget}: the preset's mean group size is {mean(first):g}; raise method.group_size"
        )
    seen = {first}
    scored: list[tuple[float, Candidate]] = []
    best: list[float] = []

    def draw(wanted: int, propose: Callable[[], Candidate]) -> list[Candidate]:
        """Up to `wanted` new legal candidates."""
        found: list[Candidate] = []
        for _ in range(TRIES * wanted):
            if len(found) == wanted:
                break
            candidate = propose()
            if mean(candidate) >= budget and candidate not in seen:
                seen.add(candidate)
                found.append(candidate)
        return found

    def at_random() -> Candidate:
        return tuple(generator.choice(sizes) for sizes in choices)

    def mutated() -> Candidate:
        parent = generator.choice(scored)[1]
        return tuple(
            generator.choice(sizes) if generator.random() < params.mutation_probability else size
            for sizes, size in zip(choices, parent, strict=True)
        )

    def crossed() -> Candidate:
        one, other = generator.choice(scored)[1], generator.choice(scored)[1]
        return tuple(generator.choice(genes) for genes in zip(one, other, strict=True))

    population = [first, *draw(params.population - 1, at_random)]
    for _ in range(params.epochs):
        scored += [(fitness(candidate), candidate) for candidate in population]
        scored = sorted(scored, key=lambda pair: pair[0])[: params.top]
        best.append(scored[0][0])
        population = draw(params.mutations, mutated) + draw(params.crossovers, crossed)
        population += draw(params.population - len(population), at_random)
    return scored[0][1], best


def mean(sizes: Candidate) -> float:
    return sum(sizes) / len(sizes)
