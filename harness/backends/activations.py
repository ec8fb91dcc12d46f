"""Activations that a product may end in: applied to its float32 sum, before the one cast to the model's dtype.

`simulate` applies the same function of `vnni_kernels/` to its own sum, so that both give the same bits. To 10⁻⁵ it is torch's,
which is applied to a sum that has been cast already. On CUDA both are functions of `triton_kernels/`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.backends.between import kernels_of

GELU_TANH, SILU, GELU_ERF = "gelu-tanh", "silu", "gelu-erf"
NUMBERS = {None: 0, GELU_TANH: 1, SILU: 2, GELU_ERF: 3}  # in the kernels


def activate(y: Tensor, activation: str | None) -> Tensor:
    """y float32 → the same of its values; by kernels, which are there wherever layers end in an activation."""
    if activation is None:
        return y
    kernels = kernels_of(y.device)
    if kernels is None:  # the model was moved after it had been built
        if activation == SILU:
            return F.silu(y.float())
        return F.gelu(y.float(), approximate="tanh" if activation == GELU_TANH else "none")
    return kernels.activate(y.float().contiguous(), NUMBERS[activation])
