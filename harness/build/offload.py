"""Where the weights of a built transformer lie: on its device, or on the CPU, each block a guest on the device while it computes.

resident: all on the device. offload: blocks lie on the CPU; copies of one block's weights are on the device while it runs, and are dropped
behind it. auto: resident if the weights leave room enough in the memory that is free, offload otherwise. Outputs are the same.

diffusers' group offloading swaps `.data`, which devices that are registered from outside refuse, and accelerate's hooks leave other
tensors in their place; neither knows what a kernel keeps beside its buffers. Nothing here may learn: copies have no gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.backends.base import AUTO, Kernel, choose
from ditbench.harness.build.layer import QuantLinear, RangedLinear
from ditbench.harness.common.devices import CPU
from ditbench.harness.common.memory import free_memory
from ditbench.harness.common.placement import placed_on
from ditbench.harness.quant.effective import touched_layers
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.target import Target, weight_matrix

RESIDENT, OFFLOAD = "resident", "offload"
MEMORY = (AUTO, RESIDENT, OFFLOAD)
ROOM = 0.7  # of free memory that weights may take; the rest is for activations and the VAE


def chosen(
    asked: str, target: Target, recipe: ModelRecipe, dtype: torch.dtype, device: torch.device, backend: str
) -> dict[str, Any]:
    """For the record: {"memory": resident | offload, "asked", "weights_bytes": of the model to be built, "free_bytes"}."""
    free, needed = free_memory(device), weights_bytes(target, recipe, dtype, device, backend)
    fits = free is None or needed <= ROOM * free
    memory = (RESIDENT if fits else OFFLOAD) if asked == AUTO else asked
    if device.type == "cpu":  # there they are
        memory = RESIDENT
    return {"memory": memory, "asked": asked, "weights_bytes": needed, "free_bytes": free}


def offloaded(model: nn.Module) -> bool:
    placement: Any = getattr(model, "memory", None) or {}
    return placement.get("memory") == OFFLOAD


def weights_bytes(
    target: Target, recipe: ModelRecipe, dtype: torch.dtype, device: torch.device, backend: str = AUTO
) -> int:
    """About what the built model holds: codes of quantized weights, their float32 where they are simulated, the rest in dtype."""
    count = sum(t.numel() for t in (*target.transformer.parameters(), *target.transformer.buffers()))
    total = float(count * dtype.itemsize)
    for name in touched_layers(target, recipe):
        layer = recipe.layers.get(name)
        if layer is not None and layer.weight is not None:
            simulated = choose(layer, device, backend).KIND == "simulated"
            bytes_each = layer.weight.spec.bits / 8 + 4 * simulated - dtype.itemsize
            total += weight_matrix(target.module(name)).numel() * bytes_each
    return int(total)


def offload(model: nn.Module, blocks: Iterable[str], device: torch.device) -> None:
    """Of a model that lies on the CPU: let its blocks be on the device only while they run; everything else moves there."""
    names = tuple(blocks)
    inside = {id(module) for name in names for module in model.get_submodule(name).modules()}
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        if id(module) not in inside:
            _move(module, device, moved)
    guests = [model.get_submodule(name) for name in names]
    # Parts are called without their block too: layers whose error is measured, DiT's embedder that the last layer borrows.
    guests += [
        each
        for block in guests
        for each in block.modules()
        if each is not block and (_own(each) or isinstance(each, QuantLinear | RangedLinear))
    ]
    for module in guests:
        visit = _Visit(device)
        module.register_forward_pre_hook(visit.enter, prepend=True)
        module.register_forward_hook(visit.leave, always_call=True)


@contextmanager
def away(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model's weights are on the CPU and nothing of them on the device: room for another model. Then they are back."""
    if device.type == "cpu":
        yield
        return
    there = {id(module) for module in model.modules() if any(t.device == device for t in _own(module))}
    gone: dict[int, Tensor] = {}
    for module in model.modules():
        _move(module, CPU, gone)
    _forget(model)
    gone.clear()
    try:
        yield
    finally:
        back: dict[int, Tensor] = {}
        for module in model.modules():
            if id(module) in there:
                _move(module, device, back)


class _Visit:
    """The hooks of one module."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[Any] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        visit = None if _is_on(module, self.device) else placed_on(module, self.device)
        if visit is not None:
            visit.__enter__()
        self.open.append(visit)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        visit = self.open.pop() if self.open else None  # empty if there was no room to come in
        if visit is not None:
            visit.__exit__(None, None, None)
            _forget(module)


def _is_on(module: nn.Module, device: torch.device) -> bool:
    """It came with what it is part of."""
    return all(t.device == device for each in module.modules() for t in _own(each))


def _own(module: nn.Module) -> list[Tensor]:
    return [t for table in (module._parameters, module._buffers) for t in table.values() if t is not None]


def _move(module: nn.Module, device: torch.device, moved: dict[int, Tensor]) -> None:
    """Its own parameters and buffers; one that was moved under another name is taken from `moved`."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is None:
                continue
            if id(tensor) not in moved:
                there = tensor.detach().to(device)
                moved[id(tensor)] = (
                    nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
                )
                moved[-id(tensor)] = tensor  # held, so that no other gets its id
            table[name] = moved[id(tensor)]


def _forget(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, Kernel):
            each.forget()
