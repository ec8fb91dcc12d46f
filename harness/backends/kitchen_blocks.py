"""NVFP4 and MXFP8 by comfy-kitchen's products (`comfy_kitchen.scaled_mm_nvfp4`, `scaled_mm_mxfp8`), on the codes and scales of our recipe.

For whoever ships with ComfyUI and wants its products in the table. Never chosen by itself (`backend=kitchen_blocks`), and not yet run on a
device: its NVFP4 is cuBLAS's and leaves in bfloat16, its MXFP8 is torch's `scaled_mm`, as in `cuda_blocks`. On the CPU it has neither.
Tokens are quantized as the recipe says, in plain torch; what comfy-kitchen is handed is held against its layouts in `tests/backends/test_kitchen_blocks.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.backends import cuda_blocks
from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.block_layouts import TILE_ROWS
from ditbench.harness.backends.others import library_lacks
from ditbench.harness.quant.quantizers import QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import E2M1

NAME = "kitchen_blocks"
KIND = "measured"
PRIORITY = -1
SUMMARY = "NVFP4 and MXFP8 by comfy-kitchen (pip install comfy-kitchen) on Blackwell; only when asked for; not yet run on a device"
FORMATS = ("NVFP4", "MXFP8")


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    return cuda_blocks.lacks(NAME, recipe, device, FORMATS) or lacks()


@cache
def lacks() -> str | None:
    return library_lacks(NAME, "comfy-kitchen", _products)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return KitchenBlockKernel(recipe.weight, recipe.act)


class KitchenBlockKernel(cuda_blocks.BlockKernel):
    def multiplied(self, a: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        nvfp4, mxfp8 = _products()
        a, scale_a, scale_b = a.view(torch.uint8), _in_rows(scale_a, len(a)), _in_rows(scale_b, len(self.codes))
        if self.spec.number == E2M1:
            one = torch.ones((), device=a.device)  # both float32 scales follow: a sample of the batch has its own
            return nvfp4(a, self.codes, one, one, scale_a, scale_b, out_dtype=torch.bfloat16)
        codes = self.codes.view(torch.float8_e4m3fn)
        return mxfp8(a.view(torch.float8_e4m3fn), codes, scale_a, scale_b, out_dtype=torch.float32)


def _in_rows(scales: Tensor, rows: int) -> Tensor:
    """Swizzled scales in the two dimensions that comfy-kitchen asks of them: rows, filled up to 128s, and blocks."""
    return scales.view(-(-rows // TILE_ROWS) * TILE_ROWS, -1)


@cache
def _products() -> tuple[Any, Any]:
    """Raises ImportError: this comfy-kitchen lacks one."""
    from comfy_kitchen import scaled_mm_mxfp8, scaled_mm_nvfp4

    return scaled_mm_nvfp4, scaled_mm_mxfp8
