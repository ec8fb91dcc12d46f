from __future__ import annotations

import pytest
import torch

from ditbench.harness.quant.lowrank import (
    FACTOR_DTYPE,
    branches,
    capped_rank,
    leading_factors,
    output_error,
    refine,
    residual,
    split,
)
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.recipe import LowRank
from ditbench.harness.quant.spec import QuantSpec

INT4 = QuantSpec(4, "per_group", group_size=16)


def rounded(weight_MC: torch.Tensor) -> torch.Tensor:
    return quantize_weight(weight_MC, INT4).dequantize().double()


@pytest.fixture
def outliers(normal):
    """(64, 48), three channels a hundred times the others."""
    weight = normal(64, 48)
    weight[:, [5, 17, 40]] *= 100
    return weight


@pytest.mark.parametrize("rank", [0, 1, 7, 20])
def test_branch_and_residual_are_the_weight_whatever_the_rounding_of_the_factors(rank, outliers):
    parts = split(outliers, rank)
    assert parts.rank == rank and parts.down_rC.dtype == parts.up_Mr.dtype == FACTOR_DTYPE
    again = parts.up_Mr.double() @ parts.down_rC.double() + parts.residual_MC
    assert float((again - outliers).norm() / outliers.norm()) < 1e-12
    if rank:  # with the factors as they were before rounding the sum would be off by their rounding
        exact = split(outliers, rank, dtype=torch.float64)
        wrong = exact.up_Mr @ exact.down_rC + parts.residual_MC
        assert float((wrong - outliers).norm() / outliers.norm()) > 1e-4


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_the_residuals_norm_is_that_of_the_singular_values_left(rank, outliers):
    left = split(outliers, rank, dtype=torch.float64).residual_MC.square().sum()
    expected = torch.linalg.eigvalsh(outliers.T @ outliers).flip(0)[rank:].sum()  # σ² from the Gram matrix
    torch.testing.assert_close(left, expected, rtol=1e-10, atol=0)
    assert float(split(outliers, rank).residual_MC.norm()) == pytest.approx(float(left.sqrt()), rel=0.05)


def test_at_full_rank_nothing_is_left_but_the_rounding_of_the_factors(outliers):
    assert float(split(outliers, 48, dtype=torch.float64).residual_MC.norm() / outliers.norm()) < 1e-12
    assert 1e-4 < float(split(outliers, 48).residual_MC.norm() / outliers.norm()) < 1e-2


def test_at_rank_zero_the_weight_is_what_is_rounded(outliers):
    parts = split(outliers, 0)
    assert torch.equal(parts.residual_MC, outliers)
    assert parts.down_rC.shape == (0, 48) and parts.up_Mr.shape == (64, 0)


def test_four_bits_lose_less_of_a_matrix_with_outlier_channels_beside_a_branch(outliers):
    parts = split(outliers, 4)
    with_branch = (rounded(parts.residual_MC) - parts.residual_MC).norm()
    assert float(with_branch) < 0.1 * float((rounded(outliers) - outliers).norm())


def test_the_slices_of_a_shared_branch_stack_to_the_joint_svd(normal):
    weights = {"q": normal(24, 20, seed=1), "k": 3 * normal(24, 20, seed=2), "v": normal(12, 20, seed=3)}
    stacked = torch.cat(list(weights.values()))
    found = branches(tuple(weights), split(stacked, 6, dtype=torch.float64), [24, 24, 12])
    left, singular, right = torch.linalg.svd(stacked)
    up, down = torch.cat([branch.up_Or for branch in found.values()]), found["k"].down_rC
    assert all(branch.down_rC is down for branch in found.values())
    signs = (down * right[:6]).sum(1).sign()  # a pair of singular vectors is one up to its sign
    torch.testing.assert_close(up * signs, left[:, :6] * singular[:6], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(down * signs[:, None], right[:6], rtol=1e-11, atol=1e-11)
    assert [tuple(branch.up_Or.shape) for branch in found.values()] == [(24, 6), (24, 6), (12, 6)]
    parts = split(stacked, 6)
    each = [residual(weights[n], branch) for n, branch in branches(tuple(weights), parts, [24, 24, 12]).items()]
    torch.testing.assert_close(torch.cat(each), parts.residual_MC, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_factors_are_those_of_the_whole_svd_for_tall_and_wide_weights(shape, normal):
    weight = normal(*shape)
    down, up = leading_factors(weight, 5)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(up @ down, left[:, :5] * singular[:5] @ right[:5], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(down @ down.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-11)


def test_a_weight_of_lower_rank_than_its_branch_has_finite_factors(normal):
    weight = normal(12, 1) @ normal(1, 30, seed=1)
    down, up = leading_factors(weight, 4)
    assert bool(down.isfinite().all()) and bool(up.isfinite().all())
    torch.testing.assert_close(up @ down, weight, rtol=1e-7, atol=1e-7)


def test_a_layer_without_a_branch_keeps_its_weight(normal):
    weight = normal(4, 6)
    assert torch.equal(residual(weight, None), weight)
    assert not torch.equal(residual(weight, LowRank(weight[:1], weight[:, :1])), weight)


@pytest.mark.parametrize(("shape", "rank"), [((48, 48), 24), ((192, 48), 24), ((20, 192), 10), ((1152, 4608), 32)])
def test_a_small_layer_gets_a_rank_of_at_most_half_its_smaller_side(shape, rank):
    assert capped_rank(torch.empty(shape), 32) == rank


def errors_of(weight_MC, x_TC, iterations: int, rank: int = 6):
    """The split of `refine`, the errors it kept, and those of every iteration in a loop that never stops."""
    best, kept = refine(
        weight_MC, rank, rounded, lambda left, q: output_error(x_TC, x_TC, left, q), iterations=iterations
    )
    everything, q = [], torch.zeros_like(weight_MC)
    for _ in range(iterations):
        left, singular, right = torch.linalg.svd(weight_MC - q)
        up = (left[:, :rank] * singular[:rank]).to(FACTOR_DTYPE).double()
        branch = up @ right[:rank].to(FACTOR_DTYPE).double()
        q = rounded(weight_MC - branch)
        everything.append(float((x_TC @ weight_MC.T - x_TC @ branch.T - x_TC @ q.T).square().sum()))
    return best, kept, everything


def test_iterations_stop_at_the_first_increase_and_keep_the_best(outliers, normal):
    x = normal(40, 48, seed=7)
    best, kept, everything = errors_of(outliers, x, iterations=40)
    stop = next(i for i in range(1, 40) if everything[i] > everything[i - 1])
    assert 2 < stop < 39, "the early stop has to be seen to act"
    assert kept == pytest.approx(everything[:stop], rel=1e-9)
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0]
    assert output_error(x, x, best.residual_MC, rounded(best.residual_MC)) == pytest.approx(kept[-1], rel=1e-12)


def test_one_iteration_is_the_plain_svd(outliers, normal):
    best, kept, _ = errors_of(outliers, normal(40, 48, seed=7), iterations=1)
    assert torch.equal(best.residual_MC, split(outliers, 6).residual_MC) and len(kept) == 1


def test_the_output_error_is_that_of_both_paths_together(outliers, normal):
    x, x_rounded, parts = normal(9, 48, seed=1), normal(9, 48, seed=2), split(outliers, 3)
    q = rounded(parts.residual_MC)
    output = x @ parts.down_rC.double().T @ parts.up_Mr.double().T + x_rounded @ q.T
    expected = float((x @ outliers.T - output).square().sum())
    assert output_error(x, x_rounded, parts.residual_MC, q) == pytest.approx(expected, rel=1e-10)
