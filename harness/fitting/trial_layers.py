"""Layers of a built float model that a method tries things on: a transform, a rounded weight, an activation quantizer.

`build` makes a model for good. A search over candidates wants to change one quantizer of one layer, look, and put it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.quant.quantizers import ActQuant
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe, to_device
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform


def float_model(target: Target, layers: Iterable[str], dtype) -> nn.Module:
    """The float transformer with the named layers rebuilt, so that the functions below can change them; on target.device."""
    recipe = ModelRecipe({name: LayerRecipe() for name in layers})
    return build(target, recipe, dtype=dtype, device=target.device)


class TrialLayer:
    """One linear layer of a `float_model`.

    weight_OC: its float weight under its transform; what is rounded. Whatever it is given moves to where this lies.
    """

    def __init__(self, layer: QuantLinear) -> None:
        self.layer, self.kernel = layer, layer.kernel
        self.weight_OC: Tensor = layer.kernel.weight_OC  # type: ignore[assignment]

    def transform(self, transform: Transform, weight_OC: Tensor) -> None:
        """From now on the layer computes transform(x) · weight_OCᵀ, weight_OC being its float weight transformed."""
        self.layer.transform = None if transform.is_identity else to_device(transform, self.weight_OC.device)
        self.weight_OC = self.kernel.weight_OC = weight_OC.to(self.weight_OC)

    def round(self, weight_OC: Tensor | None = None, act: ActQuant | None = None) -> None:
        """A rounded weight and an activation quantizer; what is not given is in float."""
        self.kernel.weight_OC = self.weight_OC if weight_OC is None else weight_OC.to(self.weight_OC)
        self.kernel.act = to_device(act, self.weight_OC.device)

    @contextmanager
    def rounded(self, weight_OC: Tensor | None = None, act: ActQuant | None = None) -> Iterator[None]:
        """`round`, and back to float."""
        self.round(weight_OC, act)
        try:
            yield
        finally:
            self.round()


def trial_layers(model: nn.Module) -> dict[str, TrialLayer]:
    return {name: TrialLayer(layer) for name, layer in quant_layers(model).items()}


def input_ranges(stream: BlockStream, block: nn.Module, layers: dict[str, TrialLayer]) -> dict[str, Tensor]:
    """Static range ends of the transformed inputs of one block's layers, over all calls of `stream`.

    Named as `rounding.static_ranges` names them: `<layer>/act_low` and `<layer>/act_high`, one row for all steps.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        low, high = x.amin()[None], x.amax()[None]
        found[f"{name}/act_low"] = torch.minimum(found.get(f"{name}/act_low", low), low)
        found[f"{name}/act_high"] = torch.maximum(found.get(f"{name}/act_high", high), high)

    stream.watch(block, {layer.kernel: lambda x, name=name: see(name, x) for name, layer in layers.items()})
    return {key: end.cpu() for key, end in found.items()}
