"""W8A8 by torchao's integer product (`torchao.kernel.int_scaled_matmul`), on the codes and scales of our recipe.

For whoever ships with torchao and wants its product in the table. Never chosen by itself (`backend=torchao_int8`): on CPUs it is slower than
`vnni`, and on GPUs it has not run here. Tokens are quantized as the recipe says, in plain torch; torchao's own layers divide by
max|x| / 127.5 instead of 127, so that a checkpoint of torchao's is another row (`method=external`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.integers import not_w8a8
from ditbench.harness.backends.others import library_lacks
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, activation_affine, to_codes
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "torchao_int8"
KIND = "measured"
PRIORITY = -1
SUMMARY = (
    "W8A8 by torchao (pip install torchao): symmetric, weights per channel, activations per token; only when asked for"
)


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    if problem := not_w8a8(NAME, recipe):
        return problem
    if device.type not in ("cpu", "cuda"):
        return f"{NAME} runs on CPUs and CUDA devices, the device is {device}"
    return lacks()


@cache
def lacks() -> str | None:
    return library_lacks(NAME, "torchao", _product)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return TorchaoKernel(recipe.weight, recipe.act)


class TorchaoKernel(Kernel):
    """Arithmetic in int8, result in float32 whatever the input's dtype. codes_CO: int8, as the product reads them."""

    codes_CO: Tensor
    scale_O: Tensor

    def __init__(self, weight: QuantizedWeight, act: ActQuant) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("codes_CO", weight.codes_OC.to(torch.int8).contiguous().t())
        self.register_buffer("scale_O", weight.scale_OG[:, 0].float().contiguous())

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        x = x.float()
        scale, _ = activation_affine(x, self.act, step)
        codes_MC = to_codes(x, scale, None, self.act.spec).to(torch.int8).reshape(-1, x.shape[-1])
        product_MO = _product()(codes_MC, self.codes_CO, scale.reshape(-1, 1))
        return (product_MO * self.scale_O).reshape(*x.shape[:-1], -1)


@cache
def _product() -> Any:
    """Raises ImportError: this torchao has none."""
    from torchao.kernel import int_scaled_matmul

    return int_scaled_matmul
