"""Matrices of a block that belong to no layer: experts kept as one 3-D parameter, and whatever else a class multiplies by itself.

No walk over layers sees them: a method would leave them in float, and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ditbench.harness.common.errors import UserError

MOST = 0.1  # of the blocks' weights: gates that choose experts and tables of modulation are far below
LAYERS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
)  # a layer that cannot be quantized is named among those in float


def check_weights_are_of_layers(transformer: nn.Module, blocks: Iterable[str]) -> None:
    """Raises UserError if more than MOST of the weights of the blocks stay in float because no layer holds them."""
    stray: dict[str, nn.Parameter] = {}
    total = 0
    for block in blocks:
        for name, module in transformer.get_submodule(block).named_modules(prefix=block):
            for each, weight in module.named_parameters(recurse=False):
                total += weight.numel() if weight.ndim > 1 else 0
                if weight.ndim > 1 and not isinstance(module, LAYERS):
                    stray[f"{name}.{each}"] = weight
    count = sum(weight.numel() for weight in stray.values())
    if count <= MOST * total:
        return
    largest = max(stray, key=lambda name: stray[name].numel())
    raise UserError(
        f"a {type(transformer).__name__} keeps {100 * count / total:.0f} % of its blocks' weights in parameters that belong to no linear "
        f"layer, such as {largest} {tuple(stray[largest].shape)} (experts, mostly); no method sees them and they would stay in float, so it is refused"
    )
