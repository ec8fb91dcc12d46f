"""SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): move activation outliers into the weights, Eq. 4.

A linear layer computes Y = X Wᵀ, with X (B, T, C) and W (O, C). Per input channel j

    s_j = max|X_j|^α / max|W_j|^(1−α),     Y = (X / s) (W · s)ᵀ

    paper    here           meaning
    s_j      scale_C        factor per input channel, > 0
    α        strength       1 moves all range from X into W, 0 all range from W into X
    max|X|   act_absmax_C   largest |activation| over all calibration samples, tokens and denoising steps
    max|W|   weight_absmax_C  largest |weight| over all layers that read the same input (q, k and v share s)

Smoothed are the inputs that a norm produces (q, k, v and the first FFN layer), as in the paper; on a DiT the division is
folded into the rows of adaLN that make the input, so nothing runs online.

Departs from the paper: calibrated on the sampler's trajectory instead of text; the fold goes into adaLN, since DiT's
LayerNorm has no weight of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditbench.harness.calibration.channel_statistics import channel_stats, of_site
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.smoothing import place, smoothing_scale, weight_absmax
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.transforms import Transform


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's."""

    strength: float = 0.5
    floor: float = 1e-5  # on both ranges and on s: a dead channel must not divide by zero

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"smoothquant: strength must be in [0, 1], got {self.strength}")


FORMS = {
    PUBLISHED: Form()
}  # the defaults are the release's: α, symmetric weights per channel, dynamic activations per token


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    stats = channel_stats(target, calibration)
    state = {
        f"{site.name}/scale": smoothing_scale(
            of_site(stats, site).absmax_C, weight_absmax(target, site), params.strength, params.floor
        )
        for site in smoothed_sites(target)
    }
    return state | static_ranges(target, bits, calibration, *placement(target, state))


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(target, bits, state, *placement(target, state))


def smoothed_sites(target: Target) -> list[Site]:
    return [site for site in target.linear_sites() if site.modulated]


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    return place(target, {site.name: Transform(scale_C=state[f"{site.name}/scale"]) for site in smoothed_sites(target)})
