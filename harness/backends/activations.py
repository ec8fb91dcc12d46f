"""Activations that a product may end in: applied to its float32 sum, before the one cast to the model's dtype.

`simulate` applies the same function of `vnni_kernels/` to its own sum, so that both give the same bits. To 10⁻⁵ it is torch's,
which is applied to a sum that has been cast already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GELU_TANH, SILU = "gelu-tanh", "silu"
NUMBERS = {None: 0, GELU_TANH: 1, SILU: 2}  # in the kernels


def activate(y: Tensor, activation: str | None) -> Tensor:
    """y float32 → the same of its values; on a CPU by the kernels, which are there wherever layers end in an activation."""
    if activation is None:
        return y
    if y.device.type != "cpu":  # the model was moved after it had been built
        return F.gelu(y.float(), approximate="tanh") if activation == GELU_TANH else F.silu(y.float())
    return torch.ops.ditbench_vnni.activate(y.float().contiguous(), NUMBERS[activation])
