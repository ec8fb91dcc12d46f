"""What stands between two products, by the kernels of the device that a tensor lies on: norm and modulation, gate and residual, rotary
positions, activations. x86 CPUs have them in C++ (`vnni_kernels/`), CUDA devices in Triton (`triton_kernels/between.py`).

They are no part of a recipe, and the same whichever backend runs the layers: `simulate` on a device means that device's kernels here.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ditbench.harness.backends import vnni_extension
from ditbench.harness.backends.triton_kernels.limits import device_lacks


class Kernels(Protocol):
    """x, y: bfloat16, contiguous. factor, shift, gate: bfloat16 or float32 (B, C) or (1, C), channels side by side."""

    def normed(self, x: Tensor, factor: Tensor | None, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
        """norm(x) · factor + shift of x (B, T, C)."""

    def gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """x + gate · y of x and y (B, T, C)."""

    def rotary(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x (B, T, N, D) at its positions; cosine and sine (T, D)."""

    def activate(self, y: Tensor, activation: int) -> Tensor:
        """y float32; a number of `activations.NUMBERS`."""


class OnCpu:
    def normed(self, x: Tensor, factor: Tensor | None, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
        factor, shift = (None if row is None else row.float() for row in (factor, shift))
        return torch.ops.ditbench_vnni.normed(x, factor, shift, eps, centred)

    def gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return torch.ops.ditbench_vnni.gated(x, gate.float(), y)

    def rotary(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return torch.ops.ditbench_vnni.rotary(x, cosine.float().contiguous(), sine.float().contiguous())

    def activate(self, y: Tensor, activation: int) -> Tensor:
        return torch.ops.ditbench_vnni.activate(y, activation)


class InTriton:
    """Operators that importing `triton_kernels.between` has registered."""

    def __init__(self) -> None:
        from ditbench.harness.backends.triton_kernels import between as operators

        assert operators is not None

    def normed(self, x: Tensor, factor: Tensor | None, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
        return torch.ops.ditbench.normed(x, factor, shift, eps, centred)

    def gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return torch.ops.ditbench.gated(x, gate, y)

    def rotary(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return torch.ops.ditbench.rotary(x, cosine.float().contiguous(), sine.float().contiguous())

    def activate(self, y: Tensor, activation: int) -> Tensor:
        return torch.ops.ditbench.activate(y, activation, torch.float32)


found: dict[str, Kernels | None] = {}  # of the types of device that were asked for


def kernels_of(device: torch.device) -> Kernels | None:
    """None: it has none, or the model was moved there and is compiled before anybody asked."""
    if device.type not in found and not torch.compiler.is_compiling():
        found[device.type] = None if lacks(device) else OnCpu() if device.type == "cpu" else InTriton()
    return found.get(device.type)


def lacks(device: torch.device) -> Any:
    """Why this device has no such kernels."""
    return vnni_extension.cpu_lacks() if device.type == "cpu" else device_lacks("what stands between products", device)
