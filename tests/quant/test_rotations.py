from __future__ import annotations

import pytest
import torch

from ditbench.harness.quant.rotations import (
    BlockRotation,
    Dual,
    base_rotation,
    block_width,
    dual_rotation,
    greedy_rotation,
    snake_order,
)
from ditbench.harness.quant.transforms import Hadamard, Transform


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_outliers(normal, tokens: int = 40, width: int = 48):
    x = normal(tokens, width)
    x[:, 7] *= 60
    x[3, 30] = -200
    return x


@pytest.mark.parametrize("g", [2, 3, 8, 48, 128])
def test_the_base_rotation_spreads_channel_zero_evenly(g):
    base = base_rotation(g)
    torch.testing.assert_close(base[0], torch.full((g,), g**-0.5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(base @ base.T, torch.eye(g, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(base.det()) == pytest.approx(1)  # a product of Givens rotations


@pytest.mark.parametrize("g", [1, 12, 48])
def test_rotations_are_orthogonal_and_keep_every_tokens_norm(g, normal):
    x = with_outliers(normal)
    dual = dual_rotation(x, g, 20, generator())
    for matrix in (dual.first_gg, dual.second_gg):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(g, dtype=torch.float64), rtol=0, atol=1e-10)
    transform = Transform(rotations=dual.rotations())
    torch.testing.assert_close(transform(x).norm(dim=1), x.norm(dim=1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_product_is_that_of_the_untransformed_layer(scaled, normal):
    x, weight = with_outliers(normal), normal(20, 48, seed=1)
    scale = normal(48, seed=2).exp() if scaled else None
    transform = Transform(scale_C=scale, rotations=dual_rotation(x, 24, 30, generator()).rotations())
    expected = x @ weight.T
    error = (transform(x) @ transform.of_weight(weight).T - expected).abs().max()
    assert float(error) <= 1e-10 * float(expected.abs().max())


def test_the_matrix_is_two_block_diagonals_around_a_permutation(normal):
    dual = dual_rotation(with_outliers(normal), 12, 10, generator())
    first, second = (torch.block_diag(*[m] * 4) for m in (dual.first_gg, dual.second_gg))
    moved = torch.zeros(48, 48, dtype=torch.float64)
    for column, source in enumerate(dual.order_C.tolist()):
        moved[source, column] = 1
    assert torch.equal(moved @ moved.T, torch.eye(48, dtype=torch.float64))
    matrix = torch.eye(48, dtype=torch.float64)
    for rotation in dual.rotations():
        matrix = rotation(matrix)
    torch.testing.assert_close(matrix, first @ moved @ second)
    assert torch.equal(BlockRotation(48, dual.first_gg).matrix(), first)


def test_the_permutation_is_undone_bit_for_bit(normal):
    x = with_outliers(normal)
    order = dual_rotation(x, 12, 5, generator()).order_C
    assert torch.equal(x[:, order][:, order.argsort()], x)


def slow_greedy(x, g, steps, seed):
    """The greedy search in plain matrices: the extreme value's column d is spread with R whose rows and columns 0, d are swapped."""
    q = torch.linalg.qr(torch.randn(g - 1, g - 1, generator=generator(seed), dtype=torch.float64)).Q
    extended = torch.eye(g, dtype=torch.float64)
    extended[1:, 1:] = q
    rotation = base_rotation(g) @ extended
    blocks = x.reshape(-1, g)
    total, peaks, products = torch.eye(g, dtype=torch.float64), [], []
    for _ in range(steps + 1):
        peaks.append(float(blocks.max() - blocks.min()))
        products.append(total)
        column = int(blocks.abs().flatten().argmax()) % g
        swap = torch.eye(g, dtype=torch.float64)
        swap[[0, column]] = swap[[column, 0]]
        aimed = swap @ rotation @ swap
        blocks, total = blocks @ aimed, total @ aimed
    return products[peaks.index(min(peaks))], peaks


@pytest.mark.parametrize("g", [8, 16])
def test_the_greedy_search_is_the_one_in_slow_matrices(g, normal):
    x = with_outliers(normal)
    expected, peaks = slow_greedy(x, g, 30, seed=3)
    found = greedy_rotation(x, g, 30, generator(3))
    torch.testing.assert_close(found, expected)
    kept = x.reshape(-1, g) @ found
    assert float(kept.max() - kept.min()) == pytest.approx(min(peaks)) and min(peaks) < 0.8 * peaks[0]


def test_the_column_of_the_extreme_value_is_aimed_at(normal):
    """One spike in one column: a single step brings it to the norm of a spread row; aiming at its row number would not."""
    x = 0.01 * normal(5, 16)
    x[1, 6] = 100.0
    spread = x @ greedy_rotation(x, 16, 1, generator())
    assert float(spread.abs().max()) < 80
    expected, _ = slow_greedy(x, 16, 1, seed=0)
    torch.testing.assert_close(spread, x @ expected)


def test_a_value_that_is_already_level_is_left_alone():
    x = torch.ones(4, 8, dtype=torch.float64)
    assert torch.equal(greedy_rotation(x, 8, 30, generator()), torch.eye(8, dtype=torch.float64))


def test_tokens_that_no_rotation_makes_smaller_are_left_alone():
    """The shortest of equally good prefixes: a dead layer, or one without a token that is not zero."""
    assert torch.equal(greedy_rotation(torch.zeros(5, 8), 8, 6, generator()), torch.eye(8, dtype=torch.float64))


def test_no_steps_leave_only_the_permutation(normal):
    dual = dual_rotation(with_outliers(normal), 12, 0, generator())
    assert torch.equal(dual.first_gg, torch.eye(12, dtype=torch.float64))
    assert torch.equal(dual.second_gg, torch.eye(12, dtype=torch.float64))


def test_the_same_seed_gives_the_same_rotation_and_another_seed_another(normal):
    x = with_outliers(normal)
    one, same, other = (dual_rotation(x, 12, 20, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.first_gg, same.first_gg) and torch.equal(one.second_gg, same.second_gg)
    assert not torch.allclose(one.first_gg, other.first_gg)


def test_both_runs_together_lower_the_peak(normal):
    x = with_outliers(normal)
    rotated = Transform(rotations=dual_rotation(x, 12, 40, generator()).rotations())(x)
    assert float(rotated.abs().max()) < 0.5 * float(x.abs().max())


def test_channels_are_dealt_forth_and_back():
    """Twelve channels of falling size, four blocks of three: 0 1 2 3 | 3 2 1 0 | 0 1 2 3 by block."""
    order = snake_order(torch.arange(12, 0, -1).double(), 3)
    assert order.reshape(4, 3).tolist() == [[0, 7, 8], [1, 6, 9], [2, 5, 10], [3, 4, 11]]
    sizes = torch.tensor([5.0, 1.0, 9.0, 3.0])
    assert snake_order(sizes, 2).tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize(("width", "asked", "taken"), [(1152, 128, 128), (192, 128, 96), (48, 128, 48), (97, 64, 1)])
def test_the_block_is_the_largest_divisor_that_was_allowed(width, asked, taken):
    assert block_width(width, asked) == taken


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="blocks of 5 do not fit C=48"):
        BlockRotation(48, torch.eye(5))


def test_a_dual_rotation_survives_as_state_tensors(normal):
    dual = dual_rotation(with_outliers(normal), 12, 5, generator())
    again = Dual.from_state("site", dual.state("site"))
    assert all(torch.equal(vars(again)[part], value) for part, value in vars(dual).items())


@pytest.mark.parametrize("order", [128, 192, 576, 1152, 3072, 4608])
def test_the_widths_of_todays_models_have_a_full_hadamard_rotation(order):
    rotation = Hadamard(order)
    assert rotation.block_size == order
    rows = rotation(torch.eye(order, dtype=torch.float64)[:3])
    torch.testing.assert_close(rows.abs(), torch.full_like(rows, order**-0.5))


def test_a_width_without_one_takes_blocks():
    """92 = 4 · 23 needs another construction than Paley's."""
    assert Hadamard(92).block_size == 4 and Hadamard(2432).block_size == 2432


def test_the_second_rotation_is_fitted_on_what_the_first_and_the_permutation_give(normal):
    x, replay = with_outliers(normal), generator()
    dual = dual_rotation(x, 12, 40, generator())
    rotated = BlockRotation(48, greedy_rotation(x, 12, 40, replay))(x)
    order = snake_order(rotated.abs().amax(0), 12)
    assert torch.equal(dual.order_C, order)
    assert torch.equal(dual.second_gg, greedy_rotation(rotated[:, order], 12, 40, replay))
