"""DuQuant (Lin et al. 2024, arXiv:2406.01721) on a DiT: smoothing, then two fitted block rotations with a permutation between.

    Λ_c = max|X_c|^α / max|W_c|^(1−α);  X ← X / Λ · R₁ P R₂,  W ← W · Λ · R₁ P R₂,  weights rounded to nearest

    paper     here           meaning
    Λ         scale_C        one per layer input
    α         alpha          0.6
    R₁ P R₂   Dual           greedy block rotations around a zigzag permutation (`harness.quant.rotations`)
    swc, lac  weight_clip, act_clip   shares of a row's and of a token's range that are kept; 1 keeps all (the release: 0.8, 0.9)

Departs from the paper: fitted on a sample of tokens over all denoising steps; by default neither clipping ratios nor asymmetric ranges on both sides
(form=published has them), and no learned clipping (DuQuant+LWC); Λ is shared by all layers that read the same tensor and folded into its producer where one is known; the
rotations run online at every layer input (adaLN does not commute with them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.calibration.channel_statistics import channel_stats, of_site, token_sample, tokens_of_site
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.recipe import ModelRecipe, clipped, to_device
from ditbench.harness.quant.rotations import Dual, dual_rotation
from ditbench.harness.quant.smoothing import place, smoothing_scale, weight_absmax
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.samples.seeds import sample_seeds


@dataclass(frozen=True)
class Params:
    """Defaults are those of the released code's run scripts but for its clipping ratios."""

    alpha: float = 0.6
    floor: float = 1e-5  # on both ranges and on Λ: a dead channel must not divide by zero
    block_size: int = 128  # at most; the largest divisor of the width is taken
    steps: int = 256  # greedy
    tokens: int = 512  # that the rotations are fitted on, per layer input
    weight_clip: float = 1.0
    act_clip: float = 1.0  # of dynamic activations
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"duquant: alpha must be in [0, 1], got {self.alpha}")
        if not 0.0 < self.weight_clip <= 1.0 or not 0.0 < self.act_clip <= 1.0:
            raise ValueError(
                f"duquant: weight_clip and act_clip must be in (0, 1], got {self.weight_clip} and {self.act_clip}"
            )
        if self.block_size < 1 or self.steps < 0 or self.tokens < 1:
            raise ValueError(
                "duquant: block_size and tokens must be at least 1, steps at least 0; "
                f"got {self.block_size}, {self.tokens}, {self.steps}"
            )


FORMS = {
    PUBLISHED: Form(
        {"weight_clip": 0.8, "act_clip": 0.9},
        ASYMMETRIC_WEIGHTS | {"bits.act.symmetric": False, "calibration.n": 128},
    )
}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    sites, stats = target.linear_sites(), channel_stats(target, calibration)
    tokens = token_sample(target, calibration, sites, params.tokens)
    state: dict[str, Tensor] = {}
    for site, seed in zip(sites, sample_seeds(params.seed, len(sites), stream="duquant"), strict=True):
        absmax_C = of_site(stats, site).absmax_C
        scale_C = smoothing_scale(absmax_C, weight_absmax(target, site), params.alpha, params.floor)
        generator = torch.Generator().manual_seed(seed)
        x_NC = tokens_of_site(tokens, site).to(target.device) / scale_C.to(target.device)
        dual = dual_rotation(x_NC, params.block_size, params.steps, generator)
        state |= {f"{site.name}/scale": scale_C} | dual.state(site.name)
    return state | static_ranges(target, bits, calibration, *placement(target, state))


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    transforms, folded = placement(target, state)
    weights = {}
    if bits.weight is not None and params.weight_clip != 1:
        for name in target.layers:
            weight_OC = effective_linear(target, name, transforms, folded).weight_OC
            rounded = quantize_weight(weight_OC, bits.weight, ratios=(params.weight_clip, params.weight_clip))
            weights[name] = to_device(rounded, "cpu")
    return clipped(nearest(target, bits, state, transforms, folded, weights=weights), params.act_clip)


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    by_site = {}
    for site in target.linear_sites():
        rotations = Dual.from_state(site.name, state).rotations()
        by_site[site.name] = Transform(scale_C=state[f"{site.name}/scale"], rotations=rotations)
    return place(target, by_site)
