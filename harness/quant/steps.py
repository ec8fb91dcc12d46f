"""The denoising step as data: a clock that the sampling loop sets and tables whose row depends on it.

A step-dependent quantity (shift, bias, activation range) is a small table with one row per group of steps. Layers read
the step from a tensor and pick their row by index, so a compiled model does not recompile from step to step.

A plan by ranges of steps (`harness.fitting.mixed_precision`) changes a layer's codes or formats, which are no rows of a table. The range
is a plain int: a compiled model is compiled once for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def range_starts(num_steps: int, ranges: int) -> tuple[int, ...]:
    """The first step of each of `ranges` consecutive ranges of steps, whose lengths differ by at most one."""
    return tuple(index * num_steps // ranges for index in range(ranges))


def step_ranges(starts: tuple[int, ...], num_steps: int) -> list[range]:
    """The steps of each range."""
    return [range(start, end) for start, end in zip(starts, (*starts[1:], num_steps), strict=True)]


class StepClock:
    """The index of the current denoising step, 0 … num_steps − 1, as a tensor shared by all layers of a model.

    range: the index of the range of steps that it lies in; starts: the first step of each range.
    """

    def __init__(self, num_steps: int | None, starts: tuple[int, ...] = (0,)) -> None:
        self.num_steps = num_steps  # None: nothing in the model depends on the step
        self.starts, self.range = starts, 0
        self.step = torch.zeros((), dtype=torch.long)

    @property
    def ranges(self) -> list[range]:
        """The steps of each range; one of one step where nothing depends on the step."""
        return step_ranges(self.starts, self.num_steps or 1)

    def to(self, device: torch.device | str) -> StepClock:
        self.step = self.step.to(device)
        return self

    def set(self, step: int, num_steps: int) -> None:
        """Called by the sampling loop once per model call.

        Raises:
            ValueError: the recipe's tables were made for another number of steps.
        """
        if self.num_steps is not None and num_steps != self.num_steps:
            raise ValueError(
                f"this recipe has tables for {self.num_steps} denoising steps, the sampler runs {num_steps}; "
                "calibrate with the same protocol.steps"
            )
        self.step.fill_(step)
        for index, start in enumerate(self.starts):
            if step >= start:  # compared, not looked up: where this is traced, it is so once for each range, not step
                self.range = index

    def enter(self, index: int) -> None:
        """Go to the first step of a range."""
        self.set(self.starts[index], self.num_steps or 1)


class StepTable(nn.Module):
    """rows: (G, …), one per group of steps; group_of_step: int64 (S,), or None when all steps share row 0."""

    rows: Tensor
    group_of_step: Tensor | None

    def __init__(self, rows: Tensor, group_of_step: Tensor | None = None) -> None:
        super().__init__()
        if group_of_step is None and len(rows) != 1:
            raise ValueError(f"a table of {len(rows)} rows needs group_of_step")
        self.register_buffer("rows", rows)
        self.register_buffer("group_of_step", group_of_step)

    @staticmethod
    def constant(row: Tensor) -> StepTable:
        return StepTable(row[None])

    @property
    def num_steps(self) -> int | None:
        return None if self.group_of_step is None else len(self.group_of_step)

    def at(self, step: Tensor | None) -> Tensor:
        """The row of one step; step: int64 scalar tensor."""
        if self.group_of_step is None:
            return self.rows[0]
        if step is None:
            raise ValueError("this table depends on the denoising step, and no step was given")
        group = self.group_of_step.index_select(0, step.reshape(1))
        return self.rows.index_select(0, group)[0]  # not by a tensor in brackets: that waits for its value

    def map(self, function: Callable[[Tensor], Tensor]) -> StepTable:
        """Apply function to all rows (G, …) at once."""
        return StepTable(function(self.rows), self.group_of_step)

    def combine(self, other: StepTable, function: Callable[[Tensor, Tensor], Tensor]) -> StepTable:
        """Row by row over the common refinement of both groupings."""
        if self.group_of_step is None:
            return other.map(lambda rows: function(self.rows, rows))
        if other.group_of_step is None:
            return self.map(lambda rows: function(rows, other.rows))
        if len(self.group_of_step) != len(other.group_of_step):
            raise ValueError(f"tables of {self.num_steps} and {other.num_steps} steps cannot be combined")
        pairs = torch.stack([self.group_of_step, other.group_of_step], dim=1)
        unique, group_of_step = torch.unique(pairs, dim=0, return_inverse=True)
        return StepTable(function(self.rows[unique[:, 0]], other.rows[unique[:, 1]]), group_of_step)
