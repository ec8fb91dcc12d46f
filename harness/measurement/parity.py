"""Real kernels against simulated execution of one recipe: layer by layer on the same inputs, and in the images.

Layers are compared in float32, after scales, bias and low-rank branch, on what they read in the model as it runs. A backend
that computes what it says differs by rounding of float32 sums alone. Sums of e4m3 products are not whole numbers, so that
every kernel rounds them its own way, codes near a tie fall otherwise, and images move. Images in FP8 have a limit that leaves
room for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditbench.harness.backends.base import known_backends
from ditbench.harness.build.build import build_layer, clock_of
from ditbench.harness.common.devices import in_float64
from ditbench.harness.measurement.layer_errors import rounded_layers
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.target import Target

LAYER_LIMIT = 1e-3  # relative error of a layer's output that a backend must keep, if it has none of its own
IMAGE_LIMIT_DB = 45.0  # PSNR of its images against the simulated ones
E4M3_IMAGE_LIMIT_DB = 35.0


@dataclass(frozen=True)
class LayerParity:
    """relative: ‖y − ŷ‖ / ‖ŷ‖; largest: max |y − ŷ| / max |ŷ|; ŷ simulated."""

    backend: str
    relative: float
    largest: float


def layer_limit(backend: str) -> float:
    """Of the backend of that name."""
    return getattr(known_backends().get(backend), "LAYER_LIMIT", LAYER_LIMIT)


@torch.no_grad()
def layer_parity(
    target: Target, recipe: ModelRecipe, model: nn.Module, call: Callable[[nn.Module], object]
) -> dict[str, LayerParity]:
    """The layers of the built `model` that a real kernel runs, on one call of it, in the range of steps its clock is in.

    call: calls the model on inputs that it takes, in that range. One simulated layer is held at a time.
    """
    clock = clock_of(model)
    recipe = recipe.of_range(clock.range)
    found: dict[str, LayerParity] = {}

    def compare(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].float()
            simulated = build_layer(
                target, recipe, name, clock=clock, dtype=output.dtype, device=x.device, backend="simulate"
            )
            expected, y = simulated.forward(x), layer.forward(x)
            found[name] = LayerParity(layer.backend, *differences(y, expected))  # type: ignore[arg-type]

        return hook

    real = {name: layer for name, layer in rounded_layers(model).items() if layer.kind == "measured"}
    handles = [layer.register_forward_hook(compare(name)) for name, layer in real.items()]
    try:
        call(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def differences(y: Tensor, expected: Tensor) -> tuple[float, float]:
    """(‖y − ŷ‖ / ‖ŷ‖, max |y − ŷ| / max |ŷ|), 0 where both are 0."""
    off, scale = in_float64(y - expected), in_float64(expected)
    if not bool(off.any()):
        return 0.0, 0.0
    return float(off.norm() / scale.norm()), float(off.abs().max() / scale.abs().max())
