"""GPTQ's solver against a slow loop and the cases in which its answer is known."""

import pytest
import torch

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.spec import QuantSpec

SPECS = {
    "per_channel": QuantSpec(4, "per_channel"),
    "asymmetric": QuantSpec(3, "per_channel", symmetric=False),
    "groups": QuantSpec(4, "per_group", group_size=16),
    "asymmetric_groups": QuantSpec(3, "per_group", group_size=12, symmetric=False),
}


@pytest.fixture
def problem(normal):
    weight = normal(10, 48)
    x = normal(300, 48, seed=1) @ normal(48, 48, seed=2) * 0.3 + normal(300, 48, seed=3)
    return weight, x, x.T @ x / len(x)


def slow_gptq(weight, hessian, spec, damp):
    """The textbook form: one column at a time, the whole inverse updated by elimination (OBS), no blocks, no Cholesky."""
    weight = weight.double().clone()
    hessian = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    inverse = torch.linalg.inv(hessian)
    out = torch.zeros_like(weight)
    size = spec.group_size or weight.shape[1]
    for column in range(weight.shape[1]):
        if column % size == 0:
            scales = quantize_weight(weight[:, column : column + size] if spec.group_size else weight, spec)
            scale = scales.scale_OG[:, 0].double()
            zero = 0 if scales.zero_point_OG is None else scales.zero_point_OG[:, 0].double()
        code = (torch.round(weight[:, column] / scale) + zero).clamp(spec.quant_min, spec.quant_max)
        out[:, column] = (code - zero) * scale
        error = (weight[:, column] - out[:, column]) / inverse[column, column]
        weight -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[None, column] / inverse[column, column]
    return out


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("block", [5, 16, 128])
def test_it_is_column_by_column_optimal_brain_surgery(problem, spec, block):
    weight, _, hessian = problem
    ours = gptq(weight, hessian, spec, damp=0.05, block=block).dequantize()
    torch.testing.assert_close(ours.double(), slow_gptq(weight, hessian, spec, 0.05), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_output_is_closer_than_with_rounding_to_nearest(problem, spec, act_order):
    weight, x, hessian = problem

    def error(rounded):
        return float(((rounded.dequantize().double() - weight) @ x.T).norm())

    assert error(gptq(weight, hessian, spec, act_order=act_order)) < 0.95 * error(quantize_weight(weight, spec))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_with_a_diagonal_hessian_it_rounds_to_nearest(problem, spec):
    weight, _, hessian = problem
    ours = gptq(weight, torch.diag(hessian.diagonal()), spec)
    assert torch.equal(ours.codes_OC, quantize_weight(weight, spec).codes_OC)


def test_a_channel_that_is_never_active_gets_weight_zero(problem):
    weight, _, hessian = problem
    hessian = hessian.clone()
    hessian[7], hessian[:, 7] = 0, 0
    rounded = gptq(weight, hessian, SPECS["asymmetric"]).dequantize()
    assert not rounded[:, 7].any() and rounded.isfinite().all()
    large = weight.clone()
    large[:, 7] = 1e3  # no level is spent on a weight that is 0 afterwards
    assert torch.equal(gptq(large, hessian, SPECS["asymmetric"]).dequantize(), rounded)


def test_the_arguments_are_left_alone(problem):
    weight, _, hessian = problem
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, SPECS["groups"])
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("ahead", [True, False])
def test_a_groups_scale_is_of_weights_with_this_blocks_errors_or_without_them(ahead, normal):
    """Groups of 4 in blocks of 8; the reference's lazily updated copy has not seen the errors of the block that it is in."""
    weight, x = normal(6, 16), normal(40, 16, seed=1) @ normal(16, 16, seed=2)
    hessian, spec = x.T @ x, QuantSpec(3, "per_group", group_size=4, symmetric=False)
    found = gptq(weight, hessian, spec, block=8, ahead=ahead)

    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    live, block_start = weight.clone(), weight.clone()
    scales = torch.zeros(6, 4, dtype=torch.float64)
    for column in range(16):
        if column % 8 == 0:
            block_start = live.clone()
        if column % 4 == 0:
            group = (live if ahead else block_start)[:, column : column + 4]
            one = quantize_weight(group, QuantSpec(3, "per_channel", symmetric=False))
            scales[:, column // 4], zero = one.scale_OG[:, 0].double(), one.zero_point_OG[:, 0].double()
        scale = scales[:, column // 4]
        code = ((live[:, column] / scale).round() + zero).clamp(0, 7)
        assert torch.equal(found.codes_OC[:, column].double(), code)
        error = (live[:, column] - (code - zero) * scale) / upper[column, column]
        live[:, column:] -= error[:, None] * upper[column, column:]
    torch.testing.assert_close(found.scale_OG.double(), scales, rtol=1e-6, atol=0)


def test_the_two_agree_where_a_group_is_a_block_or_there_are_none(normal):
    weight, x = normal(6, 16), normal(40, 16, seed=1)
    for spec in (QuantSpec(3, "per_group", group_size=8), QuantSpec(3, "per_channel")):
        one, other = (gptq(weight, x.T @ x, spec, block=8, ahead=ahead) for ahead in (True, False))
        assert torch.equal(one.codes_OC, other.codes_OC) and torch.equal(one.scale_OG, other.scale_OG)


def test_a_second_moment_that_cannot_be_inverted_is_said_with_what_mends_it(normal):
    """Two rows of eight inputs: without damping there is no inverse."""
    x = normal(2, 8)
    with pytest.raises(UserError, match=r"damp=0 is too little .* 8 inputs.* set method.damp=0.01"):
        gptq(normal(4, 8, seed=1), x.T @ x, SPECS["per_channel"], damp=0)
    assert gptq(normal(4, 8, seed=1), x.T @ x, SPECS["per_channel"], damp=0.01).dequantize().isfinite().all()
    with pytest.raises(UserError, match="is not finite"):
        gptq(normal(4, 8, seed=1), torch.full((8, 8), torch.nan), SPECS["per_channel"])
