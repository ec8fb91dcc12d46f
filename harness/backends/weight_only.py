"""Weights of 2 to 8 bits with activations in float, on x86 CPUs with AVX512-VNNI: they are unpacked right before each product.

One layer's weight exists in bfloat16 (float32 for float32 inputs) at a time. It saves memory, not time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.backends import vnni_extension
from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.few_rows import linear
from ditbench.harness.backends.integers import not_even, stored_bits
from ditbench.harness.quant.packing import pack
from ditbench.harness.quant.quantizers import LookupWeight, QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "weight_only"
KIND = "measured"
PRIORITY = 15
SUMMARY = (
    "W2…8 A16 on x86 CPUs with AVX512-VNNI: stored in 4 or 8 bits, unpacked before each product; memory, not speed"
)
OPERATORS = {f"{vnni_extension.LIBRARY}::dequantize": "unpack weights"}


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    weight = recipe.weight
    if weight is None or recipe.act is not None:
        return f"{NAME} is for quantized weights with activations in float"
    if isinstance(weight, LookupWeight):
        return f"{NAME} unpacks integers; these weights are looked up in a table of uneven levels"
    if problem := not_even(NAME, weight.spec):
        return problem
    width = weight.codes_OC.shape[1] // weight.scale_OG.shape[1]
    if width % vnni_extension.LANES:
        return f"{NAME} takes channels (of a group) in multiples of {vnni_extension.LANES}, these are {width}"
    if device.type != "cpu":
        return f"{NAME} runs on the CPU, the device is {device}"
    return vnni_extension.cpu_lacks()


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight)
    return WeightOnlyKernel(recipe.weight)


class WeightOnlyKernel(Kernel):
    packed: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.bits, self.is_signed = stored_bits(weight.spec.bits), weight.spec.symmetric
        codes_OC = weight.codes_OC.to(torch.int16) & (2**self.bits - 1)  # two's complement, as the operator reads it
        self.register_buffer("packed", pack(codes_OC, self.bits))
        self.register_buffer("scale_OG", weight.scale_OG.float().contiguous())
        zero_point = weight.zero_point_OG
        self.register_buffer("zero_point_OG", None if zero_point is None else zero_point.float().contiguous())

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        x = x if x.dtype == torch.bfloat16 else x.float()
        return linear(x, self.weight(x.dtype))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(O, C)."""
        return torch.ops.ditbench_vnni.dequantize(
            self.packed, self.bits, self.is_signed, self.scale_OG, self.zero_point_OG, dtype
        )
