"""Packed weights of up to 4 bits and activations of 5 to 8: unpacked to int8 inside the product, on int8 tensor cores.

Two codes lie in a byte (3 and 2 bits take 4). Scales per group are applied to the int32 sums of their group, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.integers import not_integers, weight_lacks
from ditbench.harness.backends.triton_kernels.limits import device_lacks, rows_lack
from ditbench.harness.quant.quantizers import QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "cuda_w4a8"
KIND = "measured"
PRIORITY = 20
SUMMARY = "W2…4 A5…8 on int8 tensor cores (Ampere on); weights packed in 4 bits, per channel or group"


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    return packed_unsupported(NAME, recipe, device, act_bits=range(5, 9))


def packed_unsupported(name: str, recipe: LayerRecipe, device: torch.device, act_bits: range) -> str | None:
    lacks = device_lacks(name, device) or not_integers(name, recipe)
    if lacks is not None:
        return lacks
    weight, act = recipe.weight, recipe.act
    assert isinstance(weight, QuantizedWeight) and act is not None
    if weight.spec.bits > 4:
        return f"{name} packs weights of up to 4 bits, these have {weight.spec.bits}"
    if act.spec.bits not in act_bits:
        return f"{name} takes activations of {act_bits[0]} to {act_bits[-1]} bits, these have {act.spec.bits}"
    return rows_lack(name, act) or weight_lacks(name, weight)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    from ditbench.harness.backends.triton_kernels.layers import IntKernel

    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return IntKernel(recipe.weight, recipe.act)
