"""Weights of uneven levels (twin-log quantization): every code is looked up in its row's table inside a bf16 product.

This saves memory, not time: levels enter as two bf16 parts, so the product costs twice a bf16 one and the look-ups come on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.integers import not_even, uneven
from ditbench.harness.backends.triton_kernels.limits import device_lacks, rows_lack
from ditbench.harness.quant.quantizers import LookupWeight
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "cuda_lookup"
KIND = "measured"
PRIORITY = 20
SUMMARY = "weights looked up in a table per row (TLQ), any activations, on bf16 tensor cores: saves memory, not time"


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    lacks = device_lacks(NAME, device)
    if lacks is not None:
        return lacks
    if not isinstance(recipe.weight, LookupWeight):
        return f"{NAME} takes weights that are looked up in a table"
    if recipe.weight.code_bits > 8:
        return f"{NAME} stores a code in a byte at most, these have {recipe.weight.code_bits} bits"
    if recipe.act is None:
        return None
    return uneven(NAME, recipe.act) or not_even(NAME, recipe.act.spec) or rows_lack(NAME, recipe.act)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    from ditbench.harness.backends.triton_kernels.layers import FloatKernel

    assert isinstance(recipe.weight, LookupWeight)
    return FloatKernel(recipe.weight, recipe.act)
