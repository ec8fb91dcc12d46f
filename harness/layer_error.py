"""How far each quantized layer is from its float original, on the float model's own inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.calibrate import Calibration
from harness.quant.build import float_copy, quant_layers
from harness.quant.target import Target

CALLS = 4  # denoising steps looked at, spread over the trajectory
ROWS = 16


@torch.no_grad()
def layer_errors(target: Target, model: nn.Module, calibration: Calibration) -> dict[str, dict[str, Any]]:
    """{layer: {sqnr_db, backend, weight_bits, act_bits}} for every quantized layer.

    SQNR = 10 log10(Σ y² / Σ (y − ŷ)²) of the layer's output, y and ŷ from the same float input; CALLS steps, ROWS rows.
    """
    layers = {n: q for n, q in quant_layers(model).items() if q.weight_spec is not None or q.act_spec is not None}
    if not layers:
        return {}
    original = float_copy(target, dtype=torch.float32)
    signal, noise = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def compare(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            estimate = _local_output(model, name, inputs[0])
            signal[name] += output.double().square().sum().item()
            noise[name] += (estimate.double() - output.double()).square().sum().item()

        return hook

    for name in layers:
        original.get_submodule(name).register_forward_hook(compare(name))
    steps = torch.linspace(0, calibration.num_steps - 1, min(CALLS, calibration.num_steps)).round().long().unique()
    for step in steps.tolist():
        original.clock.set(step, calibration.num_steps)
        model.clock.set(step, calibration.num_steps)
        rows = {n: t[:ROWS].float() if t.is_floating_point() else t[:ROWS] for n, t in calibration.per_step[step].items()}
        original(**rows)
    return {
        name: {
            "sqnr_db": _decibels(signal[name], noise[name]),
            "backend": layer.backend,
            "weight_bits": layer.weight_spec.bits if layer.weight_spec else 16,
            "act_bits": layer.act_spec.bits if layer.act_spec else 16,
        }
        for name, layer in layers.items()
    }


def _local_output(model: nn.Module, name: str, float_input: Tensor) -> Tensor:
    module = model.get_submodule(name)
    device = model.clock.step.device
    return module.local(float_input.to(device)).float().cpu()


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0.0 or signal == 0.0:
        return None
    return 10.0 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))
