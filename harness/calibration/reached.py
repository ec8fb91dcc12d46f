"""Which layers a model's own calls reach: what nothing calls is neither quantized nor judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.layer_names import aliases, fused_layers
from ditbench.harness.quant.target import QUANTIZABLE


@contextmanager
def unreached(model: nn.Module) -> Iterator[set[str]]:
    """Names of the linear layers that no call inside the block has reached so far, by their first names."""
    same = aliases(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}
    left = {same.get(name, name) for name in layers}

    def reach(name: str):
        return lambda module, args: left.discard(name)

    handles = [module.register_forward_pre_hook(reach(same.get(name, name))) for name, module in layers.items()]
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


def check_fused(model: nn.Module, left: set[str]) -> None:
    """Raise UserError where diffusers fused projections that the attention does not use: it runs those that were fused."""
    for old, (fused, _) in fused_layers(model).items():
        if fused in left and old not in left:
            raise UserError(f"{fused} is fused, but diffusers runs {old} as before; set model.fuse_qkv=false")
