"""ViDiT-Q (Zhao et al. 2025, arXiv:2406.02540, ICLR 2025): static channel scaling, then a random Hadamard rotation.

Channel imbalance of a diffusion transformer has a part that all timesteps share (scaled away) and a part that moves over
the timesteps (spread over all channels by a rotation). Per layer input

    mask_i = max|W_i|^α / max|X_i|^(1−α),   s = 1 / mask
    X̂ = X diag(s)⁻¹ Q,   Ŵ = W diag(s) Q,   X̂ Ŵᵀ = X Wᵀ,   Q = diag(±1) · H / √C

    paper     here                     meaning
    α         alpha                    exponent of the *weight* maximum: 1 − α is SmoothQuant's strength (equal at 0.5)
    s         scale_C                  1 / mask, what x is divided by
    max|X|    statistics               all_steps: over all denoising steps (as all code that could be read does); high_noise: at
                                       the first one (the static part, as notes of the paper's text have it)
    Q         Hadamard(C, signs)       one per layer input, signs drawn once with `seed`
    bit plan  mixed                    {regular expression of layer names: w<bits>a<bits>}, the others as `bits` says

Order matters: scale, then rotate. Activations per token and dynamic, weights rounded to nearest, as `bits` says (the
shipped configurations: weights asymmetric, activations symmetric).

Departs from the paper: the search for the bit plan (sensitivity of layer types by the metric each of them drives, budgets
by timestep interval) is not in; `mixed` takes a plan, which holds for all steps (on the command line
`'+method.mixed={attn1:w4a8,ff.net.2$:w8a8}'`: without the plus Hydra takes no new keys). One scale for q, k and v together, since
they share their input; it is folded into adaLN and V rows where the input comes from there and divided online before the
second FFN layer. α has no single default in the paper's configurations, which sweep it by model: 0.5 here. By default weights are symmetric, as `bits` has it (form=published:
asymmetric). Widths without
a Hadamard matrix take block-diagonal blocks of the largest admissible size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.calibration.channel_statistics import ChannelStats, channel_stats, of_site
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.smoothing import place, smoothing_scale, weight_absmax
from ditbench.harness.quant.spec import FLOAT_BITS, Bits, QuantSpec, parse_label
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Hadamard, Transform, random_signs

HIGHEST_NOISE = 0  # the first denoising step


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's, but for alpha; scale and rotate off one by one are the rows of its ablation."""

    alpha: float = 0.5
    statistics: str = "all_steps"  # all_steps | high_noise
    scale: bool = True
    rotate: bool = True
    mixed: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    floor: float = 1e-5  # on both ranges and on s: a dead channel must not divide by zero

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"vidit_q: alpha must be in [0, 1], got {self.alpha}")
        if self.statistics not in ("high_noise", "all_steps"):
            raise ValueError(f"vidit_q: statistics must be high_noise or all_steps, got {self.statistics!r}")
        for pattern, label in self.mixed.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"vidit_q: mixed: {pattern!r} is not a regular expression of layer names ({error})"
                ) from error
            parse_label(str(label))


FORMS = {PUBLISHED: Form(settings=ASYMMETRIC_WEIGHTS | {"calibration.n": 8})}  # its example for DiT: eight classes


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    bit_plan(target, bits, params)  # refused before the calibration rather than after it
    state: dict[str, Tensor] = {}
    if params.scale:
        stats = channel_stats(target, calibration)
        for site in target.linear_sites():
            act_absmax_C = activation_absmax(of_site(stats, site), params.statistics)
            weight_absmax_C = weight_absmax(target, site)
            state[f"{site.name}/scale"] = smoothing_scale(act_absmax_C, weight_absmax_C, 1 - params.alpha, params.floor)
    if params.rotate:
        generator = torch.Generator().manual_seed(params.seed)
        for site in target.linear_sites():
            width = target.module(site.consumers[0]).in_features
            state[f"{site.name}/signs"] = random_signs(width, generator)
    return state | static_ranges(target, bits, calibration, *placement(target, state))


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(target, bits, state, *placement(target, state), bits_of_layer=bit_plan(target, bits, params))


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    """A site without a producer divides online."""
    by_site = {}
    for site in target.linear_sites():
        signs_C = state.get(f"{site.name}/signs")
        rotations = () if signs_C is None else (Hadamard(len(signs_C), signs_C),)
        by_site[site.name] = Transform(scale_C=state.get(f"{site.name}/scale"), rotations=rotations)
    return place(target, by_site)


def activation_absmax(stats: ChannelStats, statistics: str) -> Tensor:
    """max|X_i|, one per channel."""
    return stats.absmax_SC[HIGHEST_NOISE] if statistics == "high_noise" else stats.absmax_C


def bit_plan(target: Target, bits: Bits, params: Params) -> dict[str, Bits]:
    """The format of every layer of the protocol: exactly one each. A side that `bits` leaves in float stays in float.

    Raises:
        UserError: a pattern that names no layer, or a layer that two patterns name.
    """
    plan = dict.fromkeys(target.layers, bits)
    named_by: dict[str, str] = {}
    for pattern, label in params.mixed.items():
        names = [name for name in target.layers if re.search(pattern, name)]
        if not names:
            raise UserError(f"method.mixed: {pattern!r} names no layer to quantize, such as {target.layers[0]}")
        weight, act = parse_label(label)
        for name in names:
            if name in named_by:
                raise UserError(
                    f"method.mixed: {named_by[name]!r} and {pattern!r} both name {name}; a layer has one width"
                )
            named_by[name] = pattern
            plan[name] = Bits(with_format(bits.weight, weight, "per_channel"), with_format(bits.act, act, "per_token"))
            plan[name].check_sides()
    return plan


def with_format(spec: QuantSpec | None, settings: Mapping[str, Any], granularity: str) -> QuantSpec | None:
    """What a label says of a side, in the granularity of the run; where that has blocks, in this one."""
    if spec is None or settings["bits"] == FLOAT_BITS:
        return None
    base = QuantSpec(settings["bits"], granularity, dynamic=spec.dynamic) if spec.in_blocks else spec
    return replace(base, **settings)
