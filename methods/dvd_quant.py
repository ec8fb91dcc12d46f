"""DVD-Quant (Li et al. 2025, arXiv:2505.18663, ICLR 2026): no data; refined grids of weights, rotated activations with a scale per channel found online.

    ARQ   Y = Q(X H Λ⁻¹) Λ Ŵᵀ,   Λ = diag(max over tokens |(X H)_j|),   Ŵ = BGR(W H)
    BGR   min ‖W − Δ (W_q − z)‖² per row, from the bounds with the least error, in turn until it falls no more:
          Δ ← ⟨W_q − z, W⟩ / ⟨W_q − z, W_q − z⟩,   z ← round(mean(W_q − W / Δ)),   W_q ← clamp(round(W / Δ) + z)
    GBS   activations of step t have 8 bits where Σ ‖F_t − F_{t−1}‖₁ / ‖F_{t−1}‖₁ since the last such step reaches δ, else fewer

    paper   here                        meaning
    H       Hadamard(C)                 at full width; online before every layer
    (signs) signs                       random: H's rows have signs, drawn once with `seed`; none: it has not
    Λ       ChannelScaledQuant          of each sample anew; `channels` that share a factor (0: no Λ)
    δ_l, δ_u bounds                     shares of a row's two ends that are tried, 1 … least_bound
    Δ, z, W_q scale, zero point, codes  of each row (group) of the rotated weight
    δ       delta                       null: no switching; of integers of fewer than 8 bits

Λ stands between two factors of the product and cannot follow its sums, so no integer kernel computes it; it is simulated. Of one token per sample (what adaLN
reads) there is no Λ.

Departs from the paper: δ-GBS decides on the run; here the steps are chosen once, from the float model's outputs on the recorded samples, so
that it is the one part that needs data. The paper's timings and, it says, its numbers are of a Λ shared by blocks of channels whose size is
not known: `channels`. The size and the end of its bounds are not known either, nor whether H has signs: it has, as all other rotations here. Formats whose scales are not float32 of a row (FP8, blocks) take
shrunken ranges of least error instead of a refined grid; static activations have no Λ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.blockwise import weight_from_state, weight_state
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, Form
from ditbench.harness.fitting.rounding import act_quant, nearest, static_ranges
from ditbench.harness.models.calls import float_dtype
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import (
    QuantizedWeight,
    affine_from_range,
    from_codes,
    quantize_weight,
    to_codes,
)
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import INT, Bits, QuantSpec
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Hadamard, Transform, random_signs
from ditbench.harness.quant.uneven import ChannelScaledQuant

WIDE_BITS = 8
MARGIN = 1 - 1e-9  # what errs less by less than this is equal: sums differ in their last bits from machine to machine
ROWS = 8  # of each step, that F is looked at on


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's as far as they are known."""

    rotate: bool = True
    signs: str = "random"  # of H: random | none
    seed: int = 0  # of random signs
    channels: int = 1  # that share a factor of Λ; 0: no Λ
    refine: bool = True  # BGR; false: rounding to nearest with min-max ranges
    bounds: int = 11  # shares tried of each end
    least_bound: float = 0.5
    iterations: int = 20  # of the refinement, at most
    delta: float | None = None  # null: all steps as `bits` says; the paper's are between 0.06 and 0.18

    def __post_init__(self) -> None:
        if self.signs not in ("none", "random"):
            raise ValueError(f"dvd_quant: signs must be random or none, got {self.signs!r}")
        if self.channels < 0 or self.bounds < 1 or self.iterations < 0:
            raise ValueError(
                "dvd_quant: channels and iterations must be at least 0, bounds at least 1; "
                f"got {self.channels}, {self.iterations}, {self.bounds}"
            )
        if not 0.0 < self.least_bound <= 1.0:
            raise ValueError(f"dvd_quant: least_bound must be in (0, 1], got {self.least_bound}")
        if self.delta is not None and self.delta <= 0:
            raise ValueError(f"dvd_quant: delta must be positive, or null for no switching, got {self.delta}")


FORMS = {PUBLISHED: Form(settings=ASYMMETRIC_WEIGHTS | {"calibration.n": 0})}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    if params.delta is not None and bits.act is not None and bits.act.number != INT:
        raise UserError(
            f"dvd_quant: method.delta gives some steps integers of {WIDE_BITS} bits in place of narrower ones; activations of "
            f"{bits.act.name} have no wider grid of their kind; set method.delta=null, or integers (bits=w4a4, int4_g64)"
        )
    rotated = rotations(target, params)
    state = static_ranges(target, bits, calibration, rotated)
    for name in target.layers if bits.weight is not None and params.refine else ():
        bits.weight.check_width(name, target.weight(name).shape[1])
        weight_OC = effective_linear(target, name, rotated, frozenset()).weight_OC
        state |= weight_state(name, refined(weight_OC, bits.weight, params))
    if params.delta is not None and is_narrow(bits.act):
        state["wide_steps"] = wide_steps(target, calibration, params.delta)
    return state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    weights = {n: weight_from_state(n, state, bits.weight) for n in target.layers if f"{n}/codes" in state}
    recipe = nearest(target, bits, state, rotations(target, params), weights=weights)
    layers = {name: with_channel_scales(layer, params) for name, layer in recipe.layers.items()}
    recipe = replace(recipe, layers=layers)
    return switched(recipe, state["wide_steps"].tolist(), state) if "wide_steps" in state else recipe


def rotations(target: Target, params: Params) -> dict[str, Transform]:
    """One rotation per site, shared by the target layers that read it; layers in float are left alone."""
    transforms: dict[str, Transform] = {}
    generator = torch.Generator().manual_seed(params.seed)
    for site in target.linear_sites() if params.rotate else ():
        channels = target.module(site.consumers[0]).in_features
        signs_C = random_signs(channels, generator) if params.signs == "random" else None
        shared = Transform(rotations=(Hadamard(channels, signs_C),))
        transforms |= {name: shared for name in site.consumers if name in target.layers}
    return transforms


def with_channel_scales(layer: LayerRecipe, params: Params) -> LayerRecipe:
    if layer.act is None or not layer.act.spec.dynamic or params.channels == 0:
        return layer
    return replace(layer, act=ChannelScaledQuant(layer.act.spec, channels=params.channels))


def refined(weight_OC: Tensor, spec: QuantSpec, params: Params) -> QuantizedWeight:
    """BGR of the rows (groups, or the whole tensor) that share a scale."""
    if spec.number != INT or spec.in_blocks:
        return quantize_weight(weight_OC, spec, ranges="shrink")
    size = {"per_tensor": weight_OC.numel(), "per_group": spec.group_size}.get(spec.granularity, weight_OC.shape[1])
    rows_RC = weight_OC.double().reshape(-1, size)
    scale_R1, zero_R1, codes_RC = bounded_start(rows_RC, spec, params)
    least_R1 = squared_error(rows_RC, codes_RC, scale_R1, zero_R1)
    for _ in range(params.iterations):
        scale, zero, codes = one_round(rows_RC, codes_RC, scale_R1, zero_R1, spec)
        error_R1 = squared_error(rows_RC, codes, scale, zero)
        better = error_R1 < MARGIN * least_R1  # rounding z may raise it
        if not bool(better.any()):
            break
        least_R1 = torch.where(better, error_R1, least_R1)
        scale_R1, codes_RC = torch.where(better, scale, scale_R1), torch.where(better, codes, codes_RC)
        zero_R1 = torch.where(better, zero, zero_R1)
    outputs = len(weight_OC)
    scale_OG, zero_OG = scale_R1.float(), zero_R1.float()
    if spec.granularity == "per_tensor":
        scale_OG, zero_OG = scale_OG.expand(outputs, 1), zero_OG.expand(outputs, 1)
    return QuantizedWeight(
        codes_RC.reshape(weight_OC.shape).to(spec.code_dtype),
        scale_OG.reshape(outputs, -1).contiguous(),
        None if spec.symmetric else zero_OG.reshape(outputs, -1).contiguous(),
        spec,
    )


def bounded_start(rows_RC: Tensor, spec: QuantSpec, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point (R, 1) of the pair of ends with the least error, and the codes."""
    low_R1, high_R1 = rows_RC.amin(1, keepdim=True), rows_RC.amax(1, keepdim=True)
    shares = torch.linspace(1.0, params.least_bound, params.bounds).tolist()
    pairs = [(share, share) for share in shares] if spec.symmetric else list(product(shares, shares))
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for of_low, of_high in pairs:
        scale, zero = affine_from_range(of_low * low_R1, of_high * high_R1, spec)
        scale = scale.float().double()  # as it is stored
        zero = torch.zeros_like(scale) if zero is None else zero
        codes = to_codes(rows_RC, scale, zero, spec)
        found = (squared_error(rows_RC, codes, scale, zero), scale, zero, codes)
        if best is None:
            best = found
        else:
            better = found[0] < MARGIN * best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2], best[3]


def one_round(
    rows_RC: Tensor, codes_RC: Tensor, scale_R1: Tensor, zero_R1: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and codes, each the best for the other two."""
    centred = codes_RC - zero_R1
    length = centred.square().sum(1, keepdim=True)
    fitted = (centred * rows_RC).sum(1, keepdim=True) / length.masked_fill(length == 0, 1)
    scale = torch.where(fitted > 0, fitted, scale_R1).float().double()
    zero = zero_R1
    if not spec.symmetric:
        zero = (codes_RC - rows_RC / scale).mean(1, keepdim=True).round().clamp(spec.quant_min, spec.quant_max)
    return scale, zero, to_codes(rows_RC, scale, zero, spec)


def squared_error(rows_RC: Tensor, codes_RC: Tensor, scale_R1: Tensor, zero_R1: Tensor) -> Tensor:
    return (from_codes(codes_RC, scale_R1, zero_R1) - rows_RC).square().sum(1, keepdim=True)


def is_narrow(spec: QuantSpec | None) -> bool:
    return spec is not None and spec.number == INT and spec.bits < WIDE_BITS


@torch.no_grad()
def wide_steps(target: Target, calibration: Calibration, delta: float) -> Tensor:
    """Which steps take 8 bits, bool (S,): those at which the change of the float model's output since the last one has come to δ.

    Raises:
        UserError: the steps have different samples.
    """
    if calibration.whole is not None:
        raise UserError(
            "method.delta compares the steps of the same samples of one transformer; set calibration.select=all"
        )
    model = float_copy(target, dtype=float_dtype(target.transformer), device=calibration.device)
    outputs = [
        calibration.call(model, step, calibration.rows(step, ROWS)).sample.float()
        for step in range(calibration.num_steps)
    ]
    return torch.tensor(switching(outputs, delta))


def switching(outputs: list[Tensor], delta: float) -> list[bool]:
    """outputs: F of each step in turn. A step knows those before it."""
    wide, change = [], 0.0
    for step in range(len(outputs)):
        if step >= 2:
            last, before = outputs[step - 1], outputs[step - 2]
            change += float((last - before).abs().sum() / before.abs().sum())
        wide.append(change >= delta)
        change = 0.0 if wide[-1] else change
    return wide


def switched(recipe: ModelRecipe, wide: list[bool], state: dict[str, Tensor]) -> ModelRecipe:
    """With 8-bit activations at the steps where `wide` says so; static ones have other scales there, of the same ranges."""
    starts = [step for step in range(len(wide)) if step == 0 or wide[step] != wide[step - 1]]
    variants = {}
    for name, layer in recipe.layers.items():
        if layer.act is not None and len(starts) > 1:
            spec = replace(layer.act.spec, bits=WIDE_BITS)
            act = replace(layer.act, spec=spec) if spec.dynamic else act_quant(spec, state, name)
            wider = replace(layer, act=act)
            variants[name] = tuple(wider if wide[start] else layer for start in starts)
    return replace(recipe, num_steps=len(wide), variants=variants, starts=tuple(starts) if variants else (0,))
