"""Random weights that nobody has room for are refused while they are made, before their memory is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ditbench.harness.common.devices import CPU
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.memory import free_memory

MOST_TENSORS = 20_000  # a large transformer has two thousand


@contextmanager
def bounded(name: str) -> Iterator[None]:
    """Raise UserError, by the name of the setting, once the modules made within have more weights than memory is free, or
    more than MOST_TENSORS. Weights on `meta` take none.
    """
    free = free_memory(CPU)
    held = tensors = 0

    def count(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        nonlocal held, tensors
        if parameter is None:
            return
        tensors += 1
        held += 0 if parameter.is_meta else parameter.nbytes
        if tensors > MOST_TENSORS:
            raise UserError(f"{name}: more than {MOST_TENSORS:,} tensors of weights; make it smaller")
        if free is not None and held > free:
            raise UserError(
                f"{name}: more weights than memory, of which {free / 1e9:.1f} GB are free; make it smaller, or look with --plan"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
