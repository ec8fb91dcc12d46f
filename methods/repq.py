"""RepQ-ViT (Li et al. 2023, arXiv:2212.08254) on a DiT: activations quantized per channel, re-parameterised to per tensor.

The input of q, k, v and of the first FFN layer first gets one quantizer per channel, (δ_c, z_c); a shift and a scale then
give all channels the same one, (δ̃, z̃), without changing the layer's output:

    δ̃ = mean δ,  z̃ = mean z,   r = δ / δ̃,   b = −z δ / r + z̃ δ̃
    x' = x / r − b,   W' = W · r,   bias' = bias + W' b

    paper      here            meaning
    δ, z       scale, zero_point of `quantize_weight` on the input's channels; percentile search of the paper ("mse")
    r          scale_C         what x is divided by
    r · b      shift           what is subtracted from x before: x' = (x − r b) / r
    δ̃, z̃       act_low, act_high of the layers: the ends of the one static range

The paper folds r and b into LayerNorm; a DiT's LayerNorm has no weight, so they go into the rows of adaLN that make the
input (as PTQ4DiT did for its RepQ-ViT rows). The weights' quantizers are set after that, by the same percentile search,
and the other layers' static ranges as well.

Where the protocol quantizes attention, the softmax map takes codes that are even in log√2 (static activations only):

    q = max(round(−2 log2(x / δ)), 0),   x̂ = δ 2^(−q/2), or 0 where q does not fit its bits

Departs from the paper: z̃ is rounded, so that codes are integers (the output is unchanged for any z̃). The softmax map has
8 bits whatever `bits` says, as in PTQ4DiT's protocol. A dead channel follows the others (r = 1). With dynamic activations
nothing is left of the one range; the fold is then made all the same, with the step sizes that the calibration gives, and
the quantizers are what `bits` says. With float activations there is nothing to re-parameterise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.channel_statistics import channel_stats, inputs_observed, of_site, run_calibration
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, STATIC_ACTIVATIONS, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.recipe import ModelRecipe, to_device
from ditbench.harness.quant.smoothing import place
from ditbench.harness.quant.spec import Bits, QuantSpec, needs_integers
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.transforms import Transform


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's."""

    ranges: str = "mse"  # of weights and activations: mse (percentile search) | minmax
    tokens: int = 64  # kept per model call for the search, beside each channel's extremes
    softmax: str = "log_sqrt2"  # codes of the map, where the protocol quantizes attention: log_sqrt2 | uniform
    floor: float = 1e-8  # a channel whose step is smaller counts as dead

    def __post_init__(self) -> None:
        if self.ranges not in ("mse", "minmax"):
            raise ValueError(f"repq: ranges must be mse or minmax, got {self.ranges!r}")
        if self.softmax not in ("log_sqrt2", "uniform"):
            raise ValueError(f"repq: softmax must be log_sqrt2 or uniform, got {self.softmax!r}")
        if self.tokens < 1:
            raise ValueError(f"repq: tokens must be at least 1, got {self.tokens}")


FORMS = {PUBLISHED: Form(settings=ASYMMETRIC_WEIGHTS | STATIC_ACTIVATIONS | {"calibration.n": 32})}


def check_bits(bits: Bits) -> None:
    needs_integers("repq", bits.weight, bits.act)


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    if bits.act is None:
        return {}
    state: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}
    values = channel_values(target, calibration, params.tokens)
    for site in reparameterised_sites(target):
        scale_C, zero_point_C = channel_quantizers(values[site.name], bits.act, params)
        shift_C, ratio_C, low, high = reparameterise(scale_C, zero_point_C, bits.act)
        state |= {f"{site.name}/shift": shift_C, f"{site.name}/scale": ratio_C}
        for name in site.consumers:
            ends |= {f"{name}/act_low": low[None], f"{name}/act_high": high[None]}
    ranges = static_ranges(
        target, bits, calibration, *placement(target, state), ranges=params.ranges, softmax=params.softmax
    )
    return state | ranges | {name: end for name, end in ends.items() if name in ranges}


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(target, bits, state, *placement(target, state), weight_ranges=params.ranges)


def reparameterised_sites(target: Target) -> list[Site]:
    return [site for site in target.linear_sites() if site.modulated]


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    by_site = {}
    for site in reparameterised_sites(target):
        if f"{site.name}/scale" in state:
            shift = StepTable.constant(state[f"{site.name}/shift"])
            by_site[site.name] = Transform(shift=shift, scale_C=state[f"{site.name}/scale"])
    return place(target, by_site)


def channel_values(target: Target, calibration: Calibration, tokens: int) -> dict[str, Tensor]:
    """{site: (N, C)} of each re-parameterised input: evenly spread tokens of every call, and each channel's two extremes."""
    sites = {site.name: site for site in reparameterised_sites(target)}
    stats = channel_stats(target, calibration)
    seen: dict[str, list[Tensor]] = {}
    for name, site in sites.items():
        seen_C = of_site(stats, site)
        seen[name] = [end_C[None].to(target.device) for end_C in (seen_C.min_SC.amin(0), seen_C.max_SC.amax(0))]

    def observe(name: str, step: int, x: Tensor) -> None:
        x_TC = x.detach().float().flatten(0, -2)
        kept = torch.linspace(0, len(x_TC) - 1, min(tokens, len(x_TC))).round().long()
        seen[name].append(x_TC[kept])

    model = float_copy(target, dtype=torch.float32, device=target.device)
    readers = {reader: name for name, site in sites.items() for reader in site.first_readers}
    with inputs_observed(model, readers, observe) as set_step:
        run_calibration(model, calibration, set_step, "channel values")
    return {name: torch.cat(values) for name, values in seen.items()}


def channel_quantizers(values_NC: Tensor, act: QuantSpec, params: Params) -> tuple[Tensor, Tensor]:
    """δ, z of each channel, on the CPU; those of a dead channel are the mean of the others, so that its r is 1."""
    spec = replace(act, granularity="per_channel", group_size=None, dynamic=False)
    rounded = to_device(quantize_weight(values_NC.T, spec, ranges=params.ranges), "cpu")
    scale_C = rounded.scale_OG[:, 0].clone()
    zero_point_C = torch.zeros_like(scale_C) if rounded.zero_point_OG is None else rounded.zero_point_OG[:, 0].clone()
    dead_C = (values_NC.abs().amax(0).cpu() == 0) | (scale_C < params.floor)
    if not dead_C.all():
        scale_C[dead_C], zero_point_C[dead_C] = scale_C[~dead_C].mean(), zero_point_C[~dead_C].mean().round()
    return scale_C, zero_point_C


def reparameterise(scale_C: Tensor, zero_point_C: Tensor, act: QuantSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """δ, z → (shift = r b, scale = r) of the input, and the ends of the range of (δ̃, z̃)."""
    mean_scale, mean_zero_point = scale_C.mean(), zero_point_C.mean().round()
    ratio_C = scale_C / mean_scale
    shift_C = -zero_point_C * scale_C + ratio_C * mean_zero_point * mean_scale
    low = (act.quant_min - mean_zero_point) * mean_scale
    high = (act.quant_max - mean_zero_point) * mean_scale
    return shift_C, ratio_C, low, high
