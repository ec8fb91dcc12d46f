"""Block by block: the hidden states at the entrance of one transformer block at a time, within a byte budget.

Methods that calibrate a block on what the blocks before it really produce (GPTQ, CLQ, AdaRound) walk through a model with
a `BlockStream`. Only one block's inputs are kept; how many rows of the calibration are used follows from `max_bytes`,
not from the number of blocks. Where these inputs take more than `HELD_BYTES` they lie on disk, and one call at a time is read:
with a larger `max_bytes` more rows are used, not more memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.calibration.on_disk import Spool, StoredList, StoredTensor, content_sha256
from ditbench.harness.calibration.recording import Calibration, spread
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.progress import progress
from ditbench.harness.models.calls import (
    FEW,
    MORE,
    Call,
    Rows,
    StoredRows,
    picked_rows,
    row_dims,
    side_by_side,
    take_apart,
)
from ditbench.harness.quant.blocks import by_name
from ditbench.harness.quant.target import Target

ROWS = 64  # of a step that lie side by side; how many of them are used, `max_bytes` decides
MAX_BYTES = 2**30  # of the states of one block's inputs: so many rows are used
HELD_BYTES = 2**30  # of one block's inputs in memory


@dataclass
class BlockInput:
    """One call of a block: the state that goes from block to block (B, T, C), in memory or on disk, and the arguments that all
    blocks share.
    """

    step: int
    state: Tensor | StoredTensor
    others: Call

    @property
    def hidden_BTC(self) -> Tensor:
        """The state; read, if it lies on disk."""
        return self.state if isinstance(self.state, Tensor) else self.state[:]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.others.arguments()

    @property
    def num_rows(self) -> int:
        return len(self.state)

    @property
    def tokens(self) -> int:
        """Of one row."""
        return math.prod(self.state.shape[1:-1])

    def rows(self, kept: Tensor) -> BlockInput:
        """Some rows of the batch, in memory."""
        state = picked_rows(self.state, kept)
        assert isinstance(state, Tensor)
        return BlockInput(self.step, state, self.others.pick(kept))

    def is_like(self, other: BlockInput) -> bool:
        """Whether the two can be one call on the rows of both."""
        return self.state.shape[1:] == other.state.shape[1:] and self.others.is_like(other.others)

    @staticmethod
    def side_by_side(calls: list[BlockInput]) -> list[BlockInput]:
        """All calls as one batch, at the step of the first: for models without step tables. As they were, if they are not alike."""
        if not all(calls[0].is_like(call) for call in calls):
            return calls
        hidden_BTC = torch.cat([call.hidden_BTC for call in calls])
        return [BlockInput(calls[0].step, hidden_BTC, side_by_side([call.others for call in calls]))]


class _Seen(Exception):
    """Raised when the last of the wanted layers has answered: the rest of the blocks need not run."""


class _Entered(Exception):
    """Raised at the entrance of the first block: the rest of the model need not run."""


class BlockStream:
    """Walks through the blocks of a built model (`build`, with its clock).

    for name, block in stream:      # in the order of execution
        for call in stream.calls(): … block inputs …
        # when the loop goes on, the block's outputs (with whatever was changed in it) become the next block's inputs

    max_bytes: of the states, decides how many rows of each recorded call are used (at least one).
    """

    def __init__(
        self, model: nn.Module, target: Target, calibration: Calibration, *, max_bytes: int = MAX_BYTES
    ) -> None:
        self.model, self.blocks, self.calibration = model, target.blocks, calibration
        self.block_call = target.block_call
        self.spool: Spool | None = None  # if they lie on disk
        self.inputs = self._entrance(max_bytes)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        for name in progress(self.blocks, desc="blocks"):
            block = self.model.get_submodule(name)
            yield name, block
            self.advance(block)

    def advance(self, block: nn.Module) -> None:
        """The block's outputs become the inputs."""
        for call, output in zip(self.inputs, self.outputs(block), strict=True):
            call.state = self._kept(output)

    def calls(self) -> Iterator[BlockInput]:
        """The current block's inputs, with the clock on the step of each."""
        for call in self.inputs:
            self.model.clock.set(call.step, self.calibration.num_steps)
            yield call

    @torch.no_grad()
    def outputs(self, block: nn.Module) -> Iterator[Tensor]:
        """The block on each of its inputs."""
        for call in self.calls():
            yield self.run(block, call.hidden_BTC, call.kwargs)

    def run(self, block: nn.Module, hidden_BTC: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """One call of the block: the state before → the state behind."""
        return self.block_call.run(block, hidden_BTC, kwargs)

    def watch(self, block: nn.Module, hooks: dict[nn.Module, Callable[[Tensor], None]]) -> None:
        """Run the block once on all inputs; each hook sees every input of its module."""
        with watched(hooks):
            for _ in self.outputs(block):
                pass

    def sample(self, steps: int, rows: int, tokens: int) -> list[BlockInput]:
        """At most `steps` of the current block's inputs, spread over the trajectory, with at most `rows` rows of each,
        and at most `tokens` tokens in all (but one row of each).

        Side by side in one batch, which is faster.
        """
        calls = [self.inputs[index] for index in spread(len(self.inputs), steps).tolist()]
        rows = min(rows, max(1, tokens // (len(calls) * calls[0].tokens)))
        return BlockInput.side_by_side([call.rows(spread(call.num_rows, rows)) for call in calls])

    def restart_at(self, other: BlockStream) -> None:
        """Take over the inputs that another stream holds for the same block."""
        self.inputs = [replace(call) for call in other.inputs]

    @torch.no_grad()
    def layer_outputs(self, block: str, reach: int, calls: list[BlockInput], layers: list[str]) -> dict[str, Tensor]:
        """Inputs of `block` go through it and up to `reach` blocks behind it → {layer: its outputs, calls side by side}."""
        start = self.blocks.index(block)
        blocks = [self.model.get_submodule(name) for name in self.blocks[start : start + reach + 1]]
        found: dict[str, list[Tensor]] = {layer: [] for layer in layers}

        def catch(layer: str, output: Tensor) -> None:
            found[layer].append(output)
            if all(len(outputs) == len(found[layer]) for outputs in found.values()):
                raise _Seen

        handles = [
            self.model.get_submodule(layer).register_forward_hook(
                lambda _, i, output, layer=layer: catch(layer, output)
            )
            for layer in layers
        ]
        try:
            for call in calls:
                self.model.clock.set(call.step, self.calibration.num_steps)
                hidden_BTC = call.hidden_BTC
                try:
                    for module in blocks:
                        hidden_BTC = self.run(module, hidden_BTC, call.kwargs)
                except _Seen:
                    pass
        finally:
            for handle in handles:
                handle.remove()
        unseen = [layer for layer, outputs in found.items() if len(outputs) != len(calls)]
        if unseen:
            raise RuntimeError(f"{unseen[0]} did not run once in block {block} and the {reach} behind it")
        return {layer: torch.cat([output.flatten(0, -2) for output in outputs]) for layer, outputs in found.items()}

    def _entrance(self, max_bytes: int) -> list[BlockInput]:
        """The first block's inputs, on as many rows of each recorded call as fit the budget."""
        batches = self.calibration.num_batches(ROWS)
        first_step, first = next(self.calibration.batches(ROWS))
        (_, few), (state_BTC, more) = (
            self._enter(first_step, first.pick(torch.zeros(rows, dtype=torch.int64))) for rows in (FEW, MORE)
        )
        dims = row_dims(few, more, {})
        rows = max(1, max_bytes // (state_BTC[:1].nbytes * batches))
        used = sum(min(rows, inputs.num_rows) for _, inputs in self.calibration.batches(ROWS))
        if used * (state_BTC.nbytes + _nbytes(take_apart(more, MORE, dims)[0])) / MORE > HELD_BYTES:
            self.spool = Spool(self.calibration.cache)
        tables: dict[str, Tensor] = {}
        found = []
        for step, inputs in self.calibration.batches(ROWS):
            hidden_BTC, rest = self._enter(step, inputs.pick(spread(inputs.num_rows, rows)))
            of_rows, shape = take_apart(rest, len(hidden_BTC), dims)
            if any(len(values) != len(hidden_BTC) for values in of_rows.values()):
                raise UserError(
                    f"{self.blocks[0]} has several rows per sample in one of its arguments; a method that works block by "
                    "block cannot be used with this model"
                )
            for path, table in shape.shared.items():  # mostly the same at every step: one is enough
                name = content_sha256(table.cpu().contiguous())
                shape.shared[path] = tables.setdefault(name, table)
            others: dict[str, Rows | StoredRows] = {path: self._kept_rows(values) for path, values in of_rows.items()}
            found.append(BlockInput(step, self._kept(hidden_BTC), Call(others, shape)))
        return found

    def _kept(self, tensor: Tensor) -> Tensor | StoredTensor:
        return tensor if self.spool is None else self.spool.keep(tensor)

    def _kept_rows(self, rows: Rows) -> Rows | StoredRows:
        if self.spool is None:
            return rows
        return (
            self.spool.keep(rows) if isinstance(rows, Tensor) else StoredList([self.spool.keep(each) for each in rows])
        )

    @torch.no_grad()
    def _enter(self, step: int, inputs: Call) -> tuple[Tensor, dict[str, Any]]:
        """Run the model up to its first block: what that is called with."""
        found: list[tuple[Tensor, dict[str, Any]]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_BTC, rest = self.block_call.enter(module, by_name(module, args, kwargs))
            found.append((hidden_BTC.detach(), rest | beside))
            raise _Entered

        beside: dict[str, Any] = {}
        first = self.model.get_submodule(self.blocks[0])
        handles = [
            first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        ]  # before any fold at its input
        for argument, module in getattr(self.block_call, "beside", {}).items():
            maker = self.model.get_submodule(module)
            handles.append(maker.register_forward_hook(lambda _, args, y, name=argument: beside.update({name: y})))
        try:
            self.calibration.call(self.model, step, inputs)
        except _Entered:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found[0]


def _nbytes(rows: dict[str, Rows]) -> int:
    return sum(tensor.nbytes for each in rows.values() for tensor in ([each] if isinstance(each, Tensor) else each))


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
