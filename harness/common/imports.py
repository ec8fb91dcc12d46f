"""Imports of much at once: torch, diffusers and transformers are five thousand modules."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

OF_OTHERS = {  # logger: what it warns of whenever diffusers is imported beside torchao and bitsandbytes, which it imports whether or not a run uses them
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torchao": "Failed to load ",
    "torch.utils._pytree": " is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


@contextmanager
def importing() -> Iterator[None]:
    """Python's collector waits in this block: what imports make stays, and it would go through all of that time and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Without(logging.Filter):
    """Everything but messages with these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


def leave_out_warnings_of_others() -> None:
    """Once: warnings of kernels that no run of ours takes are not said; all others of these packages are."""
    for name, words in OF_OTHERS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, Without) for each in logger.filters):
            logger.addFilter(Without(words))
