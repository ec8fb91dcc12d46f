"""Round-to-nearest recipes from transforms: the last step that most methods share.

`static_ranges` looks (in `fit`), `nearest` builds (in `apply`). With dynamic activations there is nothing to look at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.quant.attention import OPERANDS, QuantAttnProcessor
from harness.quant.build import build, quant_layers
from harness.quant.effective import effective_linear
from harness.quant.quantizers import ActQuant, mse_percentile_range, quantize_weight, static_quant
from harness.quant.recipe import AttentionRecipe, LayerRecipe, ModelRecipe
from harness.quant.spec import Bits, QuantSpec
from harness.quant.steps import StepTable
from harness.quant.target import Target, weight_matrix
from harness.quant.transforms import Transform

if TYPE_CHECKING:
    from harness.calibrate import Calibration

SOFTMAX_BITS = 8
SAMPLES_PER_CALL = 2048  # values kept per layer and model call when ranges are searched


def nearest(
    target: Target,
    bits: Bits,
    state: dict[str, Tensor],
    transforms: dict[str, Transform] | None = None,
    folded: frozenset[str] = frozenset(),
    *,
    weight_ranges: str = "minmax",
    num_steps: int | None = None,
) -> ModelRecipe:
    """Every target layer with its transform, its weight rounded to nearest and its activation quantizer.

    transforms: by layer name (consumers of a folded site that stay in float need theirs as well).
    state: what `static_ranges` returned, among other things; only read when activations are static.

    Raises:
        UserError: a group size that does not divide a layer's width.
    """
    transforms = transforms or {}
    layers = {name: LayerRecipe(transform=transform) for name, transform in transforms.items()}
    for name in target.layers:
        effective = effective_linear(target, name, transforms, folded)
        for spec in (bits.weight, bits.act):
            if spec is not None:
                spec.check_width(name, effective.weight_OC.shape[1])
        layers[name] = LayerRecipe(
            transform=transforms.get(name, Transform()),
            weight=None if bits.weight is None else quantize_weight(effective.weight_OC, bits.weight, ranges=weight_ranges),
            act=None if bits.act is None else act_quant(bits.act, state, name),
        )
    attention = {name: _attention_recipe(bits.act, state, name) for name in target.attention} if bits.act else {}
    return ModelRecipe(layers, folded, attention, num_steps)


def act_quant(spec: QuantSpec, state: dict[str, Tensor], name: str) -> ActQuant:
    """The activation quantizer of one layer (or attention operand): dynamic, or static from the state."""
    if spec.dynamic:
        return ActQuant(spec)
    return static_quant(StepTable(state[f"{name}/act_low"]), StepTable(state[f"{name}/act_high"]), spec)


def static_ranges(
    target: Target,
    bits: Bits,
    calibration: Calibration,
    transforms: dict[str, Transform] | None = None,
    folded: frozenset[str] = frozenset(),
    *,
    ranges: str = "minmax",
) -> dict[str, Tensor]:
    """Range ends of every transformed layer input (and attention operand) over all steps.

    Returns {layer/act_low, layer/act_high: (1,)}; empty when activations are dynamic or float.
    ranges: "minmax", or "mse" (percentile range with the least squared error on a sample of the values).
    """
    if bits.act is None or bits.act.dynamic:
        return {}
    if bits.act.granularity != "per_tensor":
        raise UserError(f"bits.act: static activations are per_tensor here, got {bits.act.granularity}")
    layers = {name: LayerRecipe(transform=t) for name, t in (transforms or {}).items()}
    layers = {name: LayerRecipe() for name in target.layers} | layers
    model = build(target, ModelRecipe(layers, folded), dtype=torch.float32)
    watch = _RangeWatch()
    for name, layer in quant_layers(model).items():
        if name in target.layers:
            layer.kernel.register_forward_pre_hook(lambda _, inputs, name=name: watch.see(name, inputs[0]))
    for name in target.attention:
        observe = lambda operand, x, name=name: watch.see(f"{name}.{operand}", x)  # noqa: E731
        model.get_submodule(name).set_processor(QuantAttnProcessor(AttentionRecipe(), model.clock, observe))

    from harness.observe import run_calibration

    run_calibration(model, calibration, lambda step: None, "ranges")
    return watch.state(bits.act, ranges)


def weights_of(target: Target) -> dict[str, Tensor]:
    """{layer: weight (O, C)} of the float target layers that are linear."""
    return {n: weight_matrix(target.module(n)) for n in target.layers if isinstance(target.module(n), nn.Linear)}


def _attention_recipe(spec: QuantSpec, state: dict[str, Tensor], name: str) -> AttentionRecipe:
    """q, k, v at the activation width, the softmax map at 8 bits (PTQ4DiT's `sm_abit`), all per tensor and asymmetric."""
    quantizers = {}
    for operand in OPERANDS:
        bits = SOFTMAX_BITS if operand == "probabilities" else spec.bits
        operand_spec = QuantSpec(bits, "per_tensor", symmetric=False, dynamic=spec.dynamic)
        quantizers[operand] = act_quant(operand_spec, state, f"{name}.{operand}")
    return AttentionRecipe(**quantizers)


class _RangeWatch:
    """Running extremes and a small strided sample of the values of each watched tensor."""

    def __init__(self) -> None:
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        self.values: dict[str, list[Tensor]] = {}

    def see(self, name: str, x: Tensor) -> None:
        x = x.detach().float()
        self.low[name] = torch.minimum(self.low.get(name, x.amin()), x.amin())
        self.high[name] = torch.maximum(self.high.get(name, x.amax()), x.amax())
        flat = x.flatten()
        self.values.setdefault(name, []).append(flat[:: max(1, len(flat) // SAMPLES_PER_CALL)].clone())

    def state(self, spec: QuantSpec, ranges: str) -> dict[str, Tensor]:
        found = {}
        for name in self.low:
            low, high = self.low[name], self.high[name]
            if ranges == "mse":
                sample = torch.cat([*self.values[name], low[None], high[None]])
                low, high = mse_percentile_range(sample, spec)
            found[f"{name}/act_low"], found[f"{name}/act_high"] = low.reshape(1), high.reshape(1)
        return found
