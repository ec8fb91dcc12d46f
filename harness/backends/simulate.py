"""Simulated execution: codes are stored packed, arithmetic is float. Runs every recipe anywhere.

Where both sides are codes × scale, float32 multiplies the codes (less their zero points) and scales follow, weight's first, as
an integer kernel does it. Sums of products of integers are whole numbers, exact below 2²⁴, so that a kernel which scales in
this order gives the same bits; in four bits one code that rounds the other way would change an image visibly. Accelerators
multiply them in bfloat16 where that gives the same sums (`exact_sums`). Products of e4m3 codes are exact too, their sums are
rounded to float32. Its speed says nothing, so none is reported.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.exact_sums import WholeWeight
from ditbench.harness.backends.few_rows import linear
from ditbench.harness.quant.packing import pack, unpack
from ditbench.harness.quant.quantizers import (
    ActQuant,
    LogSqrt2Quant,
    LookupWeight,
    QuantizedWeight,
    activation_affine,
    fake_quantize_activation,
    to_codes,
)
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import E4M3

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
            if self.spec.number == E4M3:
                self.register_buffer("packed", recipe.weight.codes_OC.view(torch.uint8))
            else:
                offset_codes = recipe.weight.codes_OC.to(torch.int16) - self.spec.quant_min
                self.register_buffer("packed", pack(offset_codes, self.spec.bits))
            self.register_buffer("scale_OG", recipe.weight.scale_OG)
            self.register_buffer("zero_point_OG", recipe.weight.zero_point_OG)
        if recipe.act is not None and recipe.act.scale is not None:
            self.act_scale, self.act_zero_point = recipe.act.scale, recipe.act.zero_point  # counted, and moved with us
        self._unpacked: Tensor | None = None
        self._whole: WholeWeight | None = None
        self._decided_on: torch.device | None = None

    def forget(self) -> None:
        self._unpacked = self._whole = self._decided_on = None

    def quantized_weight(self) -> QuantizedWeight | LookupWeight:
        if hasattr(self, "levels"):
            codes_OC = unpack(self.packed, self.code_bits, self.width)
            return LookupWeight(codes_OC, self.levels, self.num_levels, self.spec)
        if self.spec.number == E4M3:
            codes = self.packed.view(self.spec.code_dtype)
        else:
            codes = unpack(self.packed, self.spec.bits, self.width).to(torch.int16) + self.spec.quant_min
        return QuantizedWeight(codes, self.scale_OG, self.zero_point_OG, self.spec)

    @property
    def multiplies_codes(self) -> bool:
        """Both sides are codes × scale."""
        evenly = self.quantized and not hasattr(self, "levels")
        return evenly and self.act is not None and not isinstance(self.act, LogSqrt2Quant)

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
        codes, scale = centred_activation(x, self.act, step)
        grouped = self.act.spec.granularity == "per_group"
        x_groups, w_groups = codes.shape[-2] if grouped else 1, self.scale_OG.shape[1]
        groups = max(x_groups, w_groups)
        width = x.shape[-1] // groups
        codes, scale_OG = codes.reshape(*x.shape[:-1], groups, width), self.scale_OG.to(x.dtype)
        whole = None if codes.dtype == torch.float64 or codes.requires_grad else self.whole_weight(groups)
        weight_OC = self.unpacked().to(x.dtype) if whole is None else whole.weight_OC
        total: Tensor | None = None
        for group in range(groups):
            scale_x = scale[..., group % x_groups, :] if grouped else scale
            columns = slice(group * width, (group + 1) * width)
            ours = codes[..., group, :]
            sums = linear(ours, weight_OC[:, columns]) if whole is None else whole.product(ours, columns)
            part = sums * scale_OG[:, group % w_groups] * scale_x
            total = part if total is None else total + part
        assert total is not None
        return total

    def whole_weight(self, groups: int) -> WholeWeight | None:
        """The codes less their zero points as the device multiplies them exactly in bfloat16, if it does."""
        if self._decided_on != self.packed.device:
            assert self.act is not None
            self._whole = WholeWeight.of(self.unpacked(), groups, self.act)
            self._decided_on = self.packed.device
            if self._whole is not None:
                self._unpacked = None  # float32 is no longer needed
        return self._whole


def centred_codes(weight: QuantizedWeight) -> Tensor:
    """Codes less their zero points, float32 (O, C)."""
    codes_OGg = weight.codes_OC.float().unflatten(1, (weight.scale_OG.shape[1], -1))
    if weight.zero_point_OG is not None:
        codes_OGg = codes_OGg - weight.zero_point_OG[..., None]
    return codes_OGg.flatten(1)


def centred_activation(x: Tensor, act: ActQuant, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes less their zero points, (…, C) or (…, G, g) for per_group, and the scale that broadcasts against them."""
    if act.spec.granularity == "per_group":
        x = x.unflatten(-1, (-1, act.spec.group_size))  # type: ignore[arg-type]
    scale, zero_point = activation_affine(x, act, step)
    codes = to_codes(x, scale, zero_point, act.spec)
    return codes if zero_point is None else codes - zero_point, scale
