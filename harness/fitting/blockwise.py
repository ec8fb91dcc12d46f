"""Weights rounded block by block with the Hessians of what each layer really reads (GPTQ and what builds on it)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.calibration.block_stream import MAX_BYTES, BlockStream, watched
from ditbench.harness.calibration.channel_statistics import run_calibration
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.quant.lowrank import residual
from ditbench.harness.quant.quantizers import QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe, LowRank, ModelRecipe, to_device
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform

Round = Callable[[str, Tensor, Tensor], QuantizedWeight]  # (layer, weight_OC, hessian_CC) → codes


def round_blockwise(
    target: Target,
    calibration: Calibration,
    round_weight: Round,
    transforms: dict[str, Transform] | None = None,
    folded: frozenset[str] = frozenset(),
    *,
    low_rank: dict[str, LowRank] | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, QuantizedWeight]:
    """{layer: codes} for every target layer, each fitted with the blocks before its own already rounded.

    round_weight gets the layer's effective weight (transforms and folds applied) and its Hessian: the mean of x xᵀ over its
    inputs (transformed), float32, of which layers that read the same tensor share one. Within a block all layers are
    observed in one pass with the block in float, as GPTQ's reference does. Layers outside the blocks are observed on the
    float model.
    low_rank: branches by layer name. They stay in place, and round_weight gets what they leave of the weight.
    """
    transforms, low_rank = transforms or {}, low_rank or {}
    layers = {
        name: LayerRecipe(transforms.get(name, Transform()), low_rank=low_rank.get(name))
        for name in dict.fromkeys([*target.layers, *transforms])
    }
    model = build(target, ModelRecipe(layers, folded), dtype=torch.float32, device=target.device)
    found: dict[str, QuantizedWeight] = {}
    all_layers = {name: layer for name, layer in quant_layers(model).items() if name in target.layers}
    for name, branch in low_rank.items():
        kernel: nn.Module = all_layers[name].kernel
        kernel.weight_OC = residual(kernel.weight_OC, branch).float()  # type: ignore[arg-type]
    outside = {n: q for n, q in all_layers.items() if not any(n.startswith(f"{b}.") for b in target.blocks)}
    if outside:
        hessians = _hessians(target, outside, transforms)
        with watched(_observers(outside, hessians)):
            run_calibration(model, calibration, lambda step: None, "Hessians")
        _round(outside, hessians, round_weight, found)

    stream = BlockStream(model, target, calibration, max_bytes=max_bytes)
    for block_name, block in stream:
        inside = {name: layer for name, layer in all_layers.items() if name.startswith(f"{block_name}.")}
        hessians = _hessians(target, inside, transforms)
        stream.watch(block, _observers(inside, hessians))
        _round(inside, hessians, round_weight, found)
    return {name: found[name] for name in target.layers}


class Hessian:
    """Of a layer's squared error with respect to a row of its weight, but for a factor of 2: the mean of x xᵀ over all rows
    of x seen, float32 (C, C), on the device of x.
    """

    def __init__(self) -> None:
        self.sum_CC: Tensor | None = None
        self.rows = 0

    def see(self, x: Tensor) -> None:
        """x: (…, C)."""
        x_TC = x.detach().float().flatten(0, -2)
        product = x_TC.T @ x_TC
        self.sum_CC = product if self.sum_CC is None else self.sum_CC.add_(product)
        self.rows += len(x_TC)

    def mean_CC(self, name: str) -> Tensor:
        if self.sum_CC is None:
            raise RuntimeError(f"{name} saw no calibration batch; is it skipped at every step you calibrate?")
        return self.sum_CC / self.rows


def weight_state(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A rounded weight as state tensors of its layer, on the CPU."""
    weight = to_device(weight, "cpu")
    state = {f"{name}/codes": weight.codes_OC, f"{name}/weight_scale": weight.scale_OG}
    if weight.zero_point_OG is not None:
        state[f"{name}/weight_zero_point"] = weight.zero_point_OG
    if weight.tensor_scale is not None:
        state[f"{name}/weight_tensor_scale"] = weight.tensor_scale
    return state


def weight_from_state(name: str, state: dict[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """The inverse of `weight_state`."""
    zero_point = state.get(f"{name}/weight_zero_point")
    tensor_scale = state.get(f"{name}/weight_tensor_scale")
    return QuantizedWeight(state[f"{name}/codes"], state[f"{name}/weight_scale"], zero_point, spec, tensor_scale)


def _hessians(target: Target, layers: Iterable[str], transforms: Mapping[str, Transform]) -> dict[str, Hessian]:
    """{layer: Hessian}, one for all layers that read one tensor through the same transform."""
    inputs: dict[tuple[tuple[str, ...], int], Hessian] = {}
    return {
        name: inputs.setdefault((target.site_of(name).group_of(name), id(transforms.get(name))), Hessian())
        for name in layers
    }


def _observers(layers: dict[str, QuantLinear], hessians: dict[str, Hessian]) -> dict[nn.Module, Callable]:
    """Each Hessian watches the input of one of its layers."""
    watched_layer = {hessian: layers[name] for name, hessian in hessians.items()}
    return {layer.kernel: hessian.see for hessian, layer in watched_layer.items()}


def _round(
    layers: dict[str, QuantLinear],
    hessians: dict[str, Hessian],
    round_weight: Round,
    found: dict[str, QuantizedWeight],
) -> None:
    """Round each layer and put the rounded values in its place, for the blocks behind it."""
    for name, layer in layers.items():
        kernel: nn.Module = layer.kernel
        rounded = round_weight(name, kernel.weight_OC, hessians[name].mean_CC(name))  # type: ignore[arg-type]
        kernel.weight_OC = rounded.dequantize()
        found[name] = to_device(rounded, "cpu")
