"""Folding into adaLN-single: blocks that add their own table to an embedding that all blocks share.

A block of PixArt, Latte, SANA, Wan or LTX computes (β, γ, …) = table + e and reads norm(x) · (1 + γ) + β. What follows is to
read ((norm(x) · (1 + γ) + β) − z) / s instead, so at the input of the block e becomes

    e_β ← (e_β + table_β − z) / s − table_β        e_γ ← (e_γ + table_γ + 1) / s − 1 − table_γ

The table itself is left alone, and the shift z may be a table over denoising steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.quant.effective import shared_transform
from ditbench.harness.quant.recipe import ModelRecipe, to_device
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import TableRows, Target
from ditbench.harness.quant.transforms import Transform

OF_ARGUMENT = ":"


@dataclass(frozen=True)
class RowFold:
    """One folded site: e_β ← e_β · inverse + shift_add and e_γ ← e_γ · inverse + scale_add.

    shift_add: a table of rows (C,) over the denoising steps.
    """

    shift_row: int
    scale_row: int
    inverse_C: Tensor
    scale_add_C: Tensor
    shift_add: StepTable


@dataclass(frozen=True)
class BlockFolds:
    """The folded sites of one block, all on the argument that carries e; width: C."""

    argument: str
    width: int
    rows: tuple[RowFold, ...]


def block_folds(
    target: Target, recipe: ModelRecipe, transforms: dict[str, Transform], dtype: torch.dtype
) -> dict[str, BlockFolds]:
    """What is folded into adaLN-single, by block; buffers in dtype. Of a block that gets e in several arguments (those of image and
    text), the further ones are at `<block>:<argument>`.
    """
    by_block: dict[str, dict[str, list[tuple[TableRows, Transform]]]] = {}
    for site in target.sites:
        for producer in site.producers if site.name in recipe.folded else ():
            if isinstance(producer, TableRows):
                shared = to_device(shared_transform(site, transforms), target.device)
                folds = by_block.setdefault(producer.block, {})
                folds.setdefault(producer.argument, []).append((producer, shared))
    found = {}
    for name, by_argument in by_block.items():
        for place, (argument, rows_of) in enumerate(by_argument.items()):
            table_RC = _table(target, rows_of)
            rows = tuple(_row_fold(producer, table_RC, transform, dtype) for producer, transform in rows_of)
            found[f"{name}{OF_ARGUMENT}{argument}" if place else name] = BlockFolds(argument, table_RC.shape[-1], rows)
    return found


def block_of(name: str) -> str:
    """The block of a name that `block_folds` gives."""
    return name.partition(OF_ARGUMENT)[0]


def _table(target: Target, rows_of: list[tuple[TableRows, Transform]]) -> Tensor:
    """What the block adds to e, (R, C), float64 on the target's device; zeros where it adds nothing."""
    first, transform = rows_of[0]
    if first.table:
        table = getattr(target.transformer.get_submodule(first.block), first.table).detach().to(target.device)
        return table.reshape(-1, table.shape[-1]).double()
    width = transform.shift.rows.shape[-1] if transform.scale_C is None else len(transform.scale_C)  # type: ignore[union-attr]
    rows = 1 + max(max(each.shift_row, each.scale_row) for each, _ in rows_of)
    return torch.zeros(rows, width, dtype=torch.float64, device=target.device)


def _row_fold(rows: TableRows, table_RC: Tensor, transform: Transform, dtype: torch.dtype) -> RowFold:
    scale = table_RC.new_ones(table_RC.shape[-1]) if transform.scale_C is None else transform.scale_C.double()
    shift_table, scale_table = table_RC[rows.shift_row], table_RC[rows.scale_row]
    constant = StepTable.constant(shift_table / scale - shift_table)
    if transform.shift is not None:
        constant = transform.shift.map(lambda z_GC: (shift_table - z_GC.double()) / scale - shift_table)
    return RowFold(
        rows.shift_row,
        rows.scale_row,
        (1 / scale).to(dtype),
        ((scale_table + 1) / scale - 1 - scale_table).to(dtype),
        constant.map(lambda add_GC: add_GC.to(dtype)),
    )
