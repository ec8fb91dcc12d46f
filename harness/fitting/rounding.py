"""Round-to-nearest recipes from transforms: the last step that most methods share.

`static_ranges` looks (in `fit`), `nearest` builds (in `apply`). With dynamic activations there is nothing to look at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditbench.harness.build.attention import OPERANDS, QuantAttention, set_attention
from ditbench.harness.build.build import build, clock_of, quant_layers
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.memory import trim
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import (
    ActQuant,
    LookupWeight,
    QuantizedWeight,
    quantize_weight,
    searched_range,
    static_quant,
)
from ditbench.harness.quant.recipe import AttentionRecipe, LayerRecipe, ModelRecipe, to_device
from ditbench.harness.quant.spec import E4M3, Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Target, weight_matrix
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.quant.uneven import LogSqrt2Quant, log_sqrt2_delta

if TYPE_CHECKING:
    from ditbench.harness.calibration.recording import Calibration

SOFTMAX_BITS = 8
SAMPLES_PER_CALL = 2048  # values kept per layer and model call when ranges are searched


def nearest(
    target: Target,
    bits: Bits,
    state: dict[str, Tensor],
    transforms: dict[str, Transform] | None = None,
    folded: frozenset[str] = frozenset(),
    *,
    weights: Mapping[str, QuantizedWeight | LookupWeight] | None = None,
    weight_ranges: str = "minmax",
    bits_of_layer: dict[str, Bits] | None = None,
    num_steps: int | None = None,
) -> ModelRecipe:
    """Every target layer with its transform, its weight rounded to nearest and its activation quantizer; on the CPU.

    transforms: by layer name (consumers of a folded site that stay in float need theirs as well).
    state: what `static_ranges` returned, among other things; only read when activations are static.
    weights: layers whose weights were rounded elsewhere (GPTQ, AdaRound, a log grid); the others are rounded to nearest.
    bits_of_layer: layers whose format is another than `bits` (mixed precision, group sizes by layer).

    Raises:
        UserError: a group size that does not divide a layer's width.
    """
    transforms = transforms or {}
    layers = {name: LayerRecipe(transform=transform) for name, transform in transforms.items()}
    for name in target.layers:
        own = (bits_of_layer or {}).get(name, bits)
        for spec in (own.weight, own.act):
            if spec is not None:
                spec.check_width(name, weight_matrix(target.module(name)).shape[1])
        rounded = (weights or {}).get(name)
        if rounded is None and own.weight is not None:
            weight_OC = effective_linear(target, name, transforms, folded).weight_OC
            rounded = quantize_weight(weight_OC, own.weight, ranges=weight_ranges)
        layers[name] = LayerRecipe(
            transform=transforms.get(name, Transform()),
            weight=to_device(rounded, "cpu"),
            act=None if own.act is None else act_quant(own.act, state, name),
        )
        trim()
    attention = {name: _attention_recipe(bits.act, state, name) for name in target.attention} if bits.act else {}
    return ModelRecipe(layers, folded, attention, num_steps)


def act_quant(spec: QuantSpec, state: dict[str, Tensor], name: str) -> ActQuant:
    """The activation quantizer of one layer (or attention operand): dynamic, or static from the state."""
    if spec.dynamic:
        return ActQuant(spec)
    groups = state.get(f"{name}/act_group_of_step")
    return static_quant(StepTable(state[f"{name}/act_low"], groups), StepTable(state[f"{name}/act_high"], groups), spec)


def static_ranges(
    target: Target,
    bits: Bits,
    calibration: Calibration,
    transforms: dict[str, Transform] | None = None,
    folded: frozenset[str] = frozenset(),
    *,
    ranges: str = "minmax",
    group_of_layer: dict[str, Tensor] | None = None,
    softmax: str = "uniform",
) -> dict[str, Tensor]:
    """Range ends of every transformed layer input (and attention operand), over all steps or per group of steps.

    Returns {layer/act_low, layer/act_high: (G,)} and, where there are groups, {layer/act_group_of_step: (S,)}; empty when
    activations are dynamic or float. softmax: "uniform", or "log_sqrt2": then {attention.probabilities/act_delta: (1,)}.
    ranges: "minmax"; or "mse", "shrink": searched on a sample of the values, as in `quantize_weight`.
    group_of_layer: group_of_step by layer name; layers and operands without one have a single range.
    """
    if bits.act is None or bits.act.dynamic:
        return {}
    if bits.act.granularity != "per_tensor" and not bits.act.in_blocks:  # whose second scale is of the tensor
        raise UserError(
            f"bits.act: static activations are per_tensor here, got {bits.act.granularity}; set "
            "bits.act.granularity=per_tensor, or bits.act.dynamic=true"
        )
    layers = {name: LayerRecipe(transform=t) for name, t in (transforms or {}).items()}
    layers = {name: LayerRecipe() for name in target.layers} | layers
    model = build(
        target,
        ModelRecipe(layers, folded, num_steps=calibration.num_steps),
        dtype=torch.float32,
        device=calibration.device,
    )
    watch = _RangeWatch(group_of_layer or {}, target.device)
    for name, layer in quant_layers(model).items():
        if name in target.layers:
            layer.kernel.register_forward_pre_hook(lambda _, inputs, name=name: watch.see(name, inputs[0]))
    for name in target.attention:
        observe = lambda operand, x, name=name: watch.see(f"{name}.{operand}", x)  # noqa: E731
        set_attention(model, name, QuantAttention(AttentionRecipe(), clock_of(model), observe))

    from ditbench.harness.calibration.channel_statistics import run_calibration

    run_calibration(model, calibration, watch.set_step, "ranges")
    state = watch.state(bits.act, ranges)
    if softmax == "log_sqrt2":
        for name in target.attention:
            state[f"{name}.probabilities/act_delta"] = watch.delta(f"{name}.probabilities", SOFTMAX_BITS)[None].cpu()
    return state


def _attention_recipe(spec: QuantSpec, state: dict[str, Tensor], name: str) -> AttentionRecipe:
    """q, k, v at the activation width, the softmax map at 8 bits (PTQ4DiT's `sm_abit`), all per tensor and asymmetric.

    With e4m3 activations all four are e4m3, and so symmetric.
    Where the state has a δ for the map, its codes are log√2.
    """
    quantizers = {}
    for operand in OPERANDS:
        bits = SOFTMAX_BITS if operand == "probabilities" else spec.bits
        operand_spec = QuantSpec(
            bits, "per_tensor", symmetric=spec.number == E4M3, dynamic=spec.dynamic, number=spec.number
        )
        delta = state.get(f"{name}.{operand}/act_delta")
        quantizers[operand] = (
            act_quant(operand_spec, state, f"{name}.{operand}")
            if delta is None
            else LogSqrt2Quant(operand_spec, StepTable(delta))
        )
    return AttentionRecipe(**quantizers)


class _RangeWatch:
    """Running extremes and a small strided sample of the values of each watched tensor, per group of steps.

    They stay where the tensors are until the end; ranges are searched on `device`, and the state lies on the CPU.
    """

    def __init__(self, group_of_layer: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        self.group_of_layer, self.device, self.step = group_of_layer, device, 0
        self.low: dict[tuple[str, int], Tensor] = {}
        self.high: dict[tuple[str, int], Tensor] = {}
        self.values: dict[tuple[str, int], list[Tensor]] = {}

    def set_step(self, step: int) -> None:
        self.step = step

    def see(self, name: str, x: Tensor) -> None:
        x = x.detach().float()
        groups = self.group_of_layer.get(name)
        key = name, 0 if groups is None else int(groups[self.step])
        low, high = x.amin(), x.amax()
        self.low[key] = torch.minimum(self.low.get(key, low), low)
        self.high[key] = torch.maximum(self.high.get(key, high), high)
        flat = x.flatten()
        stride = max(1, len(flat) // SAMPLES_PER_CALL)
        while math.gcd(stride, len(flat)) > 1:  # a stride that shares a factor with C sees some channels only
            stride += 1
        self.values.setdefault(key, []).append(flat[::stride].clone())

    def state(self, spec: QuantSpec, ranges: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for name, _ in self.low):
            keys = sorted(key for key in self.low if key[0] == name)
            ends = [self._range(key, spec, ranges) for key in keys]
            found[f"{name}/act_low"] = torch.stack([low for low, _ in ends]).cpu()
            found[f"{name}/act_high"] = torch.stack([high for _, high in ends]).cpu()
            if name in self.group_of_layer:
                found[f"{name}/act_group_of_step"] = self.group_of_layer[name]
        return found

    def delta(self, name: str, bits: int) -> Tensor:
        """δ of a map's log√2 codes, over all steps."""
        values_N = torch.cat([*self.values[name, 0], self.high[name, 0][None]])
        return log_sqrt2_delta(values_N.to(self.device), bits)

    def _range(self, key: tuple[str, int], spec: QuantSpec, ranges: str) -> tuple[Tensor, Tensor]:
        low, high = self.low[key], self.high[key]
        if ranges == "minmax" or spec.in_blocks:
            return low, high
        values_N = torch.cat([*self.values[key], low[None], high[None]])
        return searched_range(values_N.to(self.device), spec, ranges)
