"""Quantizers: ranges → scale and zero_point → codes, for weights and activations; and weights looked up in a table.

x ≈ (code − zero_point) · scale. A code is an integer, or a value of a small float (e4m3, e2m1, …), without a zero_point.
Zero is always inside the range, so that it is represented exactly and a one-sided group such as [5, 10] keeps an integer
zero_point without being clipped (the raw-min/max form used in some releases clips such a group by half its range).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ditbench.harness.quant.block_scales import (
    Scales,
    block_codes,
    by_channel,
    by_row,
    in_blocks,
    kept,
    of_weight_blocks,
    scales_of,
    stored,
    tensor_scale,
    to_grid,
    values,
    weight_blocks,
)
from ditbench.harness.quant.spec import BFLOAT16, E4M3, FLOAT32, INT, QuantSpec
from ditbench.harness.quant.steps import StepTable

MSE_PERCENTILES = (0.999, 0.9999, 0.99999)
FOUR_FOR_SIX = 1.5  # of a range: its end becomes 4 instead of 6
SHRINK_STEPS, SHRINK_BY, SHRINK_POWER = 80, 0.01, 2.4


@dataclass(frozen=True)
class QuantizedWeight:
    """codes_OC in the spec's code_dtype (int8, uint8 or a float8); scale_OG as the spec keeps it; zero_point_OG float32 or None
    (symmetric).

    G = 1 for per_channel and per_tensor, C / group_size for per_group, that rounded up for per_block; there scale_OG has a row
    for each block_rows channels.
    tensor_scale: float32 (), which the scales of blocks are multiples of (scale="e4m3").
    """

    codes_OC: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor | None
    spec: QuantSpec
    tensor_scale: Tensor | None = None

    def values(self) -> Tensor:
        """What the codes stand for, before scale and zero point; float32 (O, C)."""
        return values(self.codes_OC, self.spec)

    def scales(self) -> Tensor:
        """(O, G) float32, both levels in one."""
        return by_row(Scales(self.scale_OG, self.tensor_scale).whole(), len(self.codes_OC), self.spec)

    def dequantize(self) -> Tensor:
        """weight_OC, float32."""
        if self.spec.in_blocks:
            width = self.codes_OC.shape[1]
            zero = 0 if self.zero_point_OG is None else by_channel(self.zero_point_OG, width, self.spec)
            return (self.values() - zero) * by_channel(self.scales(), width, self.spec)
        groups = self.scale_OG.shape[1]
        codes_OGg = self.codes_OC.float().unflatten(1, (groups, -1))
        if self.zero_point_OG is not None:
            codes_OGg = codes_OGg - self.zero_point_OG[..., None]
        return (codes_OGg * self.scale_OG[..., None]).flatten(1)


class Levels(nn.Module):
    """The values that a row's codes stand for, when they are not evenly spaced: forward() → table_OL.

    Its buffers are what has to be stored; a grid that is computed from a few numbers per row subclasses this.
    """

    table_OL: Tensor

    def __init__(self, table_OL: Tensor | None = None) -> None:
        super().__init__()
        if table_OL is not None:
            self.register_buffer("table_OL", table_OL)

    def forward(self) -> Tensor:
        return self.table_OL


@dataclass(frozen=True)
class LookupWeight:
    """codes_OC: uint8 indices into the row's table of levels. spec: the format asked for.

    num_levels: of one row; 2^bits of the spec, unless a method cheats (see `tlq`, mode "code").
    """

    codes_OC: Tensor
    levels: Levels
    num_levels: int
    spec: QuantSpec

    @property
    def code_bits(self) -> int:
        """Bits that a packed code takes."""
        return (self.num_levels - 1).bit_length()

    def dequantize(self) -> Tensor:
        """weight_OC, float32."""
        return self.levels().gather(1, self.codes_OC.long())


@dataclass(frozen=True)
class ActQuant:
    """An activation quantizer. Static ones carry a table of scales (and zero_points) by denoising step.

    scale, zero_point: rows of shape () for per_tensor. Of static blocks, scale has the second level (NVFP4's `input_scale`).
    clip: of dynamic ones; both ends of the input's own range are multiplied by it before the scale is taken.
    """

    spec: QuantSpec
    scale: StepTable | None = field(default=None)
    zero_point: StepTable | None = field(default=None)
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.clip != 1.0 and not (self.spec.dynamic and 0 < self.clip <= 1):
            raise ValueError(
                f"clip is in (0, 1] and of dynamic activations (static ranges carry theirs), got {self.clip}"
            )

    @property
    def tables(self) -> list[StepTable]:
        """All that is static."""
        return [value for value in vars(self).values() if isinstance(value, StepTable)]

    def rounded_share(self, channels: int) -> float:
        """Of so many input channels, how many it rounds; the others stay in float."""
        return 1.0


@dataclass(frozen=True)
class UnevenQuant(ActQuant):
    """One whose values are not codes times one scale: `rounded` gives them, and only simulated kernels run it (see `uneven`)."""

    def rounded(self, x: Tensor, step: Tensor | None) -> Tensor:
        """x (…, C) → what stands for it, in the dtype of x."""
        raise NotImplementedError


def affine_from_range(
    low: Tensor, high: Tensor, spec: QuantSpec, tensor: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Ends of ranges → (scale, zero_point or None); an empty range gets scale 1, NaN stays NaN.

    tensor: as in `scales_of`, of scales with two levels.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        if spec.scale != FLOAT32:
            return scales_of(torch.maximum(-low, high), spec, tensor).whole(), None
        scale = torch.maximum(-low, high) / spec.quant_max
        return scale.masked_fill(scale == 0, 1), None
    scale = (
        kept((high - low) / spec.quant_max, spec).float() if spec.scale == BFLOAT16 else (high - low) / spec.quant_max
    )
    scale = scale.masked_fill(scale == 0, 1)
    return scale, torch.round(-low / scale).clamp(spec.quant_min, spec.quant_max)


def to_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, *, overwrite: bool = False
) -> Tensor:
    """Float-valued codes: integers, or values of a small float; clamped to the range of the spec.

    overwrite: x is no longer needed and has the codes' shape; integers are written there.
    """
    if spec.number != INT:
        codes = x / scale
        return to_grid(codes.masked_fill(scale == 0, 0) if spec.scale == E4M3 else codes, spec.number)
    # In place after the division: beside the product itself, these passes are what a real W8A8 layer spends its time on.
    codes = (x.div_(scale) if overwrite else x / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(spec.quant_min, spec.quant_max)


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest values of float8_e4m3fn (see `to_grid`)."""
    return to_grid(x, E4M3)


def from_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return (codes if zero_point is None else codes - zero_point) * scale


def quantize_weight(
    weight_OC: Tensor,
    spec: QuantSpec,
    *,
    ranges: str = "minmax",
    ratios: tuple[float, float] = (1.0, 1.0),
    tensor_absmax: Tensor | None = None,
) -> QuantizedWeight:
    """Round to nearest.

    tensor_absmax: of the tensor that these columns are of, where scales have two levels; theirs by default.
    ratios: the low and the high end of every range are multiplied by these; what lies outside is clipped.

    ranges: "minmax", or "mse": the best of three percentile ranges by squared error (as RepQ-ViT and PTQ4DiT
        initialise: quantile(1 − p) … quantile(p) for p in 0.999, 0.9999, 0.99999, linear between neighbours, as
        torch.quantile is: a row of 128 values is cut a little, too); or "shrink": the best of 80 shrunken ranges, (1 − 0.01 i) · (min … max), by the error to the power 2.4 (as Q-Diffusion initialises).
    """
    weight_OC = weight_OC.float()
    rows = _as_rows(weight_OC, spec)
    tensor = None
    if spec.scale == E4M3:
        tensor = tensor_scale(rows.abs().amax() if tensor_absmax is None else tensor_absmax, spec)
    low, high = RANGES[ranges](rows, spec, tensor)
    if spec.in_blocks:
        codes, scales, zero_point = _rounded_blocks(rows, (ratios[0] * low, ratios[1] * high), spec, tensor)
        codes_OC = stored(of_weight_blocks(codes, weight_OC.shape, spec), spec).contiguous()
        return QuantizedWeight(codes_OC, scales.block.contiguous(), zero_point, spec, scales.tensor)
    scale, zero_point = affine_from_range(ratios[0] * low, ratios[1] * high, spec)
    codes = to_codes(rows, scale[..., None], None if zero_point is None else zero_point[..., None], spec)
    if spec.granularity == "per_tensor":
        scale = scale.expand(len(weight_OC), 1)
        zero_point = None if zero_point is None else zero_point.expand(len(weight_OC), 1)
    return QuantizedWeight(
        codes.reshape(weight_OC.shape).to(spec.code_dtype),
        scale.reshape(len(weight_OC), -1).contiguous(),
        None if zero_point is None else zero_point.reshape(len(weight_OC), -1).contiguous(),
        spec,
    )


def _rounded_blocks(
    blocks: Tensor, ends: tuple[Tensor, Tensor], spec: QuantSpec, tensor: Tensor | None
) -> tuple[Tensor, Scales, Tensor | None]:
    """blocks (…, g) with the ends of their ranges (…) → float-valued codes (…, g), scales and zero points (…)."""
    if not spec.symmetric:
        scale, zero_point = affine_from_range(*ends, spec)
        assert zero_point is not None
        codes = to_codes(blocks, scale[..., None], zero_point[..., None], spec)
        return codes, Scales(kept(scale, spec), None), zero_point
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    if spec.four_over_six:
        four = FOUR_FOR_SIX * low, FOUR_FOR_SIX * high
        low, high = _best_range(blocks, spec, [(low, high), four], (low, high), 2.0, tensor)
    scales = scales_of(torch.maximum(-low, high), spec, tensor)
    return block_codes(blocks, scales, spec), scales, None


def blocked_activation(x: Tensor, quant: ActQuant, step: Tensor | None = None) -> tuple[Tensor, Scales, Tensor | None]:
    """x (…, C) of a per_block quantizer → codes (…, G, g), filled up with zeros, scales and zero points (…, G).

    The second level of scales is the calibration's, or of one sample: results must not depend on what else is in the batch.
    """
    assert quant.spec.group_size is not None
    blocks = in_blocks(x, quant.spec.group_size)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if quant.scale is not None:
        tensor: Tensor | None = quant.scale.at(step)
    else:
        tensor = tensor_scale(torch.maximum(-low, high).amax(tuple(range(1, low.ndim)), keepdim=True), quant.spec)
    return _rounded_blocks(blocks, (quant.clip * low, quant.clip * high), quant.spec, tensor)


def activation_affine(x: Tensor, quant: ActQuant, step: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """scale and zero_point that broadcast against x (…, C), or (…, G, g) for per_group; float32."""
    spec = quant.spec
    if not spec.dynamic:
        assert quant.scale is not None
        return quant.scale.at(step), None if quant.zero_point is None else quant.zero_point.at(step)
    if spec.granularity == "per_tensor":  # of one sample: results must not depend on what else is in the batch
        inner = tuple(range(1, x.ndim))
        low, high = x.amin(inner, keepdim=True), x.amax(inner, keepdim=True)
    else:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return affine_from_range(quant.clip * low, quant.clip * high, spec)


def fake_quantize_activation(x: Tensor, quant: ActQuant, step: Tensor | None = None) -> Tensor:
    """Quantize and dequantize x (…, C) in float32 (float64 stays float64)."""
    shape = x.shape
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(quant, UnevenQuant):
        return quant.rounded(x, step)
    if quant.spec.in_blocks:
        codes, scales, zero_point = blocked_activation(x, quant, step)
        zero_point = None if zero_point is None else zero_point[..., None]
        return from_codes(codes, scales.whole()[..., None], zero_point).flatten(-2)[..., : shape[-1]]
    if quant.spec.granularity == "per_group":
        x = x.unflatten(-1, (-1, quant.spec.group_size))
    scale, zero_point = activation_affine(x, quant, step)
    return from_codes(to_codes(x, scale, zero_point, quant.spec), scale, zero_point).reshape(shape)


def static_quant(low: StepTable, high: StepTable, spec: QuantSpec) -> ActQuant:
    """A static per-tensor quantizer from tables of range ends; of scales with two levels, the second one."""
    if spec.in_blocks:
        tensor = tensor_scale(torch.maximum(-low.rows, high.rows), spec)
        assert tensor is not None, "`Bits.check_sides` refuses the others"
        return ActQuant(spec, StepTable(tensor, low.group_of_step))
    scale, zero_point = affine_from_range(low.rows, high.rows, spec)
    return ActQuant(
        spec,
        StepTable(scale, low.group_of_step),
        None if zero_point is None else StepTable(zero_point, low.group_of_step),
    )


def mse_percentile_range(values_N: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The percentile range of a flat sample with the least squared rounding error → two scalars."""
    return searched_range(values_N, spec, "mse")


def searched_range(values_N: Tensor, spec: QuantSpec, ranges: str) -> tuple[Tensor, Tensor]:
    """The range of a flat sample, found as `ranges` says (see `quantize_weight`) → two scalars."""
    low, high = RANGES[ranges](values_N[None].float(), spec)
    return low[0], high[0]


def _as_rows(weight_OC: Tensor, spec: QuantSpec) -> Tensor:
    """(…, elements that share a scale)."""
    if spec.granularity == "per_tensor":
        return weight_OC.reshape(1, -1)
    if spec.granularity == "per_group":
        return weight_OC.unflatten(1, (-1, spec.group_size))
    if spec.in_blocks:
        return weight_blocks(weight_OC, spec)
    if spec.granularity == "per_channel":
        return weight_OC
    raise ValueError(f"weights cannot be quantized {spec.granularity}")


def _extremes(rows: Tensor, spec: QuantSpec, tensor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return rows.amin(-1), rows.amax(-1)


def _mse_range(rows: Tensor, spec: QuantSpec, tensor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    ordered = rows.sort(dim=-1).values
    ends = [(quantile(ordered, 1 - p), quantile(ordered, p)) for p in MSE_PERCENTILES]
    return _best_range(rows, spec, ends, (ordered[..., 0], ordered[..., -1]), 2.0, tensor)


def quantile(ordered: Tensor, p: float) -> Tensor:
    """Of sorted rows, linear between neighbours; torch.quantile itself takes at most 2²⁴ values."""
    place = p * (ordered.shape[-1] - 1)
    below, above = ordered[..., math.floor(place)], ordered[..., math.ceil(place)]
    return torch.lerp(below, above, place - math.floor(place))


def _shrink_range(rows: Tensor, spec: QuantSpec, tensor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(-1), rows.amax(-1)
    factors = (1 - SHRINK_BY * i for i in range(SHRINK_STEPS))
    return _best_range(rows, spec, ((f * low, f * high) for f in factors), (low, high), SHRINK_POWER, tensor)


RANGES = {"minmax": _extremes, "mse": _mse_range, "shrink": _shrink_range}


def _best_range(
    rows: Tensor,
    spec: QuantSpec,
    candidates: Iterable[tuple[Tensor, Tensor]],
    start: tuple[Tensor, Tensor],
    power: float,
    tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each row, the first candidate with the least Σ |error|^power; start if no error is finite."""
    best_low, best_high = start
    best_error = torch.full(rows.shape[:-1], torch.inf, device=rows.device)
    for low, high in candidates:
        scale, zero_point = affine_from_range(low, high, spec, tensor)
        scale, zero_point = scale[..., None], None if zero_point is None else zero_point[..., None]
        distance = (from_codes(to_codes(rows, scale, zero_point, spec), scale, zero_point) - rows).abs_()
        error = (distance.square_() if power == 2 else distance.pow_(power)).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high
