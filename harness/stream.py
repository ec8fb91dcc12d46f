"""Block by block: the hidden states at the entrance of one transformer block at a time, within a byte budget.

Methods that calibrate a block on what the blocks before it really produce (GPTQ, CLQ, AdaRound) walk through a model with
a `BlockStream`. Only one block's inputs are held; how many rows of the calibration are used follows from `max_bytes`,
not from the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibrate import Calibration
from harness.progress import progress

MAX_BYTES = 2**30


@dataclass
class BlockInput:
    """One call of a block: hidden_BTC, and the other arguments that all blocks share."""

    step: int
    hidden_BTC: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Entered(Exception):
    """Raised at the entrance of the first block: the rest of the model need not run."""


class BlockStream:
    """Walks through the blocks of a built model (`build`, with its clock).

    for name, block in stream:      # in the order of execution
        for call in stream.calls(): … block inputs …
        # when the loop goes on, the block's outputs (with whatever was changed in it) become the next block's inputs
    """

    def __init__(
        self, model: nn.Module, blocks: tuple[str, ...], calibration: Calibration, *, max_bytes: int = MAX_BYTES
    ) -> None:
        self.model, self.blocks, self.calibration = model, blocks, calibration
        self.inputs = self._entrance(max_bytes)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        for name in progress(self.blocks, desc="blocks"):
            block = self.model.get_submodule(name)
            yield name, block
            for call, output in zip(self.inputs, self.outputs(block), strict=True):
                call.hidden_BTC = output

    def calls(self) -> Iterator[BlockInput]:
        """The current block's inputs, with the clock on the step of each."""
        for call in self.inputs:
            self.model.clock.set(call.step, self.calibration.num_steps)
            yield call

    @torch.no_grad()
    def outputs(self, block: nn.Module) -> Iterator[Tensor]:
        """The block on each of its inputs."""
        for call in self.calls():
            yield block(call.hidden_BTC, *call.args, **call.kwargs)

    def watch(self, block: nn.Module, hooks: dict[nn.Module, Callable[[Tensor], None]]) -> None:
        """Run the block once on all inputs; each hook sees every input of its module."""
        with watched(hooks):
            for _ in self.outputs(block):
                pass

    def _entrance(self, max_bytes: int) -> list[BlockInput]:
        """The first block's inputs, on as many rows of each recorded call as fit the budget."""
        batches = list(self.calibration.batches())
        first_step, first = batches[0]
        one_row = self._enter(first_step, {name: tensor[:1] for name, tensor in first.items()})
        rows = max(1, max_bytes // (one_row.hidden_BTC.nbytes * len(batches)))
        found = []
        for step, inputs in batches:
            kept = _spread(len(next(iter(inputs.values()))), rows)
            found.append(self._enter(step, {name: tensor[kept] for name, tensor in inputs.items()}))
        return found

    @torch.no_grad()
    def _enter(self, step: int, inputs: dict[str, Tensor]) -> BlockInput:
        """Run the model up to its first block."""
        found: list[BlockInput] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(BlockInput(step, args[0].detach(), args[1:], kwargs))
            raise _Entered

        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        handle = self.model.get_submodule(self.blocks[0]).register_forward_pre_hook(enter, with_kwargs=True)
        try:
            self.model.clock.set(step, self.calibration.num_steps)
            self.model(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()})
        except _Entered:
            pass
        finally:
            handle.remove()
        return found[0]


@contextmanager
def watched(hooks: dict[nn.Module, Callable[[Tensor], None]]):
    """Each function sees every input of its module while the block runs."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, see=see: see(inputs[0])) for module, see in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spread(length: int, rows: int) -> Tensor:
    """At most `rows` indices, evenly spread, so that conditional and null rows both remain."""
    return torch.linspace(0, length - 1, min(rows, length)).round().long().unique()
