"""A model that nobody has room for is refused while it is put together on `meta`, before any memory is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ditbench.harness.common.devices import CPU
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.memory import free_memory

MOST_TENSORS = 20_000  # a large transformer has two thousand


@contextmanager
def bounded(name: str, *, weights: bool) -> Iterator[None]:
    """Raise UserError, by the name of the setting, once the modules made within would take more memory than is free, or have
    more than MOST_TENSORS tensors.

    weights: whether these take memory; the tables that a model computes do.
    """
    free = free_memory(CPU)
    held = tensors = 0

    def count(module: nn.Module, key: str, tensor: Tensor | None) -> None:
        nonlocal held, tensors
        if tensor is None:
            return
        tensors += 1
        held += tensor.nbytes if weights or not isinstance(tensor, nn.Parameter) else 0
        if tensors > MOST_TENSORS:
            raise UserError(f"{name}: more than {MOST_TENSORS:,} tensors of weights; make it smaller")
        if free is not None and held > free:
            raise UserError(
                f"{name}: it would take more than the {free / 1e9:.1f} GB of memory that are free; make it smaller, or plan it "
                "with --plan"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
