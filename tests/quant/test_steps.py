from __future__ import annotations

import pytest
import torch

from ditbench.harness.quant.steps import StepClock, StepTable, range_starts, step_ranges

STEPS = 6
PARTITIONS = {
    "constant": None,
    "halves": [0, 0, 0, 1, 1, 1],
    "thirds": [0, 0, 1, 1, 2, 2],
    "uneven": [0, 1, 1, 1, 1, 2],
    "not in order": [2, 0, 1, 0, 2, 1],
    "every step": [0, 1, 2, 3, 4, 5],
}


def table(partition: str, normal, seed: int, width: int = 3) -> StepTable:
    groups = PARTITIONS[partition]
    if groups is None:
        return StepTable.constant(normal(width, seed=seed))
    return StepTable(normal(max(groups) + 1, width, seed=seed), torch.tensor(groups))


@pytest.mark.parametrize("left", PARTITIONS)
@pytest.mark.parametrize("right", PARTITIONS)
def test_combining_two_partitions_is_combining_at_every_step(left, right, normal):
    one, other = table(left, normal, 1), table(right, normal, 2)
    combined = one.combine(other, lambda a, b: a / 2 - b)  # not symmetric: a swap would be seen
    for step in map(torch.tensor, range(STEPS)):
        assert torch.equal(combined.at(step), one.at(step) / 2 - other.at(step))
    pairs = {(one_group, other_group) for one_group, other_group in zip(groups_of(left), groups_of(right), strict=True)}
    assert len(combined.rows) == len(pairs), "a row for every pair that occurs, and none besides"


def groups_of(partition: str) -> list[int]:
    return PARTITIONS[partition] or [0] * STEPS


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_table_gives_the_row_of_the_steps_group(partition, normal):
    found = table(partition, normal, 1)
    for step in range(STEPS):
        assert torch.equal(found.at(torch.tensor(step)), found.rows[groups_of(partition)[step]])
    doubled = found.map(lambda rows: 2 * rows)
    assert torch.equal(doubled.at(torch.tensor(4)), 2 * found.at(torch.tensor(4)))


def test_tables_for_different_numbers_of_steps_cannot_be_combined(normal):
    with pytest.raises(ValueError, match="6 and 3 steps"):
        table("halves", normal, 1).combine(StepTable(normal(2, 3), torch.tensor([0, 1, 1])), torch.add)


def test_several_rows_without_groups_are_refused(normal):
    with pytest.raises(ValueError, match="2 rows needs group_of_step"):
        StepTable(normal(2, 3))


def test_a_table_that_depends_on_the_step_wants_one(normal):
    with pytest.raises(ValueError, match="no step was given"):
        table("halves", normal, 1).at(None)
    table("constant", normal, 1).at(None)


def test_the_clock_refuses_another_number_of_steps_than_the_tables_have():
    clock = StepClock(4)
    clock.set(3, 4)
    assert int(clock.step) == 3
    with pytest.raises(ValueError, match="4 denoising steps, the sampler runs 5"):
        clock.set(0, 5)


def test_a_clock_without_tables_takes_any_number_of_steps():
    clock = StepClock(None)
    clock.set(99, 100)
    assert int(clock.step) == 99


def test_setting_the_clock_keeps_its_tensor():
    """Layers hold the tensor: a new one would leave them at the old step."""
    clock = StepClock(4)
    held = clock.step
    clock.set(2, 4)
    assert int(held) == 2


def test_the_clock_is_in_the_range_whose_first_step_it_has_reached():
    clock = StepClock(7, (0, 3, 5))
    assert clock.ranges == [range(3), range(3, 5), range(5, 7)]
    seen = []
    for step in range(7):
        clock.set(step, 7)
        seen.append(clock.range)
    assert seen == [0, 0, 0, 1, 1, 2, 2]
    clock.enter(1)
    assert (int(clock.step), clock.range) == (3, 1)


@pytest.mark.parametrize(("steps", "ranges"), [(8, 3), (7, 3), (20, 6), (5, 5), (9, 1)])
def test_ranges_of_steps_are_of_nearly_one_length_and_hold_every_step(steps, ranges):
    found = step_ranges(range_starts(steps, ranges), steps)
    assert [step for each in found for step in each] == list(range(steps)) and len(found) == ranges
    assert max(map(len, found)) - min(map(len, found)) <= 1
