"""Weights and activations of 5 to 8 bits on int8 tensor cores, by Triton kernels.

One launch transforms, scales and rounds the rows, a second multiplies int8 by int8 in int32 and applies scales, zero points,
bias and the low-rank branch; see `triton_kernels`. Fewer than 8 bits are stored and run as 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.integers import not_integers, weight_lacks
from ditbench.harness.backends.triton_kernels.limits import device_lacks, rows_lack
from ditbench.harness.quant.quantizers import QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "cuda_int8"
KIND = "measured"
PRIORITY = 20
SUMMARY = (
    "W5…8 A2…8 on int8 tensor cores (Ampere on); weights in bytes, any granularity; activations per token or tensor"
)


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    lacks = device_lacks(NAME, device) or not_integers(NAME, recipe)
    if lacks is not None:
        return lacks
    weight, act = recipe.weight, recipe.act
    assert isinstance(weight, QuantizedWeight) and act is not None
    if weight.spec.bits <= 4:
        return f"{NAME} stores weights in bytes, which would waste half of {weight.spec.bits} bits"
    return rows_lack(NAME, act) or weight_lacks(NAME, weight)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    from ditbench.harness.backends.triton_kernels.layers import IntKernel

    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return IntKernel(recipe.weight, recipe.act)
