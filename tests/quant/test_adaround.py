from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.rounding import act_quant
from ditbench.harness.quant.adaround import (
    AdaRound,
    LearnedAct,
    alpha_of,
    clamp_with_ends,
    rectified_sigmoid,
)
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight, static_quant
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable

SPECS = [
    QuantSpec(bits, granularity, symmetric, group_size=12 if granularity == "per_group" else None)
    for bits in (3, 4)
    for granularity in ("per_tensor", "per_channel", "per_group")
    for symmetric in (True, False)
]
STATIC = QuantSpec(4, "per_tensor", symmetric=False)


def describe(spec: QuantSpec) -> str:
    return f"{spec.bits}-{spec.granularity}-{'sym' if spec.symmetric else 'asym'}"


def widened(weight_OC, spec, factor):
    """A start whose scale is not the one of the extremes; float64."""
    start = quantize_weight(weight_OC, spec)
    zero_point = None if start.zero_point_OG is None else start.zero_point_OG.double()
    return replace(start, scale_OG=factor * start.scale_OG.double(), zero_point_OG=zero_point)


def test_e4m3_codes_are_not_rounded_up_or_down_by_one(normal):
    spec = QuantSpec(8, "per_tensor", number="e4m3")
    weight = normal(5, 48).float()
    with pytest.raises(UserError, match="AdaRound is about integer codes"):
        AdaRound(weight, quantize_weight(weight, spec))
    with pytest.raises(UserError, match="LSQ is about integer codes"):
        LearnedAct(ActQuant(spec, StepTable.constant(torch.tensor(1.0))))


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_at_the_start_the_soft_weight_is_the_weight(spec, normal):
    """Where nothing is clamped: ranges wider than the extremes."""
    weight = normal(5, 48)
    soft = AdaRound(weight, widened(weight, spec, 1.4)).soft_OC()
    torch.testing.assert_close(soft.detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_at_the_start_the_hard_weight_is_rounded_to_nearest(spec, normal):
    weight = normal(5, 48).float()
    nearest = quantize_weight(weight, spec)
    hard = AdaRound(weight, nearest).hard()
    assert torch.equal(hard.codes_OC, nearest.codes_OC) and hard.codes_OC.dtype == nearest.codes_OC.dtype
    assert torch.equal(hard.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_both_weights_and_the_regulariser_are_those_of_plain_loops(spec, normal):
    """Away from the start, with ranges so narrow that codes are clamped."""
    weight, start = normal(5, 48), widened(normal(5, 48), spec, 0.6)
    rounding = AdaRound(weight, start)
    rounding.alpha_OGg.data = 3 * normal(*rounding.alpha_OGg.shape, seed=1)
    width = 48 // start.scale_OG.shape[1]
    low, high = (-(2 ** (spec.bits - 1) - 1), 2 ** (spec.bits - 1) - 1) if spec.symmetric else (0, 2**spec.bits - 1)
    soft, hard, total, clamped = [], [], 0.0, 0
    for o in range(5):
        for c in range(48):
            scale = float(start.scale_OG[o, c // width])
            zero = 0.0 if start.zero_point_OG is None else float(start.zero_point_OG[o, c // width])
            alpha = float(rounding.alpha_OGg.data[o, c // width, c % width])
            up = min(max(1.2 / (1 + math.exp(-alpha)) - 0.1, 0.0), 1.0)
            code = math.floor(float(weight[o, c]) / scale) + zero
            soft.append((min(max(code + up, low), high) - zero) * scale)
            hard.append((min(max(code + (alpha >= 0), low), high) - zero) * scale)
            clamped += not low <= code + up <= high
            total += 1 - abs(2 * up - 1) ** 3.7
    assert clamped > 3
    torch.testing.assert_close(rounding.soft_OC().flatten().tolist(), soft, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rounding.hard().dequantize().double().flatten().tolist(), hard, rtol=1e-6, atol=1e-6)
    assert float(rounding.regulariser(3.7).detach()) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_a_weight_that_is_still_half_way_is_rounded_up(spec, normal):
    weight, start = normal(5, 48), widened(normal(5, 48), spec, 2.0)
    rounding = AdaRound(weight, start)
    rounding.alpha_OGg.data.zero_()
    groups = start.scale_OG.shape[1]
    up = weight.unflatten(1, (groups, -1)).div(start.scale_OG[..., None]).floor() + 1
    zero = 0.0 if start.zero_point_OG is None else start.zero_point_OG[..., None]
    expected = (up + zero).clamp(spec.quant_min, spec.quant_max).flatten(1)
    assert torch.equal(rounding.hard().codes_OC.double(), expected)


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_whatever_is_learned_a_weight_stays_within_one_step(spec, normal):
    weight = normal(5, 48).float()
    rounding = AdaRound(weight, quantize_weight(weight, spec))
    rounding.alpha_OGg.data = 100 * normal(*rounding.alpha_OGg.shape, seed=1).float()
    distance = (rounding.hard().dequantize() - weight).abs().unflatten(1, (rounding.scale_OG.shape[1], -1))
    assert bool((distance <= 1.0001 * rounding.scale_OG[..., None]).all())
    assert bool((distance > 0.6 * rounding.scale_OG[..., None]).any())


def test_the_stretched_sigmoid_reaches_both_ends_and_its_inverse_undoes_it(normal):
    up = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(alpha_of(up)), up, rtol=0, atol=1e-12)
    assert rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0])).tolist() == pytest.approx([0, 0.5, 1])
    assert float(alpha_of(torch.tensor(0.5))) == pytest.approx(0, abs=1e-6)


def test_a_decided_weight_costs_nothing_and_an_undecided_one_costs_one(normal):
    weight = normal(2, 12)
    rounding = AdaRound(weight, widened(weight, QuantSpec(4, "per_channel"), 1.0))
    for alpha, cost in ((-5.0, 0), (5.0, 0), (0.0, 24)):
        rounding.alpha_OGg.data.fill_(alpha)
        assert float(rounding.regulariser(7.0).detach()) == pytest.approx(cost)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_static_scale_is_lsqs(symmetric, normal):
    """round(v) − v inside the range, the end's code outside; that of x is 1 inside and 0 outside. One value at a time."""
    spec = replace(STATIC, symmetric=symmetric)
    x = (2 * normal(200)).requires_grad_()
    quant = static_quant(*(StepTable(torch.tensor([v], dtype=torch.float64)) for v in (-1.3, 2.1)), spec)
    act = LearnedAct(quant)
    with torch.enable_grad():
        y = act(x, None)
        per_value = [torch.autograd.grad(v, [act.scale_G, x], retain_graph=True) for v in y]
    torch.testing.assert_close(y, fake_quantize_activation(x, quant), rtol=0, atol=1e-12)
    scale, zero = float(quant.scale.rows), 0.0 if symmetric else float(quant.zero_point.rows)
    outside = 0
    for value, (by_scale, by_x) in zip(x.tolist(), per_value, strict=True):
        ratio = value / scale
        code = round(ratio) + zero
        inside = spec.quant_min <= code <= spec.quant_max
        outside += not inside
        expected = round(ratio) - ratio if inside else min(max(code, spec.quant_min), spec.quant_max) - zero
        assert float(by_scale) == pytest.approx(expected, abs=1e-9)
        assert float(by_x.sum()) == pytest.approx(float(inside))
    assert 10 < outside < 150


@pytest.mark.parametrize("symmetric", [True, False])
def test_at_both_ends_of_its_range_the_gradient_of_a_static_scale_is_torchs_own_learnable_quantizers(symmetric):
    """Codes that are an end exactly, or are rounded to one, or lie one behind it; x in thirds of a step."""
    spec = replace(STATIC, symmetric=symmetric)
    quant = static_quant(*(StepTable(torch.tensor([v])) for v in ((-1.0, 1.75) if symmetric else (-1.25, 2.5))), spec)
    act, scale = LearnedAct(quant), quant.scale.rows.clone().requires_grad_()
    assert float(quant.scale.rows) == 0.25  # so that x / scale is exact
    zero = torch.zeros(1) if symmetric else quant.zero_point.rows
    low, high = spec.quant_min - zero, spec.quant_max - zero
    ratios = torch.cat([torch.arange(-6.0, 7.0) / 3 + float(end) for end in (low, high)])
    x = (ratios * scale.detach()).requires_grad_()
    with torch.enable_grad():
        theirs = torch._fake_quantize_learnable_per_tensor_affine(
            x, scale, zero.clone().requires_grad_(), spec.quant_min, spec.quant_max, 1.0
        )
        ours = act(x, None)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        by_scale, by_x = torch.autograd.grad(mine, [act.scale_G, x], retain_graph=True)
        torch.testing.assert_close(by_scale, torch.autograd.grad(other, scale, retain_graph=True)[0], rtol=0, atol=1e-5)
        assert torch.equal(by_x, torch.autograd.grad(other, x, retain_graph=True)[0])
    at_an_end = (ratios.round() == low) | (ratios.round() == high)
    (passed,) = torch.autograd.grad(ours[at_an_end].sum(), x)
    assert int(at_an_end.sum()) == 6 and bool((passed[at_an_end] == 1).all())


def test_the_gradient_of_a_scale_is_the_slope_of_its_output_while_the_rounding_stays(normal):
    """What LSQ's formula says: ⌊x/s⌉ − x/s is held, x̂(s) = s · clamp(x/s + what is held). Finite differences."""
    x, step = torch.tensor([-6.9, -6.5001, -2.3, 0.2, 5.6, 7.3, 9.9], dtype=torch.float64) * 0.3, 1e-6
    act = LearnedAct(
        ActQuant(replace(STATIC, symmetric=True), StepTable.constant(torch.tensor(0.3, dtype=torch.float64)))
    )
    held, last = (x / 0.3).round() - x / 0.3, act.quant.spec.quant_max
    with torch.enable_grad():
        found = torch.stack([torch.autograd.grad(v, act.scale_G, retain_graph=True)[0][0] for v in act(x, None)])
    sides = [
        s * torch.where((x / 0.3).round().abs() > last, last * x.sign(), x / s + held) for s in (0.3 - step, 0.3 + step)
    ]
    torch.testing.assert_close(found, (sides[1] - sides[0]) / (2 * step), rtol=0, atol=1e-6)
    assert float(found[0]) == pytest.approx(-0.1, abs=1e-9) and float(found[-1]) == last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_on_the_grid_can_be_moved_off_it(dtype):
    """h is 0 or 1 there, an end of its clamp: the slope is that of the side inside, by finite differences."""
    low_end, high_end = alpha_of(torch.tensor([0.0, 1.0], dtype=dtype))
    alpha, step = torch.stack([low_end, high_end]).requires_grad_(), 1e-4
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(rectified_sigmoid(alpha).sum(), alpha)
    moved = alpha.detach().double() + step * torch.tensor([1.0, -1.0])
    inside = (rectified_sigmoid(moved) - torch.tensor([0.0, 1.0])) / (step * torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(slope.double(), inside, rtol=0, atol=1e-3)
    beyond = torch.tensor([-2.5, 2.5], dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        assert torch.autograd.grad(rectified_sigmoid(beyond).sum(), beyond)[0].tolist() == [0, 0]


def test_the_gradient_of_a_rounding_passes_where_its_code_fits_the_range_with_both_ends():
    """Symmetric 3 bits, −3 … 3, in units of the scale: weights behind an end, on it, beside it and between."""
    spec = QuantSpec(3, "per_channel", symmetric=True)
    weight = torch.tensor([[-3.6, -3.0, -2.6, -0.5, 0.0, 2.4, 3.0, 3.4]], dtype=torch.float64)
    start = replace(quantize_weight(weight, spec), scale_OG=torch.ones(1, 1, dtype=torch.float64))
    rounding = AdaRound(weight, start)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(rounding.soft_OC().sum(), rounding.alpha_OGg)
    sigmoid = torch.sigmoid(rounding.alpha_OGg.detach())
    slope = 1.2 * sigmoid * (1 - sigmoid)
    passes = torch.tensor([False, True, True, True, True, True, True, False])
    torch.testing.assert_close(gradient.flatten(), torch.where(passes, slope.flatten(), 0.0), rtol=0, atol=1e-12)


def test_a_clamp_with_its_ends_is_clamp_and_what_has_no_finite_gradient_outside_adds_nothing():
    x = torch.tensor([-2.0, -1.0, 0.3, 4.0, 4.5, torch.inf], requires_grad=True)
    with torch.enable_grad():
        y = clamp_with_ends(x, -1, 4)
        (gradient,) = torch.autograd.grad((y * torch.tensor([torch.inf, 2, 3, 5, 7, 11])).sum(), x)
    assert y.tolist() == x.clamp(-1, 4).tolist() and gradient.tolist() == [0, 2, 3, 5, 0, 0]


def test_gradients_pass_a_dynamic_quantizer_unchanged(normal):
    x = normal(3, 48).float().requires_grad_()
    quant = ActQuant(QuantSpec(4, "per_token", dynamic=True))
    act = LearnedAct(quant)
    assert act.scale_G is None and not list(act.parameters())
    with torch.enable_grad():
        y = act(x, None)
        (gradient,) = torch.autograd.grad((y * normal(3, 48, seed=1)).sum(), x)
    torch.testing.assert_close(y.detach(), fake_quantize_activation(x.detach(), quant))
    torch.testing.assert_close(gradient, normal(3, 48, seed=1).float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_learned_scale_comes_back_from_the_state_with_its_zero_point(symmetric):
    """Two groups of steps, each with its own scale; only the row of the current step is used."""
    spec, groups = replace(STATIC, symmetric=symmetric), torch.tensor([0, 0, 1])
    quant = static_quant(
        StepTable(torch.tensor([-1.0, -3.0]), groups), StepTable(torch.tensor([2.0, 1.0]), groups), spec
    )
    act = LearnedAct(quant)
    act.scale_G.data *= torch.tensor([1.37, 0.81])
    state = act.range_state("layer") | {"layer/act_group_of_step": groups}
    again = act_quant(spec, state, "layer")
    torch.testing.assert_close(again.scale.rows, act.scale_G.data, rtol=1e-6, atol=0)
    assert symmetric or torch.equal(again.zero_point.rows, quant.zero_point.rows)
    x = torch.linspace(-4, 4, 50)
    outputs = [act(x, torch.tensor(step)).detach() for step in range(3)]
    for step, output in enumerate(outputs):
        torch.testing.assert_close(output, fake_quantize_activation(x, again, torch.tensor(step)), rtol=0, atol=1e-5)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_a_learned_scale_stays_positive():
    act = LearnedAct(static_quant(*(StepTable(torch.tensor([v])) for v in (-1.0, 2.0)), STATIC))
    start = float(act.scale_G)
    act.scale_G.data.fill_(-0.3)
    act.keep_positive()
    assert float(act.scale_G) == pytest.approx(1e-3 * start), "a thousandth of what it began with"
