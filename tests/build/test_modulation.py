"""Folds into adaLN-single, against the equation written out for one block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ditbench.harness.build.modulation import hang
from ditbench.harness.quant.folds import block_folds
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.target import Site, TableRows, Target
from ditbench.harness.quant.transforms import Transform

C, ROWS = 5, 6


class Block(nn.Module):
    """norm(x) · (1 + γ) + β with (β, γ) = rows 3 and 4 of table + e."""

    def __init__(self, normal) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(normal(ROWS, C, seed=1), requires_grad=False)

    def forward(self, x: Tensor, mask: None = None, temb: Tensor | None = None) -> Tensor:
        rows = self.scale_shift_table + temb.reshape(len(x), ROWS, C)
        return x * (1 + rows[:, None, 4]) + rows[:, None, 3]


def folded(normal, transform: Transform, clock: StepClock) -> Block:
    block = Block(normal)
    rows = TableRows("", "scale_shift_table", "temb", 3, 4)
    target = Target(block, (), (Site("input", ("layer",), (rows,)),))
    recipe = ModelRecipe({}, folded=frozenset({"input"}))
    folds = block_folds(target, recipe, {"layer": transform}, torch.float64)
    hang(block, folds, clock, torch.device("cpu"))
    return block


@pytest.mark.parametrize("flat", [True, False])  # e as (B, rows · C) or (B, rows, C)
@pytest.mark.parametrize("by_place", [True, False])
def test_the_blocks_input_is_shifted_and_scaled_at_every_step(normal, flat, by_place):
    scale, shift = normal(C, seed=2).abs() + 0.5, normal(2, C, seed=3)
    clock = StepClock(4)
    transform = Transform(scale_C=scale, shift=StepTable(shift, torch.tensor([0, 0, 1, 1])))
    block, plain = folded(normal, transform, clock), Block(normal)
    x, e = normal(2, 3, C, seed=4), normal(2, ROWS, C, seed=5)
    e = e.flatten(1) if flat else e
    for step, group in enumerate((0, 0, 1, 1)):
        clock.set(step, 4)
        found = block(x, None, e) if by_place else block(x, temb=e)
        torch.testing.assert_close(found, (plain(x, temb=e) - shift[group]) / scale, rtol=1e-6, atol=1e-6)


def test_the_other_rows_and_the_table_are_left_alone(normal):
    transform = Transform(scale_C=normal(C, seed=2).abs() + 0.5)
    block, e = folded(normal, transform, StepClock(1)), normal(2, ROWS, C)
    (hook,) = block._forward_pre_hooks.values()
    _, kwargs = hook(block, (normal(2, 3, C),), {"temb": e})
    kept = [0, 1, 2, 5]
    assert torch.equal(kwargs["temb"][:, kept], e[:, kept]) and not torch.equal(kwargs["temb"][:, 3:5], e[:, 3:5])
    assert torch.equal(block.scale_shift_table, Block(normal).scale_shift_table)
