"""LRQ-DiT (Yang et al. 2025, arXiv:2508.03485): log weight grids (TLQ) behind a rotation chosen by input energy (ARS).

Per layer input, in this order:

    m_c = max|W_c|^α / max|X_c|^(1−α);  X ← X · m,  W ← W / m                      smoothing
    J = ‖X‖_F / √(tokens · C) of the raw input, over all denoising steps           Eq. 11
    X ← X R,  W ← W R;  R = R_H if J < T, else R₁ P R₂                             Eq. 12 (ARS)
    W ← TLQ(W), one log2 grid per row and sign                                     Eq. 4–7 (`harness.quant.tlq`)

    paper       here               meaning
    1/m         scale_C            one per layer input
    α           alpha              exponent of the weights' range, 0.5
    J           {site}/rms         root mean square of the input
    T           threshold          1
    R_H         Hadamard           randomised, full width (or the largest admissible blocks)
    R₁ P R₂     Dual               DuQuant's (`harness.quant.rotations`), fitted on tokens of all steps
    (α, β)      searched quantiles of |w|, per sign

`parts` switches smoothing, rotation and TLQ for the ablation; without "tlq" weights are rounded to nearest. With
choose=measured a site takes the rotation with the lower output error on the calibration tokens, and J only reports.

Departs from the paper: TLQ in its "strict" form, see `harness.quant.tlq` (tlq=paper for Eq. 7 as written; tlq=code, and
form=published, for the release's grid, which takes more than b bits); m is shared
by all layers that read the same tensor and folded into its producer where one is known, else it runs online. The released
code names the layers of the second branch instead of computing J; raw input and all steps are our reading. Activations are
as `bits` says (released: dynamic per token). The paper's text was read second-hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditbench.harness.calibration.channel_statistics import (
    ChannelStats,
    channel_stats,
    of_site,
    token_sample,
    tokens_of_site,
)
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.recipe import ModelRecipe, to_device
from ditbench.harness.quant.rotations import Dual, dual_rotation
from ditbench.harness.quant.smoothing import place, smoothing_scale, weight_absmax
from ditbench.harness.quant.spec import Bits, QuantSpec, needs_integers
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.tlq import MODES, Search, twin_log, weight_from_state, weight_state
from ditbench.harness.quant.transforms import Hadamard, Rotation, Transform, random_signs
from ditbench.harness.samples.seeds import sample_seeds

PARTS = ("smooth", "rotate", "tlq")
CHOICES = ("paper", "measured")


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's where it says, those of the released code where it does not."""

    parts: str = "smooth+rotate+tlq"  # any of the three joined by +, or none
    alpha: float = 0.5
    floor: float = 1e-5  # on both ranges and on 1/m: a dead channel must not divide by zero
    threshold: float = 1.0
    choose: str = "paper"  # paper: by J; measured: by output error
    block_size: int = 128  # of the dual rotation, at most
    steps: int = 256  # greedy
    tokens: int = 512  # that rotations are fitted and compared on, per layer input
    tlq: str = "strict"
    per_row: bool = False  # search the grid of each row by itself (strict only)
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = self.active - set(PARTS)
        if unknown:
            raise ValueError(f"lrq_dit: parts are {', '.join(PARTS)} joined by +, or none; got {self.parts!r}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"lrq_dit: alpha must be in [0, 1], got {self.alpha}")
        if self.choose not in CHOICES:
            raise ValueError(f"lrq_dit: choose must be {' or '.join(CHOICES)}, got {self.choose!r}")
        if self.tlq not in MODES:
            raise ValueError(f"lrq_dit: tlq must be one of {', '.join(MODES)}, got {self.tlq!r}")
        if self.block_size < 1 or self.steps < 0 or self.tokens < 1:
            raise ValueError(
                "lrq_dit: block_size and tokens must be at least 1, steps at least 0; "
                f"got {self.block_size}, {self.tokens}, {self.steps}"
            )

    @property
    def active(self) -> set[str]:
        return set() if self.parts == "none" else set(self.parts.split("+"))


FORMS = {PUBLISHED: Form({"tlq": "code"}, {"calibration.n": 8})}  # the release's grid, which its tables were made with


def check_bits(bits: Bits) -> None:
    needs_integers("lrq_dit", bits.weight, bits.act)
    if bits.weight is not None and bits.weight.granularity != "per_channel":
        raise UserError(f"lrq_dit: TLQ has its grids per_channel; bits.weight is {bits.weight.granularity}")


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    if params.active & {"smooth", "rotate"}:  # TLQ alone looks at weights only
        stats = channel_stats(target, calibration)
        state = {f"{site.name}/rms": rms(of_site(stats, site)) for site in target.linear_sites()}
    if "smooth" in params.active:
        state |= smoothing(target, stats, params.alpha, params.floor)
    if "rotate" in params.active:
        state |= choose_rotations(target, calibration, state, bits, params)
    placed = placement(target, state)
    if bits.weight is not None and "tlq" in params.active:
        for name in target.layers:
            weight_OC = effective_linear(target, name, *placed).weight_OC
            state |= weight_state(name, round_weight(weight_OC, bits.weight, params))
    return state | static_ranges(target, bits, calibration, *placed)


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    weights = {}
    if bits.weight is not None and "tlq" in params.active:
        weights = {name: weight_from_state(name, state, bits.weight) for name in target.layers}
    return nearest(target, bits, state, *placement(target, state), weights=weights)


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    by_site = {}
    for site in target.linear_sites():
        scale_C = state.get(f"{site.name}/scale")
        by_site[site.name] = Transform(scale_C=scale_C, rotations=rotations(site.name, state))
    return place(target, by_site)


def rotations(site: str, state: dict[str, Tensor]) -> tuple[Rotation, ...]:
    if f"{site}/signs" in state:
        return (Hadamard(len(state[f"{site}/signs"]), state[f"{site}/signs"]),)
    return Dual.from_state(site, state).rotations() if f"{site}/dual/order_C" in state else ()


def smoothing(target: Target, stats: dict[str, ChannelStats], alpha: float, floor: float) -> dict[str, Tensor]:
    """1/m by site; SmoothQuant's factor, whose strength is the exponent of the activations."""
    return {
        f"{site.name}/scale": smoothing_scale(
            of_site(stats, site).absmax_C, weight_absmax(target, site), 1 - alpha, floor
        )
        for site in target.linear_sites()
    }


def rms(stats: ChannelStats) -> Tensor:
    """Eq. 11 over all steps, tokens and channels; a scalar."""
    return (stats.sumsq_SC.double().sum() / (stats.count_S.double().sum() * stats.sumsq_SC.shape[1])).sqrt().float()


def choose_rotations(
    target: Target, calibration: Calibration, state: dict[str, Tensor], bits: Bits, params: Params
) -> dict[str, Tensor]:
    """Eq. 12: signs of a Hadamard rotation or the parts of a dual one, for every site."""
    sites = target.linear_sites()
    seeds = sample_seeds(params.seed, len(sites), stream="lrq_dit")
    sampled = [site for site in sites if params.choose == "measured" or takes_dual(state[f"{site.name}/rms"], params)]
    tokens = token_sample(target, calibration, sampled, params.tokens)
    found: dict[str, Tensor] = {}
    for site, seed in zip(sites, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)  # its own, so that no site's choice moves another's
        signs_C = random_signs(target.module(site.consumers[0]).in_features, generator)
        hadamard = {f"{site.name}/signs": signs_C}
        if site not in sampled:
            found |= hadamard
            continue
        x_NC = tokens_of_site(tokens, site).to(target.device)
        smooth = to_device(Transform(scale_C=state.get(f"{site.name}/scale")), target.device)
        dual = dual_rotation(smooth(x_NC), params.block_size, params.steps, generator).state(site.name)
        if params.choose == "measured":
            errors = [
                output_error(
                    target, site, tokens, Transform(None, smooth.scale_C, rotations(site.name, each)), bits, params
                )
                for each in (hadamard, dual)
            ]
            found |= dual if errors[1] < errors[0] else hadamard
        else:
            found |= dual
    return found


def takes_dual(rms: Tensor, params: Params) -> bool:
    """The boundary belongs to the dual rotation."""
    return not bool(rms < params.threshold)


def output_error(
    target: Target, site: Site, tokens: Mapping[str, Tensor], transform: Transform, bits: Bits, params: Params
) -> float:
    """Squared error of the outputs of the site's quantized layers, each on a sample of its input: tokens, x_NC by layer name.

    The weights are those before any fold; a static activation quantizer counts with the range of the sample.
    """
    transform = to_device(transform, target.device).double()
    total = 0.0
    for name in site.consumers:
        if name not in target.layers:
            continue
        x_NC = tokens[name].to(target.device).double()
        moved_NC = transform(x_NC)
        if bits.act is not None:
            moved_NC = fake_quantize_activation(moved_NC, ActQuant(replace(bits.act, dynamic=True)))
        weight_OC = target.weight(name).double()
        moved_OC = transform.of_weight(weight_OC)
        if bits.weight is not None:
            moved_OC = round_weight(moved_OC, bits.weight, params).dequantize().double()
        total += float((moved_NC @ moved_OC.T - x_NC @ weight_OC.T).square().sum())
    return total


def round_weight(weight_OC: Tensor, spec: QuantSpec, params: Params):
    if "tlq" in params.active:
        return twin_log(weight_OC, spec, params.tlq, Search(per_row=params.per_row))
    return quantize_weight(weight_OC, spec)
