"""At the input of each block, the embedding that all blocks share is rewritten as `quant/folds` says."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.quant.folds import BlockFolds, RowFold, block_of
from ditbench.harness.quant.steps import StepClock

FOLDED = "folded_modulation"  # what a block's is called; those of its further arguments by the argument


class FoldedRows(nn.Module):
    """Rewrites the two rows of one site in e."""

    inverse_C: Tensor
    scale_add_C: Tensor

    def __init__(self, fold: RowFold, clock: StepClock) -> None:
        super().__init__()
        self.rows, self.clock = (fold.shift_row, fold.scale_row), clock
        self.register_buffer("inverse_C", fold.inverse_C)
        self.register_buffer("scale_add_C", fold.scale_add_C)
        self.shift_add = fold.shift_add.map(lambda rows_GC: rows_GC)  # its own, and moved with us

    def forward(self, e: Tensor, width: int) -> Tensor:
        by_row = e.unflatten(-1, (-1, width)) if e.shape[-1] != width else e
        shift_row, scale_row = self.rows
        rows = list(by_row.unbind(-2))
        rows[shift_row] = rows[shift_row] * self.inverse_C + self.shift_add.at(self.clock.step)
        rows[scale_row] = rows[scale_row] * self.inverse_C + self.scale_add_C
        return torch.stack(rows, -2).reshape(e.shape)


class FoldedModulation(nn.Module):
    """A forward pre-hook of one block: all of its folded sites, on the argument that carries e."""

    def __init__(self, folds: BlockFolds, clock: StepClock, names: list[str]) -> None:
        super().__init__()
        self.argument, self.width = folds.argument, folds.width
        self.sites = nn.ModuleList(FoldedRows(fold, clock) for fold in folds.rows)
        self.place = names.index(folds.argument)

    def hook(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if self.argument in kwargs:
            return args, kwargs | {self.argument: self(kwargs[self.argument])}
        return (*args[: self.place], self(args[self.place]), *args[self.place + 1 :]), kwargs

    def forward(self, e: Tensor) -> Tensor:
        for site in self.sites:
            e = site(e, self.width)
        return e


def hang(model: nn.Module, folds: dict[str, BlockFolds], clock: StepClock, device: torch.device) -> None:
    """Hang the folds at the inputs of the blocks of model. folds: as `block_folds` names them."""
    for name, of_block in folds.items():
        block = model.get_submodule(block_of(name))
        modulation = FoldedModulation(of_block, clock, list(inspect.signature(block.forward).parameters)).to(device)
        setattr(block, f"folded_{of_block.argument}" if hasattr(block, FOLDED) else FOLDED, modulation)
        block.register_forward_pre_hook(modulation.hook, with_kwargs=True)
