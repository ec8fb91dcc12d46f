"""W4A4 where the chip multiplies no 4-bit integers (Hopper): 4-bit storage, int8 arithmetic. The name says so in every record.

Weights are packed in 4 bits; activation codes of up to 4 bits travel in bytes. Memory is that of W4, speed that of W4A8.
"""

from __future__ import annotations

import torch

from ditbench.harness.backends.cuda_w4a8 import make_kernel, packed_unsupported
from ditbench.harness.quant.recipe import LayerRecipe

__all__ = ["make_kernel"]

NAME = "cuda_w4a4_on_int8"
KIND = "measured"
PRIORITY = 20
SUMMARY = "W2…4 A2…4 run on int8 tensor cores, not int4 ones: the memory of 4-bit weights, the speed of W4A8"


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    return packed_unsupported(NAME, recipe, device, act_bits=range(2, 5))
