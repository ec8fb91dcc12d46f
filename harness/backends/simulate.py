"""Simulated execution: codes are stored packed, arithmetic is float on dequantized values. Runs every recipe anywhere.

Its numbers are those of the integer arithmetic up to float rounding; its speed says nothing, so none is reported.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.backends.base import Kernel
from harness.quant.packing import pack, unpack
from harness.quant.quantizers import ActQuant, LookupWeight, QuantizedWeight, fake_quantize_activation
from harness.quant.recipe import LayerRecipe

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
            offset_codes = recipe.weight.codes_OC.to(torch.int16) - self.spec.quant_min
            self.register_buffer("packed", pack(offset_codes, self.spec.bits))
            self.register_buffer("scale_OG", recipe.weight.scale_OG)
            self.register_buffer("zero_point_OG", recipe.weight.zero_point_OG)
        if recipe.act is not None and recipe.act.scale is not None:
            self.act_scale, self.act_zero_point = recipe.act.scale, recipe.act.zero_point  # counted, and moved with us
        self._dequantized: Tensor | None = None

    def quantized_weight(self) -> QuantizedWeight | LookupWeight:
        if hasattr(self, "levels"):
            codes_OC = unpack(self.packed, self.code_bits, self.width)
            return LookupWeight(codes_OC, self.levels, self.num_levels, self.spec)
        codes = unpack(self.packed, self.spec.bits, self.width).to(torch.int16) + self.spec.quant_min
        return QuantizedWeight(codes, self.scale_OG, self.zero_point_OG, self.spec)

    def dequantized(self) -> Tensor:
        if not self.quantized:
            return self.weight_OC
        if self._dequantized is None or self._dequantized.device != self.packed.device:
            self._dequantized = self.quantized_weight().dequantize()
        return self._dequantized

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        if self.act is None and not self.quantized:
            return F.linear(x.to(self.weight_OC.dtype), self.weight_OC)
        x = x if x.dtype == torch.float64 else x.float()
        if self.act is not None:
            x = fake_quantize_activation(x, self.act, step)
        return F.linear(x, self.dequantized().to(x.dtype))
