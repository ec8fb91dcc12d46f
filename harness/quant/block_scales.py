"""Codes of small floats, and scales of blocks: what NVFP4, MXFP4/6/8, FP8 in blocks and INT4 in groups are made of.

    s = max|x| of a block / the grid's largest value L (448 of e4m3, 28 of e3m2, 6 of e2m1, 7 of int4),   code = round(x / ŝ)

ŝ is s as it is kept (`QuantSpec.scale`):

    float32, bfloat16   s itself, s rounded to bfloat16
    e8m0                a power of two (OCP MX v1.0, 6.3). With m = max|x|, E the exponent of L:
                        floor  2^(⌊log₂ m⌋ − E)       OCP's; up to a quarter of the range is clipped (e2m1), an eighth (e4m3)
                        rceil  2^⌈log₂(m / L)⌉        cuBLAS's: the least that clips nothing
                        ceil   2^(⌈log₂ m⌉ − E)
                        even   2^(⌊log₂ m̃⌋ − E)       m̃: m rounded to the grid's digits, a half away from zero
    e4m3                ŝ = t · e4m3(s / t), t = max|tensor| / (448 · L) in float32: NVFP4's two levels

Every value is rounded to the nearest of its grid, ties to even. A block of zeros has codes 0 whatever its scale.
Checked bit for bit against torchao's and comfy-kitchen's functions (bench/format_oracles.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.quant.spec import (
    BFLOAT16,
    CEIL,
    E4M3,
    E4M3_MAX,
    E8M0,
    EVEN,
    FLOAT8,
    FLOAT32,
    GRIDS,
    INT,
    RCEIL,
    RECIPROCAL,
    Grid,
    QuantSpec,
)

FLOATS = {  # integers of the same size, the bits of the exponent, how many bits follow the leading one
    torch.float32: (torch.int32, 0x7F800000, 23),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52),
}
LEAST_POWER, MOST_POWER = -127, 127  # of e8m0
FOUR_OVER_SIX_MAX = 256  # of block scales: 1.5 times as much is still an e4m3
LEAST_NORMAL = 2.0**-6  # of e4m3


class Scales(NamedTuple):
    """block: as it is kept; tensor: the float32 of the second level, None where there is none."""

    block: Tensor
    tensor: Tensor | None

    def whole(self) -> Tensor:
        """Both levels, float32."""
        block = self.block.float()
        return block if self.tensor is None else self.tensor * block


def to_grid(x: Tensor, number: str) -> Tensor:
    """The nearest values of a small float, ties to even, float32 (float64 stays); beyond its largest, that; NaN stays NaN.

    torch's own casts take many times as long on the CPU, and round float64 twice. Steps are a power of two below |x|, and stay
    equal below the least normal number; adding a number whose last bit is worth one step leaves no room for less.
    """
    grid = GRIDS[number]
    x = (x if x.dtype == torch.float64 else x.float()).clamp(-grid.largest, grid.largest)
    integers, exponent, digits = FLOATS[x.dtype]
    power = (x.view(integers) & exponent).view(x.dtype).clamp_(min=2.0**grid.least)
    large = power.mul_(1.5 * 2.0 ** (digits - grid.mantissa))
    return x.add_(large).sub_(large)


def stored(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Float-valued codes in the spec's code_dtype: cast, or the bits of a small float (sign, exponent, mantissa)."""
    if spec.number == INT or spec.number in FLOAT8:
        return codes.to(spec.code_dtype)
    levels = _levels(GRIDS[spec.number]).to(codes.device)
    magnitude = torch.searchsorted(levels, codes.float().abs().contiguous()).to(torch.uint8)
    return magnitude | ((codes < 0).to(torch.uint8) << (spec.bits - 1))


def values(codes: Tensor, spec: QuantSpec) -> Tensor:
    """The inverse of `stored`, float32."""
    if spec.number == INT or spec.number in FLOAT8:
        return codes.float()
    levels = _levels(GRIDS[spec.number]).to(codes.device)
    return torch.cat([levels, -levels])[codes.long()]


def _levels(grid: Grid) -> Tensor:
    """Its values from 0 up, in the order of their bits; float32."""
    count = 2**grid.mantissa
    below = [step / count * 2.0**grid.least for step in range(count)]
    normal = [
        (1 + step / count) * 2.0 ** (grid.least + power)
        for power in range(2**grid.exponent - 1)
        for step in range(count)
    ]
    return torch.tensor([*below, *normal])


def in_blocks(x: Tensor, size: int) -> Tensor:
    """(…, C) → (…, G, size); the last block is filled with zeros."""
    lacking = -x.shape[-1] % size
    return (F.pad(x, (0, lacking)) if lacking else x).unflatten(-1, (-1, size))


def weight_blocks(weight_OC: Tensor, spec: QuantSpec) -> Tensor:
    """(R, G, block_rows · group_size), filled with zeros: what shares a scale lies in the last dimension."""
    assert spec.group_size is not None
    rows = spec.block_rows
    lacking = -len(weight_OC) % rows
    blocks_OGg = in_blocks(F.pad(weight_OC, (0, 0, 0, lacking)) if lacking else weight_OC, spec.group_size)
    return blocks_OGg.unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)


def of_weight_blocks(blocks: Tensor, shape: torch.Size, spec: QuantSpec) -> Tensor:
    """The inverse: (O, C) without what was filled up."""
    outputs, channels = shape
    rows = blocks.unflatten(2, (spec.block_rows, -1)).transpose(1, 2).flatten(0, 1)
    return rows.flatten(1)[:outputs, :channels]


def by_row(scale_RG: Tensor, outputs: int, spec: QuantSpec) -> Tensor:
    """The scale of each output channel, (O, G)."""
    return scale_RG if spec.block_rows == 1 else scale_RG.repeat_interleave(spec.block_rows, 0)[:outputs]


def by_channel(scale_OG: Tensor, channels: int, spec: QuantSpec) -> Tensor:
    """The scale of each input channel, (…, C)."""
    assert spec.group_size is not None
    return scale_OG.repeat_interleave(spec.group_size, -1)[..., :channels]


def tensor_scale(absmax: Tensor, spec: QuantSpec) -> Tensor | None:
    """The second level of a tensor (of each sample) whose largest magnitude this is, float32; None of formats without one."""
    if spec.scale != E4M3:
        return None
    largest = FOUR_OVER_SIX_MAX if spec.four_over_six else E4M3_MAX
    tensor = absmax.float() / (largest * spec.quant_max)
    return tensor.masked_fill(tensor == 0, 1)


def scales_of(absmax: Tensor, spec: QuantSpec, tensor: Tensor | None = None) -> Scales:
    """Of blocks whose largest magnitudes these are; tensor: their `tensor_scale`, broadcast against them."""
    absmax = absmax.float()
    if spec.scale == E8M0:
        return Scales(_powers(absmax, spec).to(torch.float8_e8m0fnu), None)
    scale = absmax / spec.quant_max
    if spec.scale != E4M3:
        return Scales(kept(scale, spec), None)
    assert tensor is not None
    least = LEAST_NORMAL if spec.scale_rule == RECIPROCAL else 0.0
    return Scales((scale / tensor).clamp(least, E4M3_MAX).to(torch.float8_e4m3fn), tensor)


def kept(scale: Tensor, spec: QuantSpec) -> Tensor:
    """A scale in 32 or 16 bits; 1 where it is 0, since nothing but zeros has that."""
    scale = scale.to(torch.bfloat16) if spec.scale == BFLOAT16 else scale
    return scale.masked_fill(scale == 0, 1)


def _powers(absmax: Tensor, spec: QuantSpec) -> Tensor:
    """The power of two of each block, float32; NaN stays NaN."""
    grid, largest = GRIDS[spec.number], GRIDS[spec.number].largest
    most = math.frexp(largest)[1] - 1  # the exponent of the largest
    rule = spec.scale_rule
    if rule == RCEIL:
        digits, power = torch.frexp(absmax / largest)  # digits in [0.5, 1)
        power = power - (digits == 0.5).int()
    else:
        digits, power = torch.frexp(absmax)
        power = power - 1 - most
        if rule == CEIL:
            power = power + (digits > 0.5).int()
        if rule == EVEN:  # half of a code's last digit more reaches the next power of two
            power = power + (digits >= 1 - 2.0 ** -(grid.mantissa + 2)).int()
    power = torch.where(absmax == 0, LEAST_POWER, power).clamp(LEAST_POWER, MOST_POWER)
    power = torch.where(absmax.isinf(), MOST_POWER, power)
    return torch.where(absmax.isnan(), absmax, torch.ldexp(torch.ones_like(absmax), power))


def block_codes(x: Tensor, scales: Scales, spec: QuantSpec) -> Tensor:
    """Float-valued codes of (…, g) by the scales (…) of its blocks."""
    if spec.scale_rule == RECIPROCAL:
        assert scales.tensor is not None
        codes = x * ((1 / scales.tensor) / scales.block.float())[..., None]
    else:
        whole = scales.whole()[..., None]
        codes = (x / whole).masked_fill(whole == 0, 0)
    if spec.number == INT:
        return codes.round_().clamp_(spec.quant_min, spec.quant_max)
    return to_grid(codes, spec.number)


def keeps_float32(spec: QuantSpec) -> bool:
    """Whether values are codes with a scale of 16 or 32 bits; a small scale is part of what is multiplied."""
    return spec.scale in (FLOAT32, BFLOAT16)
