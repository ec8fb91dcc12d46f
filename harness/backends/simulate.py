"""Simulated execution: codes are stored packed, arithmetic is float. Runs every recipe anywhere.

Where both sides are codes × scale, float32 multiplies the codes (less their zero points) and scales follow, weight's first, as
an integer kernel does it. Sums of products of integers are whole numbers, exact below 2²⁴, so that a kernel which scales in
this order gives the same bits; in four bits one code that rounds the other way would change an image visibly. Accelerators
multiply them in bfloat16 where that gives the same sums (`exact_sums`). Products of small floats are exact too, their sums are
rounded to float32. Scales of blocks in 8 bits (NVFP4's e4m3, MX's e8m0) are part of what is multiplied, as in a block-scaled
product: code times scale has 6 digits at most, so that nothing is rounded there. NVFP4's float32 of the tensor follows the sums.
Its speed says nothing, so none is reported.
"""

from __future__ import annotations

import copy
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.exact_sums import WholeWeight
from ditbench.harness.backends.few_rows import linear
from ditbench.harness.quant.block_scales import by_channel, by_row, keeps_float32
from ditbench.harness.quant.packing import pack, unpack
from ditbench.harness.quant.quantizers import (
    ActQuant,
    LookupWeight,
    QuantizedWeight,
    UnevenQuant,
    activation_affine,
    blocked_activation,
    fake_quantize_activation,
    to_codes,
)
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import FLOAT8, QuantSpec

NAME = "simulate"
KIND = "simulated"
PRIORITY = 0
SUMMARY = "float arithmetic on dequantized values; every format, every device; no speed is reported"


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    return None


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    return SimulatedKernel(recipe, weight_OC)


class SimulatedKernel(Kernel):
    """Packed codes (or the float weight), unpacked on first use into a cache that is not part of the stored model."""

    weight_OC: Tensor
    packed: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, recipe: LayerRecipe, weight_OC: Tensor) -> None:
        super().__init__()
        self.act: ActQuant | None = recipe.act
        self.quantized = recipe.weight is not None
        if recipe.weight is None:
            self.register_buffer("weight_OC", weight_OC)
        elif isinstance(recipe.weight, LookupWeight):
            self.spec, self.width = recipe.weight.spec, recipe.weight.codes_OC.shape[1]
            self.num_levels, self.code_bits = recipe.weight.num_levels, recipe.weight.code_bits
            self.register_buffer("packed", pack(recipe.weight.codes_OC, self.code_bits))
            self.levels = copy.deepcopy(recipe.weight.levels)  # moved with us, and the recipe stays where it is
        else:
            self.spec, self.width = recipe.weight.spec, recipe.weight.codes_OC.shape[1]
            if self.spec.number in FLOAT8:
                self.register_buffer("packed", recipe.weight.codes_OC.view(torch.uint8))
            else:
                offset_codes = recipe.weight.codes_OC.to(torch.int16) - self.spec.least_code
                self.register_buffer("packed", pack(offset_codes, self.spec.bits))
            self.register_buffer("scale_OG", recipe.weight.scale_OG)
            self.register_buffer("zero_point_OG", recipe.weight.zero_point_OG)
            self.register_buffer("tensor_scale", recipe.weight.tensor_scale)
        if recipe.act is not None and recipe.act.tables:
            self.act_tables = nn.ModuleList(recipe.act.tables)  # counted, and moved with us
        self._unpacked: Tensor | None = None
        self._whole: WholeWeight | None = None
        self._decided_on: torch.device | None = None

    def forget(self) -> None:
        self._unpacked = self._whole = self._decided_on = None

    def quantized_weight(self) -> QuantizedWeight | LookupWeight:
        if hasattr(self, "levels"):
            codes_OC = unpack(self.packed, self.code_bits, self.width)
            return LookupWeight(codes_OC, self.levels, self.num_levels, self.spec)
        if self.spec.number in FLOAT8:
            codes = self.packed.view(self.spec.code_dtype)
        else:
            codes = unpack(self.packed, self.spec.bits, self.width).to(torch.int16) + self.spec.least_code
        return QuantizedWeight(codes, self.scale_OG, self.zero_point_OG, self.spec, self.tensor_scale)

    @property
    def multiplies_codes(self) -> bool:
        """Both sides are codes × scale."""
        evenly = self.quantized and not hasattr(self, "levels")
        return evenly and self.act is not None and not isinstance(self.act, UnevenQuant)

    def unpacked(self) -> Tensor:
        """weight_OC in float32: codes less their zero points, or values where no codes are multiplied."""
        if not self.quantized:
            return self.weight_OC
        if self._unpacked is None or self._unpacked.device != self.packed.device:
            weight = self.quantized_weight()
            self._unpacked = centred_codes(weight) if self.multiplies_codes else weight.dequantize()  # type: ignore[arg-type]
        return self._unpacked

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        if self.act is None and not self.quantized:
            return linear(x.to(self.weight_OC.dtype), self.weight_OC)
        x = x if x.dtype == torch.float64 else x.float()
        if self.multiplies_codes:
            return self.product(x, step)
        if self.act is not None:
            x = fake_quantize_activation(x, self.act, step)
        return linear(x, self.unpacked().to(x.dtype))

    def product(self, x: Tensor, step: Tensor | None) -> Tensor:
        """Σ_g ((Σ_c x_code w_code) · s_w) · s_x over the groups of either side."""
        assert self.act is not None
        codes, scale, x_size = centred_activation(x, self.act, step)
        scale_OG, w_size = self.outer_scales(x.dtype)
        sizes = [size for size in (x_size, w_size) if size]
        width = gcd(*sizes) if sizes else x.shape[-1]
        groups = -(-x.shape[-1] // width)
        codes = _filled(codes, groups * width)
        whole = None if codes.dtype == torch.float64 or codes.requires_grad else self.whole_weight(groups, width)
        weight_OC = _filled(self.unpacked().to(x.dtype), groups * width) if whole is None else whole.weight_OC
        total: Tensor | None = None
        for group in range(groups):
            columns = slice(group * width, (group + 1) * width)
            scale_x = scale[..., columns.start // x_size, None] if x_size else scale
            scale_w = scale_OG[:, columns.start // w_size] if w_size else scale_OG[:, 0]
            ours = codes[..., columns]
            sums = linear(ours, weight_OC[:, columns]) if whole is None else whole.product(ours, columns)
            part = sums * scale_w * scale_x
            total = part if total is None else total + part
        assert total is not None
        return total

    def outer_scales(self, dtype: torch.dtype) -> tuple[Tensor, int | None]:
        """What sums are multiplied with, (O, G), or (1, 1) where blocks have their scales inside; and the columns of a group."""
        if not keeps_float32(self.spec):
            one = self.scale_OG.new_ones((), dtype=dtype) if self.tensor_scale is None else self.tensor_scale.to(dtype)
            return one.reshape(1, 1), None
        outputs = len(self.packed)
        scale_OG = by_row(self.scale_OG, outputs, self.spec).to(dtype)
        return scale_OG, _columns(self.spec, self.width)

    def whole_weight(self, groups: int, width: int) -> WholeWeight | None:
        """The codes less their zero points as the device multiplies them exactly in bfloat16, if it does."""
        if self._decided_on != self.packed.device:
            assert self.act is not None
            self._whole = WholeWeight.of(_filled(self.unpacked(), groups * width), groups, self.act)
            self._decided_on = self.packed.device
            if self._whole is not None:
                self._unpacked = None  # float32 is no longer needed
        return self._whole


def centred_codes(weight: QuantizedWeight) -> Tensor:
    """Codes less their zero points, float32 (O, C); times their block's scale where that has 8 bits."""
    spec, width = weight.spec, weight.codes_OC.shape[1]
    if not keeps_float32(spec):
        return weight.values() * by_channel(weight.scale_OG.float(), width, spec)
    if weight.zero_point_OG is None:
        return weight.values()
    if spec.in_blocks:
        return weight.values() - by_channel(weight.zero_point_OG, width, spec)
    codes_OGg = weight.values().unflatten(1, (weight.scale_OG.shape[1], -1))
    return (codes_OGg - weight.zero_point_OG[..., None]).flatten(1)


def centred_activation(x: Tensor, act: ActQuant, step: Tensor | None) -> tuple[Tensor, Tensor, int | None]:
    """Codes less their zero points (…, C), times their block's scale where that has 8 bits; what sums are multiplied with; and
    the columns of a group: then that is (…, G), otherwise it broadcasts against the sums.
    """
    spec, width = act.spec, x.shape[-1]
    if spec.in_blocks:
        codes, scales, zero_point = blocked_activation(x, act, step)
        if not keeps_float32(spec):
            inside = (codes * scales.block.float()[..., None]).flatten(-2)[..., :width]
            return inside, x.new_ones(()) if scales.tensor is None else scales.tensor, None
        codes = codes if zero_point is None else codes - zero_point[..., None]
        return codes.flatten(-2)[..., :width], scales.whole(), _columns(spec, width)
    if spec.granularity == "per_group":
        x = x.unflatten(-1, (-1, spec.group_size))  # type: ignore[arg-type]
    scale, zero_point = activation_affine(x, act, step)
    codes = to_codes(x, scale, zero_point, spec)
    codes = codes if zero_point is None else codes - zero_point
    if spec.granularity == "per_group":
        return codes.flatten(-2), scale[..., 0], _columns(spec, width)
    return codes, scale, None


def _columns(spec: QuantSpec, width: int) -> int | None:
    """How many columns share a scale; None: all of them."""
    return spec.group_size if spec.group_size is not None and spec.group_size < width else None


def _filled(x: Tensor, width: int) -> Tensor:
    """With zeros up to so many columns."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
