"""How many samples to compute with at once: from the tokens that a sample has, and from a probe of the memory that one takes."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import clock_of
from ditbench.harness.common.batches import Batch, give_back, out_of_memory, release
from ditbench.harness.common.memory import free_memory, peak_memory
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import float_dtype, placed

AUTO = "auto"
MOST = 64  # samples, however small
TOKENS = 2**15  # of all rows of a batch: more would not keep a device busier
SMALL_BYTES = 2**28  # of weights: models of earlier runs that nothing holds any more may wait for Python to find them
ROOM = 0.8  # of free memory that a batch may take


def by_tokens(tokens: int, most: int = MOST) -> int:
    """A power of two of samples, at most `most`, whose rows (two a sample) have at most TOKENS tokens; one at least."""
    return rows_by_tokens(2 * tokens, most)


def rows_by_tokens(tokens: int, most: int = 2 * MOST) -> int:
    """A power of two of rows, at most `most`, that have at most TOKENS tokens; one at least."""
    return 2 ** (max(1, min(most, TOKENS // tokens)).bit_length() - 1)


def tokens_of_row(model: LoadedModel, transformer: nn.Module) -> int:
    """What a block of this transformer sees of one row, all its streams counted."""
    return _probe(model, transformer, 1, clock_of(transformer).step.device)[1]


def batch_of(asked: int | str, model: LoadedModel, transformer: nn.Module, *, most: int = MOST) -> Batch:
    """asked: a number of samples, or "auto": a power of two, at most `most`, so that its rows (two a sample, as with guidance) have at
    most TOKENS tokens, and that what one more sample took in a call of this transformer, on its device, fits into the memory that is free.

    Where a device does not tell its memory, tokens decide alone. What does not fit after all is halved by `in_batches`.
    """
    if asked != AUTO:
        return Batch(int(asked))
    device = clock_of(transformer).step.device
    free, ran_out = free_memory(device), False
    try:
        first, tokens = _probe(model, transformer, 1, device)
        size = by_tokens(tokens, most)
        second = first if size == 1 else _probe(model, transformer, 2, device)[0]
    except Exception as error:
        if not out_of_memory(error):
            raise
        size, ran_out = 1, True
    else:
        if free is not None and first is not None and second is not None and second > first:
            each = second - first
            size = max(1, min(size, int(ROOM * free - first) // each + 1))
    weights = chain(transformer.parameters(), transformer.buffers())
    large = sum(each.numel() * each.element_size() for each in weights) > SMALL_BYTES
    (release if ran_out or large else give_back)(device)
    return Batch(2 ** (size.bit_length() - 1), asked=AUTO)


@torch.no_grad()
def _probe(model: LoadedModel, transformer: nn.Module, samples: int, device: torch.device) -> tuple[int | None, int]:
    """(bytes that a call on these samples held at most, tokens of a row); None where the device does not tell."""
    inputs = placed(model.step_inputs(2 * samples, device), float_dtype(transformer), device)
    clock = clock_of(transformer)
    clock.set(0, clock.num_steps or 1)
    tokens: list[int] = []
    block = transformer.get_submodule(model.adapter.blocks(transformer)[0])
    handle = block.register_forward_hook(lambda _, args, output: tokens.append(tokens_in(output, 2 * samples)))
    try:
        with peak_memory(device) as memory:
            transformer(**inputs)
    finally:
        handle.remove()
    if memory.peak_bytes is None or memory.before_bytes is None:
        return None, tokens[0]
    return memory.peak_bytes - memory.before_bytes, tokens[0]


def tokens_in(output: Any, rows: int) -> int:
    """Of one row of what a block gave, all its streams counted: (…, C), or maps (B, C, h, w)."""
    parts = [each for each in (output if isinstance(output, list | tuple) else [output]) if isinstance(each, Tensor)]
    numbers = sum(part.numel() // part.shape[1 if part.ndim == 4 else -1] for part in parts)
    return max(1, numbers // rows)
