"""Folding into adaLN-single: blocks that add their own table to an embedding that all blocks share.

A block of PixArt, Latte, SANA, Wan or LTX computes (β, γ, …) = table + e and reads norm(x) · (1 + γ) + β. What follows is to
read ((norm(x) · (1 + γ) + β) − z) / s instead, so at the block's door e becomes

    e_β ← (e_β + table_β − z) / s − table_β        e_γ ← (e_γ + table_γ + 1) / s − 1 − table_γ

The table itself is left alone, and the shift z may be a table over denoising steps.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from harness.quant.effective import shared_transform
from harness.quant.recipe import ModelRecipe
from harness.quant.steps import StepClock, StepTable
from harness.quant.target import TableRows, Target
from harness.quant.transforms import Transform


class FoldedRows(nn.Module):
    """Rewrites the two rows of one site in e. Buffers in `dtype`; shift: a table of (G, C), or None."""

    def __init__(
        self, rows: TableRows, table_RC: Tensor, transform: Transform, clock: StepClock, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.rows, self.clock = (rows.shift_row, rows.scale_row), clock
        table = table_RC.double()
        scale = torch.ones(table.shape[-1]).double() if transform.scale_C is None else transform.scale_C.double()
        self.register_buffer("inverse_C", (1 / scale).to(dtype))
        shift_table, scale_table = (table[row] for row in self.rows)
        self.register_buffer("scale_add_C", ((scale_table + 1) / scale - 1 - scale_table).to(dtype))
        constant = StepTable.constant(shift_table / scale - shift_table)
        if transform.shift is not None:
            constant = transform.shift.map(lambda z_GC: (shift_table - z_GC.double()) / scale - shift_table)
        self.shift_add = constant.map(lambda add_GC: add_GC.to(dtype))

    def forward(self, e: Tensor, width: int) -> Tensor:
        by_row = e.unflatten(-1, (-1, width)) if e.shape[-1] != width else e
        shift_row, scale_row = self.rows
        rows = list(by_row.unbind(-2))
        rows[shift_row] = rows[shift_row] * self.inverse_C + self.shift_add.at(self.clock.step)
        rows[scale_row] = rows[scale_row] * self.inverse_C + self.scale_add_C
        return torch.stack(rows, -2).reshape(e.shape)


class FoldedModulation(nn.Module):
    """A forward pre-hook of one block: all of its folded sites, on the argument that carries e."""

    def __init__(self, argument: str, width: int, sites: list[FoldedRows], names: list[str]) -> None:
        super().__init__()
        self.argument, self.width, self.sites = argument, width, nn.ModuleList(sites)
        self.place = names.index(argument)

    def hook(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if self.argument in kwargs:
            return args, kwargs | {self.argument: self(kwargs[self.argument])}
        return (*args[: self.place], self(args[self.place]), *args[self.place + 1 :]), kwargs

    def forward(self, e: Tensor) -> Tensor:
        for site in self.sites:
            e = site(e, self.width)
        return e


def fold_tables(
    model: nn.Module, target: Target, recipe: ModelRecipe, transforms: dict[str, Transform], clock: StepClock
) -> None:
    """Hang the folds of adaLN-single at the doors of the blocks of `model`, a copy of target.transformer."""
    by_block: dict[str, list[tuple[TableRows, Transform]]] = {}
    for site in target.sites:
        for producer in site.producers if site.name in recipe.folded else ():
            if isinstance(producer, TableRows):
                by_block.setdefault(producer.block, []).append((producer, shared_transform(site, transforms)))
    for name, folds in by_block.items():
        block = model.get_submodule(name)
        first = folds[0][0]
        table = getattr(target.transformer.get_submodule(name), first.table).detach()
        table_RC = table.reshape(-1, table.shape[-1])
        device, dtype = getattr(block, first.table).device, getattr(block, first.table).dtype
        sites = [FoldedRows(rows, table_RC, transform, clock, dtype).to(device) for rows, transform in folds]
        names = list(inspect.signature(block.forward).parameters)
        modulation = FoldedModulation(first.argument, table_RC.shape[-1], sites, names)
        block.folded_modulation = modulation
        block.register_forward_pre_hook(modulation.hook, with_kwargs=True)
