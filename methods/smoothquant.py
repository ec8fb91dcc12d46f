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

import torch
from torch import Tensor

from harness.calibrate import Calibration
from harness.observe import channel_stats
from harness.quant.recipe import ModelRecipe
from harness.quant.rounding import nearest, static_ranges
from harness.quant.spec import Bits
from harness.quant.target import AdaLNRows, Site, Target, weight_matrix
from harness.quant.transforms import Transform


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's."""

    strength: float = 0.5
    floor: float = 1e-5  # on both ranges and on s: a dead channel must not divide by zero

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"smoothquant: strength must be in [0, 1], got {self.strength}")


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    stats = channel_stats(target, calibration)
    state = {
        f"{site.name}/scale": smoothing_scale(
            stats[site.consumers[0]].absmax_C, weight_absmax(target, site), params.strength, params.floor
        )
        for site in smoothed_sites(target)
    }
    return state | static_ranges(target, bits, calibration, *placement(target, state))


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(target, bits, state, *placement(target, state))


def smoothed_sites(target: Target) -> list[Site]:
    return [site for site in target.linear_sites() if isinstance(site.producer, AdaLNRows)]


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    """The transforms by layer, and the sites whose transform is folded into their producer (all of them)."""
    transforms = {}
    for site in smoothed_sites(target):
        shared = Transform(scale_C=state[f"{site.name}/scale"])
        transforms |= dict.fromkeys(site.consumers, shared)
    return transforms, frozenset(site.name for site in smoothed_sites(target))


def weight_absmax(target: Target, site: Site) -> Tensor:
    """Largest |weight| per input channel over all layers that read the site."""
    return torch.stack([weight_matrix(target.module(n)).float().abs().amax(0) for n in site.consumers]).amax(0)


def smoothing_scale(act_absmax_C: Tensor, weight_absmax_C: Tensor, strength: float, floor: float) -> Tensor:
    """Eq. 4, one factor per input channel."""
    act_range_C = act_absmax_C.clamp(min=floor)
    weight_range_C = weight_absmax_C.clamp(min=floor)
    return (act_range_C**strength / weight_range_C ** (1 - strength)).clamp(min=floor)
