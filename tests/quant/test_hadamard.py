from __future__ import annotations

import pytest
import torch

from ditbench.harness.quant import hadamard as orders
from ditbench.harness.quant.transforms import Hadamard, RegularHadamard, random_signs

SMALL = [1, 2, 4, 12, 20, 24, 28, 36, 52, 60, 72, 96, 100, 108, 140]
LARGE = [576, 1152, 3072, 4608]


@pytest.fixture
def no_large_matrices_kept():
    yield
    orders.hadamard.cache_clear()


@pytest.mark.parametrize("order", SMALL)
def test_a_matrix_has_entries_of_one_and_orthogonal_rows(order):
    matrix = orders.hadamard(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", LARGE)
def test_a_large_matrix_is_orthogonal_too(order, no_large_matrices_kept):
    """H (Hᵀ v) = order · v for random whole v: exact in float64, and O(order²)."""
    matrix = orders.hadamard(order)
    assert matrix.shape == (order, order) and bool((matrix.abs() == 1).all())
    probes = torch.randint(-9, 10, (order, 4), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(matrix @ (matrix.T @ probes), order * probes)


@pytest.mark.parametrize("order", [3, 6, 18, 66, 156, 172, 1000])
def test_an_order_that_cannot_be_built_says_which_divisor_can(order):
    assert not orders.is_admissible(order)
    with pytest.raises(ValueError, match=f"order {order} here; {orders.largest_admissible_divisor(order)} divides it"):
        orders.hadamard(order)


@pytest.mark.parametrize(
    ("size", "block"), [(1152, 1152), (4608, 4608), (156, 52), (172, 4), (1000, 200), (66, 2), (7, 1)]
)
def test_a_width_takes_the_largest_block_that_divides_it(size, block):
    assert orders.largest_admissible_divisor(size) == block
    assert Hadamard(size).block_size == block


@pytest.mark.parametrize("order", [48, 96, 1152, 3072, 4608])
def test_the_factors_are_orders_and_cost_far_less_than_the_whole(order):
    a, b = orders.balanced_factors(order)
    assert a * b == order and orders.is_admissible(a) and orders.is_admissible(b)
    assert a + b <= 1.25 * 2 * order**0.5  # 2 √order is the least that any two factors sum to


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize("size", [2, 48, 72, 96, 156, 172, 1152])
def test_the_rotation_is_orthogonal_and_full_in_its_blocks(size, signed, normal):
    """156 and 172 take blocks of 52 and 4: zero outside of them, ±1/√m inside."""
    signs = random_signs(size, torch.Generator().manual_seed(1)) if signed else None
    rotation = Hadamard(size, signs)
    matrix = rotation.matrix()
    assert float((matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-12
    block = rotation.block_size
    inside = torch.block_diag(*[torch.ones(block, block)] * (size // block)).double()
    torch.testing.assert_close(matrix.abs(), inside / block**0.5, rtol=1e-12, atol=1e-12)
    x = normal(3, 5, size)
    torch.testing.assert_close(rotation(x), x @ matrix, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [156, 1000, 3072, 4608])
def test_lengths_and_products_are_kept_at_any_width(size, normal):
    rotation, x, weight = Hadamard(size), normal(4, size), normal(3, size, seed=1)
    assert float((rotation(x) @ rotation(weight).T - x @ weight.T).norm() / (x @ weight.T).norm()) < 1e-12


def test_signs_flip_channels_before_the_rotation(normal):
    x, signs = normal(4, 48), random_signs(48, torch.Generator().manual_seed(1))
    assert set(signs.tolist()) == {-1, 1} and signs.dtype == torch.int8
    assert torch.equal(Hadamard(48, signs)(x), Hadamard(48)(x * signs))
    assert not torch.allclose(Hadamard(48, signs)(x), Hadamard(48)(x))


def test_an_asked_for_block_is_taken(normal):
    x = normal(4, 48)
    by_hand = (x.unflatten(1, (-1, 12)) @ orders.hadamard(12) / 12**0.5).flatten(1)
    torch.testing.assert_close(Hadamard(48, block_size=12)(x), by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [32, 6, 7])
def test_a_block_that_does_not_fit_is_refused_with_those_that_do(block):
    with pytest.raises(ValueError, match=r"C=48; usable: \[2, 4, 8, 12, 16, 24, 48\]"):
        Hadamard(48, block_size=block)


@pytest.mark.parametrize("size", [48, 156, 1152])
def test_an_outlier_channel_is_spread_over_its_block(size, normal):
    x = normal(32, size)
    x[:, 3] *= 100

    def incoherence(rows: torch.Tensor) -> float:
        return float((rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean())

    assert incoherence(Hadamard(size)(x)) < 0.5 * incoherence(x)


def test_the_matrices_are_not_part_of_what_is_stored():
    assert set(Hadamard(48, random_signs(48, torch.Generator())).state_dict()) == {"signs_C"}
    assert not Hadamard(48).state_dict()


@pytest.mark.parametrize(
    ("width", "wanted", "expected"),
    [
        (1152, 2, (2, 576)),
        (4608, 2, (2, 2304)),
        (3072, 3, (3, 1024)),
        (20, 2, (1, 20)),  # no Hadamard matrix of order 10: one block
        (2432, 2, (2, 1216)),  # 19·128, by Paley's 76
        (184, 2, (2, 4)),  # 8·23: none for 92 or 184
        (48, 5, (4, 12)),  # 5 does not divide 48
    ],
)
def test_the_number_of_blocks_and_its_fallbacks(width, wanted, expected):
    assert orders.hadamard_blocks(width, wanted) == expected
    matrix = Hadamard(width, block_size=expected[1])
    ones = torch.ones(1, width, dtype=torch.float64)
    assert float(matrix(ones).norm()) == pytest.approx(width**0.5)


@pytest.mark.parametrize("order", [1, 4, 16, 64, 256])
def test_a_regular_matrix_has_rows_and_columns_of_one_sum(order):
    matrix = orders.regular(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    for dim in (0, 1):
        assert torch.equal(matrix.sum(dim), torch.full((order,), order**0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("width", "most", "block"), [(192, 256, 64), (3072, 256, 256), (3072, 4096, 1024), (90, 256, 1)]
)
def test_regular_blocks_are_powers_of_four_that_divide_the_width(width, most, block, normal):
    assert orders.largest_power_of_four(width, most) == block
    rotation, x = RegularHadamard(width, block), normal(3, width)
    by_hand = (x.unflatten(1, (-1, block)) @ orders.regular(block) / block**0.5).flatten(1)
    torch.testing.assert_close(rotation(x), by_hand, rtol=1e-12, atol=1e-12)
    assert not rotation.state_dict()


@pytest.mark.parametrize(("width", "block"), [(192, 128), (192, 256), (192, 48), (192, 0)])
def test_regular_blocks_that_do_not_fit_are_refused(width, block):
    with pytest.raises(
        ValueError, match=f"regular Hadamard blocks of {block} do not fit C=192; powers of four up to 64"
    ):
        RegularHadamard(width, block)


def test_an_order_without_a_regular_matrix_is_refused():
    with pytest.raises(ValueError, match="powers of four here, got 2"):
        orders.regular(8)
