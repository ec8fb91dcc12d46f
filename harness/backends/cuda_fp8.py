"""e4m3 weights and activations on FP8 tensor cores: rows by our Triton kernel, the product by `torch._scaled_mm`.

In bf16 the product is row-wise: it applies both scales, and the bias where no low-rank branch comes before it. In other dtypes
its float32 sums leave unscaled, and the scales follow as in `simulate`: row-wise, torch writes float32 on Hopper alone.

Not on the CPU: `torch._scaled_mm` runs there, but far slower than bf16. No GPU has run this yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.triton_kernels.limits import device_lacks, rows_lack
from ditbench.harness.quant.quantizers import QuantizedWeight, UnevenQuant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import E4M3

NAME = "cuda_fp8"
KIND = "measured"
PRIORITY = 20
SUMMARY = "FP8 (e4m3 both sides) on FP8 tensor cores (Ada, Hopper on); weights per channel or tensor, widths in 16s"
CAPABILITY = (8, 9)  # of FP8 tensor cores, and of torch's row-wise product
MULTIPLE = 16  # of both widths: torch's product takes no others


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    weight, act = recipe.weight, recipe.act
    if not isinstance(weight, QuantizedWeight) or act is None or isinstance(act, UnevenQuant):
        return f"{NAME} takes e4m3 weights and activations"
    if not weight.spec.number == act.spec.number == E4M3:
        return f"{NAME} takes e4m3 weights and activations; these are {weight.spec.number} and {act.spec.number}"
    if weight.spec.in_blocks or act.spec.in_blocks:
        return (
            f"{NAME} does not know scales in blocks, as {(weight if weight.spec.in_blocks else act).spec.name} has them"
        )
    if weight.scale_OG.shape[1] != 1:
        return f"{NAME} takes weights per_channel or per_tensor, these are {weight.spec.granularity}"
    outputs, channels = weight.codes_OC.shape
    if outputs % MULTIPLE or channels % MULTIPLE:
        return f"{NAME} takes widths in multiples of {MULTIPLE}, this layer is {channels} → {outputs}"
    return rows_lack(NAME, act) or device_lacks(NAME, device, CAPABILITY)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    from ditbench.harness.backends.triton_kernels.layers import Float8Kernel

    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return Float8Kernel(recipe.weight, recipe.act)
