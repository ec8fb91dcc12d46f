"""Quantized weights and 16-bit activations: codes become bf16 inside a bf16 product. Memory is that of the weights' bits.

Codes less their zero point are whole numbers below 256, exact in bf16; scales are applied to the float32 sums. Activations are
rounded to bf16 after their transform, which is what 16 bits mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.integers import weight_lacks
from ditbench.harness.backends.triton_kernels.limits import device_lacks
from ditbench.harness.quant.quantizers import LookupWeight, QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "cuda_w4a16"
KIND = "measured"
PRIORITY = 20
SUMMARY = "W2…8 A16 on bf16 tensor cores (Ampere on); weights of up to 4 bits packed in 4, others in bytes"


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    lacks = device_lacks(NAME, device)
    if lacks is not None:
        return lacks
    if recipe.weight is None or recipe.act is not None:
        return f"{NAME} takes quantized weights and 16-bit activations"
    if isinstance(recipe.weight, LookupWeight):
        return f"{NAME} takes evenly spaced codes; these weights are looked up in a table of uneven levels"
    return weight_lacks(NAME, recipe.weight)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    from ditbench.harness.backends.triton_kernels.layers import FloatKernel

    assert isinstance(recipe.weight, QuantizedWeight)
    return FloatKernel(recipe.weight, None)
