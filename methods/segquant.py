"""SegQuant (Zhang et al. 2025, arXiv:2507.14811, CVPR 2026): smoothing, a scale for each sign behind SiLU and GELU, a scale for each segment.

    smooth    s = max|X|^α / max|W|^(1−α) per input channel, X ← X / s, W ← W · s
    dual      X = X₊ + X₋,   Y ≈ s₊ Q(X₊) Ŵᵀ + s₋ Q(X₋) Ŵᵀ,   s₊ = max X / 127,  s₋ = max −X / 128   (DualScale)
    segment   rows of W that the network takes apart (chunk, split) are rounded with a scale each:  Ŵ = [Ŵ₁; …; Ŵ_N]   (SegLinear)

    paper      here         meaning
    α          alpha        0.5; with `search` the one of 0, 0.1, …, 1 with the least output error
    X₊, X₋     dual         of layers that read a SiLU or a GELU: what is below zero there is small, and matters
    W_i        segment      rows that make shift, scale and gate of adaLN, or V of a layer that makes several operands

A scale per segment is one where `bits.weight` has a scale per tensor, as the release does; with one per channel every row has its
own, and with groups or blocks every part of it.

Departs from the paper: which rows belong together is known from the model's family (`Site.producers`) instead of a trace of its graph. Segments of the
*input* (a layer behind a concatenation, as FLUX's single blocks have) are not in. One s for all layers that read a tensor, and for all
segments of a layer (there: one each), folded into the rows of its producer where one is known. A tensor's rounded
values stay one tensor: what the two products of DualScale add up to is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditbench.harness.calibration.activated import activation_readers
from ditbench.harness.calibration.block_stream import MAX_BYTES
from ditbench.harness.calibration.channel_statistics import channel_stats, of_site, token_sample
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.blockwise import round_blockwise, weight_from_state, weight_state
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe, to_device
from ditbench.harness.quant.smoothing import place, smoothing_scale, weight_absmax
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import AdaLNRows, Site, Target, weight_matrix
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.quant.uneven import DualScaleQuant, static_dual

PARTS = ("smooth", "dual", "segment")
ALPHAS = tuple(step / 10 for step in range(11))
YES = torch.ones((), dtype=torch.uint8)  # in a state: this layer has two scales


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's, but for the search and GPTQ, which its release runs on top."""

    parts: str = "+".join(PARTS)  # any of smooth, dual, segment joined by +, or none
    alpha: float = 0.5
    search: bool = False  # α by output error, layer by layer
    weights: str = "nearest"  # nearest | gptq
    tokens: int = 512  # of each layer input, that `search` measures errors on
    damp: float = 0.01  # of GPTQ
    max_bytes: int = MAX_BYTES  # of the hidden states that GPTQ keeps at a time: so many rows are used
    floor: float = 1e-5  # on both ranges and on s: a dead channel must not divide by zero

    def __post_init__(self) -> None:
        if self.parts != "none" and not set(self.parts.split("+")) <= set(PARTS):
            raise ValueError(
                f"segquant: parts must be some of {', '.join(PARTS)} joined by +, or none, got {self.parts!r}"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"segquant: alpha must be in [0, 1], got {self.alpha}")
        if self.weights not in ("nearest", "gptq"):
            raise ValueError(f"segquant: weights must be one of nearest, gptq, got {self.weights!r}")
        if self.tokens < 1:
            raise ValueError(f"segquant: tokens must be at least 1, got {self.tokens}")

    def has(self, part: str) -> bool:
        return part in self.parts.split("+")


FORMS = {
    PUBLISHED: Form(
        {"search": True, "weights": "gptq"},
        {
            "bits.weight.granularity": "per_tensor",
            "bits.act.granularity": "per_tensor",
            "bits.act.dynamic": False,
            "calibration.n": 256,
        },
    )
}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    if params.has("dual") and has_dual(bits):
        state |= {
            f"{name}/dual": YES.clone() for name in activation_readers(target, calibration) if name in target.layers
        }
    if params.has("smooth"):
        stats, sites = channel_stats(target, calibration), target.linear_sites()
        tokens = token_sample(target, calibration, sites, params.tokens) if params.search else {}
        for site in sites:
            act_C, weight_C = of_site(stats, site).absmax_C, weight_absmax(target, site)
            scales = [smoothing_scale(act_C, weight_C, alpha, params.floor) for alpha in alphas(params)]
            best_C = scales[0]
            if params.search:
                best_C = min(
                    scales, key=lambda scale_C: output_error(target, site, scale_C, tokens, bits, params, state)
                )
            state[f"{site.name}/scale"] = best_C
    transforms, folded = placement(target, state)
    state |= static_ranges(target, bits, calibration, transforms, folded)
    if bits.weight is None or params.weights == "nearest":
        return state
    spec = bits.weight

    def round_weight(name: str, weight_OC: Tensor, hessian_CC: Tensor) -> QuantizedWeight:
        spec.check_width(name, weight_OC.shape[1])
        parts = segmented(target, name, bits, params)
        return by_segment(weight_OC, spec, parts, lambda rows, own: gptq(rows, hessian_CC, own, damp=params.damp))

    rounded = round_blockwise(target, calibration, round_weight, transforms, folded, max_bytes=params.max_bytes)
    for name, weight in rounded.items():
        state |= weight_state(name, weight)
    return state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    transforms, folded = placement(target, state)
    weights = {}
    for name in target.layers if bits.weight is not None else ():
        parts = segmented(target, name, bits, params)
        if f"{name}/codes" in state:
            weights[name] = weight_from_state(name, state, weight_spec(bits.weight, parts))
        elif parts:
            weight_OC = effective_linear(target, name, transforms, folded).weight_OC
            weights[name] = to_device(by_segment(weight_OC, bits.weight, parts, quantize_weight), "cpu")
    recipe = nearest(target, bits, state, transforms, folded, weights=weights)

    def completed(name: str, layer: LayerRecipe) -> LayerRecipe:
        if layer.act is None or f"{name}/dual" not in state:
            return layer
        return replace(layer, act=dual(layer.act.spec, state, name))

    return replace(recipe, layers={name: completed(name, layer) for name, layer in recipe.layers.items()})


def placement(target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Transform], frozenset[str]]:
    by_site = {site.name: Transform(scale_C=state.get(f"{site.name}/scale")) for site in target.linear_sites()}
    return place(target, by_site)


def has_dual(bits: Bits) -> bool:
    """Blocks have scales of their own, so small that few have both signs at their ends."""
    return bits.act is not None and not bits.act.in_blocks


def dual(spec: QuantSpec, state: dict[str, Tensor], name: str) -> DualScaleQuant:
    """A scale for each sign takes the place of a zero point."""
    symmetric = replace(spec, symmetric=True)
    if spec.dynamic:
        return DualScaleQuant(symmetric)
    return static_dual(StepTable(state[f"{name}/act_low"]), StepTable(state[f"{name}/act_high"]), symmetric)


def segments(target: Target, name: str) -> list[slice]:
    """The rows of a layer that the network takes apart, in order; one slice of all rows where it does not."""
    outputs = len(weight_matrix(target.module(name)))
    ends = {0, outputs}
    for site in target.sites:
        for producer in site.rows_of(name):
            rows = (producer.shift_rows, producer.scale_rows) if isinstance(producer, AdaLNRows) else (producer.rows,)
            ends |= {end for each in rows for end in each.indices(outputs)[:2]}
    ordered = sorted(ends)
    return [slice(start, stop) for start, stop in zip(ordered, ordered[1:], strict=False)]


def segmented(target: Target, name: str, bits: Bits, params: Params) -> list[slice]:
    """The segments that get a scale each; none where the layer is rounded whole, or finer than by segment."""
    if bits.weight is None or bits.weight.granularity != "per_tensor" or not params.has("segment"):
        return []
    found = segments(target, name)
    return found if len(found) > 1 else []


def weight_spec(spec: QuantSpec, parts: list[slice]) -> QuantSpec:
    """A layer in segments is written as one with a scale per row, the same in all rows of a segment."""
    return replace(spec, granularity="per_channel") if parts else spec


def by_segment(
    weight_OC: Tensor, spec: QuantSpec, parts: list[slice], round_rows: Callable[[Tensor, QuantSpec], QuantizedWeight]
) -> QuantizedWeight:
    """round_rows(rows, spec) of each segment, or of all rows where there are none. spec: as `bits` has it."""
    if not parts:
        return round_rows(weight_OC, spec)
    rounded = [round_rows(weight_OC[rows], spec) for rows in parts]
    zero_points = [each.zero_point_OG for each in rounded if each.zero_point_OG is not None]
    return QuantizedWeight(
        torch.cat([each.codes_OC for each in rounded]),
        torch.cat([each.scale_OG for each in rounded]),
        torch.cat(zero_points) if zero_points else None,
        weight_spec(spec, parts),
    )


def alphas(params: Params) -> tuple[float, ...]:
    return ALPHAS if params.search else (params.alpha,)


def output_error(
    target: Target,
    site: Site,
    scale_C: Tensor,
    tokens: dict[str, Tensor],
    bits: Bits,
    params: Params,
    state: dict[str, Tensor],
) -> float:
    """‖X Wᵀ − Q(X / s) Q(W · s)ᵀ‖² on the sample, over all layers of the protocol that read the site."""
    error = 0.0
    for name in site.consumers:
        if name not in target.layers:
            continue
        x_NC, weight_OC = tokens[name].to(target.device).double(), target.weight(name).double()
        scaled_C = scale_C.to(target.device).double()
        moved_NC, moved_OC = x_NC / scaled_C, weight_OC * scaled_C
        if bits.act is not None:
            spec = replace(bits.act, dynamic=True)
            quant = DualScaleQuant(replace(spec, symmetric=True)) if f"{name}/dual" in state else ActQuant(spec)
            # all tokens are one sample: a static range is that of them all
            moved_NC = fake_quantize_activation(moved_NC[None], quant)[0]
        if bits.weight is not None:
            parts = segmented(target, name, bits, params)
            moved_OC = by_segment(moved_OC, bits.weight, parts, quantize_weight).dequantize().double()
        error += float((moved_NC @ moved_OC.T - x_NC @ weight_OC.T).square().sum())
    return error
