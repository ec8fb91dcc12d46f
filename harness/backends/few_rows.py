"""Linear maps of a few rows, such as one timestep per sample: each row comes out the same, however many there are.

A product of one to three rows, on two threads of up to eleven, takes other kernels than a larger one, which add in another order
(MKL in float32, one row of bfloat16). 10⁻⁶ of a timestep's embedding is enough to let a code of a layer behind it fall the other
way; from 16 rows on all are equal bit for bit. So fewer are filled up with zeros: their cost is that of one token each.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 16


def linear(x: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` of x (…, C), with LEAST rows at least."""
    rows = x.shape[:-1].numel()
    if not 0 < rows < LEAST:
        return F.linear(x, weight_OC, bias_O)
    filled = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, LEAST - rows))
    return F.linear(filled, weight_OC, bias_O)[:rows].reshape(*x.shape[:-1], -1)


class SteadyLinear(nn.Linear):
    """A linear layer that computes so."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def steady(model: nn.Module) -> None:
    """Let the plain linear layers of a model compute so, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SteadyLinear
