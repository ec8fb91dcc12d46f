"""Multiply-accumulates of one call of a transformer, by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditbench.harness.models.calls import float_dtype, placed, take_apart
from ditbench.harness.quant.target import QUANTIZABLE, weight_matrix


@torch.no_grad()
def count_macs(transformer: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Multiply-accumulates of one call on a batch of one row, by layer name; "" is the whole call, attention included."""
    macs: dict[str, int] = {}

    def hook(name: str):
        def count(module: nn.Linear | nn.Conv2d, args: tuple, output: Tensor) -> None:
            per_output = weight_matrix(module).shape[1]
            macs[name] = macs.get(name, 0) + output[:1].numel() * per_output

        return count

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in transformer.named_modules()
        if isinstance(module, QUANTIZABLE)
    ]
    dtype = float_dtype(transformer)
    rows, shape = take_apart(inputs, len(inputs["hidden_states"]))
    one = shape.arguments({name: tensor[:1] for name, tensor in rows.items()})
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            transformer(**placed(one, dtype, "cpu"))
    finally:
        for handle in handles:
            handle.remove()
    unseen = {n: 0 for n, m in transformer.named_modules() if isinstance(m, QUANTIZABLE) and n not in macs}
    return macs | unseen | {"": flops.get_total_flops() // 2}
