"""HTG (Ding et al. 2025, arXiv:2503.06930): shift and scale per channel, shared within groups of neighbouring timesteps.

Activations of a DiT have asymmetric channel outliers that drift over the timesteps. Per layer input and timestep

    z_t = (max X_t + min X_t) / 2                               Eq. 2, channel centre; max, min averaged over samples
    groups of neighbouring steps by z_t, z̄_g their mean          Alg. 1, Eq. 4
    m_T = max|X_T − z̄|,  m_t = α m_{t+1} + (1 − α) max|X_t − z̄|   in denoising order;  s = √(m_1 / max|W|)     Eq. 7
    X̂ = (X − z̄_g) / s,  Ŵ = W · s,  b̂_g = b + W z̄_g              Eq. 6: one integer weight for all groups

    paper   here                meaning
    z_t     centre_SC           per step and channel
    G       groups              10, one per step where there are fewer steps
    z̄_g     shift (table)       per group and channel
    α       momentum            0.99 at T = 100; at other T the power of it that leaves the noisiest step its weight
    s       scale_C             one per layer input, for all steps

The paper samples with T = 100 steps, where G = T / 10 and α^(T−1) = 0.37 is the weight of the noisiest step in m_1. Both describe
a trajectory, which 20 steps go through as 100 do: there G = 2 would leave most of the drift inside a group, and α = 0.99 would give the
noisiest step 0.83. So G is 10, and α_T = α^(99 / (T − 1)), whatever T is: the paper's own at T = 100 (`PAPER_STEPS`).

`parts` switches grouping, shift and scale for the ablation; without "group" all steps are one group.

Re-parameterisation (Alg. 2): the shift and scale of the q, k, v and first FFN inputs go into adaLN rows, those of the
output projection into the V rows (softmax rows sum to one). The second FFN layer is quantized plainly. Where the
protocol's activations are static, each group of steps has its own range.

Departs from the paper: its text was not available and two public re-implementations disagree; taken are the square-root
form of s with |X − z̄_g| (SmoothQuant at 0.5 on shifted activations) and squared distance between means as linkage. The
bias term W z̄_g, missing in one of them, is kept: without it the float output changes. The fold into V replaces an explicit
division. With dynamic activations (the default protocol) only shift and scale remain of the method; form=published has the
paper's static ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.calibration.channel_statistics import ChannelStats, channel_stats, of_site
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import PUBLISHED, STATIC_ACTIVATIONS, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.clustering import adjacent_clusters, group_means
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.smoothing import place, weight_absmax
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform

PARTS = ("group", "shift", "scale")
PAPER_STEPS = 100  # that `groups` and `momentum` are for


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's, of its 100 steps."""

    parts: str = "group+shift+scale"  # any of the three joined by +, or none
    groups: int = 10  # at most: no more than there are steps
    momentum: float = 0.99  # at PAPER_STEPS
    floor: float = 1e-5  # on both ranges: a dead channel must not divide by zero

    def __post_init__(self) -> None:
        if self.active - set(PARTS):
            raise ValueError(f"htg: parts are {', '.join(PARTS)} joined by +, or none; got {self.parts!r}")
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"htg: momentum must be in [0, 1], got {self.momentum}")
        if self.groups < 1:
            raise ValueError(f"htg: groups must be at least 1, got {self.groups}")

    @property
    def active(self) -> set[str]:
        return set() if self.parts == "none" else set(self.parts.split("+"))

    def groups_of(self, num_steps: int) -> int:
        """G, no more than there are steps."""
        return min(self.groups, num_steps) if "group" in self.active else 1

    def momentum_of(self, num_steps: int) -> float:
        """α_T, with which the noisiest of T steps has the weight that it has at PAPER_STEPS."""
        return self.momentum ** ((PAPER_STEPS - 1) / max(num_steps - 1, 1))


FORMS = {PUBLISHED: Form(settings=STATIC_ACTIVATIONS | {"calibration.n": 32})}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    stats = channel_stats(target, calibration)
    groups = params.groups_of(calibration.num_steps)
    state: dict[str, Tensor] = {"num_steps": torch.tensor(calibration.num_steps)}
    group_of_layer: dict[str, Tensor] = {}
    for site in target.linear_sites():
        site_stats = of_site(stats, site)
        centre_SC = site_stats.centre_SC
        group_of_step = adjacent_clusters(centre_SC, groups)
        group_of_layer |= dict.fromkeys(site.consumers, group_of_step)
        if not site.foldable:
            continue
        shift_GC = (
            group_means(centre_SC, group_of_step)
            if "shift" in params.active
            else torch.zeros(groups, centre_SC.shape[1])
        )
        state[f"{site.name}/shift"], state[f"{site.name}/group_of_step"] = shift_GC, group_of_step
        if "scale" in params.active:
            magnitude_SC = shifted_absmax(site_stats, shift_GC[group_of_step])
            state[f"{site.name}/scale"] = scaling(
                running_magnitude(magnitude_SC, params.momentum_of(len(magnitude_SC))),
                weight_absmax(target, site),
                params.floor,
            )
    transforms, folded = placement(target, state)
    return state | static_ranges(target, bits, calibration, transforms, folded, group_of_layer=group_of_layer)


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(target, bits, state, *placement(target, state), num_steps=int(state["num_steps"]))


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    by_site = {}
    for site in target.linear_sites():
        if f"{site.name}/shift" in state:
            shift = StepTable(state[f"{site.name}/shift"], state[f"{site.name}/group_of_step"])
            by_site[site.name] = Transform(shift=shift, scale_C=state.get(f"{site.name}/scale"))
    return place(target, by_site)


def shifted_absmax(stats: ChannelStats, shift_SC: Tensor) -> Tensor:
    """max|X_t − z̄| per step and channel, from the channel's extremes."""
    return torch.maximum(stats.max_SC - shift_SC, shift_SC - stats.min_SC)


def running_magnitude(magnitude_SC: Tensor, momentum: float) -> Tensor:
    """m_1, from the noisiest step (row 0) to the last (Eq. 7)."""
    running_C = magnitude_SC[0]
    for magnitude_C in magnitude_SC[1:]:
        running_C = momentum * running_C + (1 - momentum) * magnitude_C
    return running_C


def scaling(magnitude_C: Tensor, weight_absmax_C: Tensor, floor: float) -> Tensor:
    """s = √(m_1 / max|W|), one factor per input channel."""
    return (magnitude_C.clamp(min=floor) / weight_absmax_C.clamp(min=floor)).sqrt()
