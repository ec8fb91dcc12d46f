"""W8A8 by comfy-kitchen's int8 layer (`comfy_kitchen.int8_linear`), on the codes and scales of our weights.

For whoever ships with ComfyUI and wants its layer in the table. Never chosen by itself (`backend=kitchen_int8`): on CPUs it is eager torch, and
its CUDA and Triton kernels have not run here. It quantizes tokens itself, by max|x| / 127 as our recipes do without `clip`, in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.integers import not_w8a8
from ditbench.harness.backends.others import library_lacks
from ditbench.harness.quant.quantizers import QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "kitchen_int8"
KIND = "measured"
PRIORITY = -1
SUMMARY = "W8A8 by comfy-kitchen (pip install comfy-kitchen): symmetric, weights per channel, activations per token; only when asked for"


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    if problem := not_w8a8(NAME, recipe):
        return problem
    assert recipe.act is not None
    if recipe.act.clip != 1.0:
        return f"{NAME} quantizes tokens by their largest value; this layer keeps {recipe.act.clip:g} of it"
    if device.type not in ("cpu", "cuda"):
        return f"{NAME} runs on CPUs and CUDA devices, the device is {device}"
    return lacks()


@cache
def lacks() -> str | None:
    return library_lacks(NAME, "comfy-kitchen", _linear)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight)
    return KitchenKernel(recipe.weight)


class KitchenKernel(Kernel):
    """Arithmetic in int8, result in float32 whatever the input's dtype."""

    codes_OC: Tensor
    scale_O: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("codes_OC", weight.codes_OC.to(torch.int8).contiguous())
        self.register_buffer("scale_O", weight.scale_OG[:, 0].float().contiguous())

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        return _linear()(x.float(), self.codes_OC, self.scale_O, out_dtype=torch.float32)


@cache
def _linear() -> Any:
    """Raises ImportError: this comfy-kitchen has none."""
    from comfy_kitchen import int8_linear

    return int8_linear
