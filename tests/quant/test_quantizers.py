from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.rounding import nearest
from ditbench.harness.quant.quantizers import (
    MSE_PERCENTILES,
    ActQuant,
    activation_affine,
    affine_from_range,
    fake_quantize_activation,
    mse_percentile_range,
    quantize_weight,
    static_quant,
)
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable

GROUP = 12  # of 48 channels
WEIGHTS = [
    QuantSpec(4, granularity, symmetric, group_size=GROUP if granularity == "per_group" else None)
    for granularity in ("per_tensor", "per_channel", "per_group")
    for symmetric in (True, False)
]
ACTS = [
    QuantSpec(4, granularity, symmetric, dynamic=True, group_size=GROUP if granularity == "per_group" else None)
    for granularity in ("per_tensor", "per_token", "per_group")
    for symmetric in (True, False)
]


def describe(spec: QuantSpec) -> str:
    return f"{'act' if spec.dynamic else 'weight'}-{spec.granularity}-{'sym' if spec.symmetric else 'asym'}"


def fake_quantize(x_RC: Tensor, spec: QuantSpec) -> Tensor:
    """Rows are output channels or tokens."""
    if spec.dynamic:
        return fake_quantize_activation(x_RC, ActQuant(spec))
    return quantize_weight(x_RC, spec).dequantize().to(x_RC.dtype)


def step_size(x_RC: Tensor, spec: QuantSpec) -> Tensor:
    """scale of every element, from the definition."""
    shared = {
        "per_tensor": x_RC.reshape(1, 1, -1),
        "per_group": x_RC.unflatten(1, (-1, spec.group_size or 1)),
    }.get(spec.granularity, x_RC[:, None])
    low, high = shared.amin(-1, keepdim=True).clamp(max=0), shared.amax(-1, keepdim=True).clamp(min=0)
    span = torch.maximum(high, -low) if spec.symmetric else high - low
    levels = 2 ** (spec.bits - 1) - 1 if spec.symmetric else 2**spec.bits - 1
    return (span / levels).expand_as(shared).reshape(x_RC.shape)


@pytest.mark.parametrize("spec", WEIGHTS + ACTS, ids=describe)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantization_is_idempotent(spec, bits, normal):
    spec = replace(spec, bits=bits)
    once = fake_quantize(normal(6, 48), spec)
    torch.testing.assert_close(fake_quantize(once, spec), once, rtol=1e-6, atol=0)
    if spec.dynamic:  # float64 all the way
        torch.testing.assert_close(fake_quantize(once, spec), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", WEIGHTS + ACTS, ids=describe)
@pytest.mark.parametrize("offset", [-3.0, 0.0, 0.3, 3.0])
def test_zero_is_represented_exactly(spec, offset, normal):
    x = normal(6, 48) + offset
    x[:, 5::GROUP] = 0
    assert torch.equal(fake_quantize(x, spec)[:, 5::GROUP], torch.zeros(6, 4, dtype=x.dtype))


@pytest.mark.parametrize("spec", WEIGHTS + ACTS, ids=describe)
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_a_group_on_one_side_of_zero_is_kept_within_one_step(spec, sign):
    """[5, 10] with the raw minimum as range end and a clamped zero_point would be off by 5."""
    x = sign * torch.linspace(5, 10, 48, dtype=torch.float64).repeat(4, 1)
    error = (fake_quantize(x, spec) - x).abs()
    assert bool((error <= step_size(x, spec)).all()), f"error {error.max():.2f}"


@pytest.mark.parametrize("spec", WEIGHTS + ACTS, ids=describe)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_error_is_half_a_step_inside_the_range_and_at_most_one_at_its_ends(spec, bits, normal):
    spec = replace(spec, bits=bits)
    x = normal(6, 48) + 0.4
    step = step_size(x, spec)
    error = (fake_quantize(x, spec) - x).abs() / step
    assert float(error.max()) <= (0.5 if spec.symmetric else 1.0) * (1 + 1e-4)
    assert float(error.flatten().quantile(0.9)) <= 0.5
    assert float(error.max()) > 0.4  # the step that we measure with is the one that was used


@pytest.mark.parametrize("spec", WEIGHTS + ACTS, ids=describe)
def test_the_largest_magnitude_is_an_end_of_the_range(spec, normal):
    """No level is wasted: in every row the extreme element keeps its value (sym) or is off by half a step (asym)."""
    x = normal(6, 48)
    error = (fake_quantize(x, spec) - x).abs()
    at_largest = error.flatten()[x.abs().argmax()]
    limit = 1e-6 if spec.symmetric else 0.5 * (1 + 1e-4)
    assert float(at_largest / step_size(x, spec).flatten()[x.abs().argmax()]) <= limit


@pytest.mark.parametrize("spec", WEIGHTS + ACTS, ids=describe)
def test_a_row_of_zeros_stays_zero_and_disturbs_no_other(spec, normal):
    x = normal(6, 48)
    x[2] = 0
    output = fake_quantize(x, spec)
    assert torch.equal(output[2], torch.zeros_like(output[2])) and bool(output.isfinite().all())
    assert float(output[3].abs().max()) > 0
    assert torch.equal(fake_quantize(torch.zeros_like(x), spec), torch.zeros_like(x))


def test_ranges_give_scale_and_zero_point_by_the_definition():
    low, high = torch.tensor([-1.0, 0.5, -4.0, 0.0]), torch.tensor([2.0, 3.0, -1.0, 0.0])
    scale, zero_point = affine_from_range(low, high, QuantSpec(4, "per_channel", symmetric=False))
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2, 4 / 15, 1.0]))
    assert zero_point.tolist() == [5, 0, 15, 0]
    scale, zero_point = affine_from_range(low, high, QuantSpec(4, "per_channel"))
    torch.testing.assert_close(scale, torch.tensor([2 / 7, 3 / 7, 4 / 7, 1.0]))
    assert zero_point is None


@pytest.mark.parametrize("spec", WEIGHTS + ACTS, ids=describe)
@pytest.mark.parametrize("power", [-20, 20, 60])
def test_codes_do_not_depend_on_the_unit(spec, power, normal):
    """Times a power of two nothing is rounded: massive activations and tiny weights have the codes that others have."""
    x = normal(6, 48).float()
    expected = fake_quantize(x, spec) * 2.0**power
    assert torch.equal(fake_quantize(x * 2.0**power, spec), expected)


@pytest.mark.parametrize("spec", WEIGHTS, ids=describe)
@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_codes_fill_their_range_and_fit_one_byte(spec, bits, normal):
    spec = replace(spec, bits=bits)
    weight = quantize_weight(normal(6, 48), spec)
    assert weight.codes_OC.dtype == (torch.int8 if spec.symmetric else torch.uint8)
    codes = weight.codes_OC.long()
    assert int(codes.min()) >= spec.quant_min and int(codes.max()) <= spec.quant_max
    assert spec.quant_max in codes.abs()
    groups = 4 if spec.granularity == "per_group" else 1
    assert weight.scale_OG.shape == (6, groups)
    assert (weight.zero_point_OG is None) == spec.symmetric


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_weight_codes_are_those_of_a_plain_loop(symmetric, normal):
    weight = normal(5, 48) + 0.2
    found = quantize_weight(weight, QuantSpec(3, "per_group", symmetric, group_size=GROUP))
    for row in range(5):
        for group in range(4):
            values = [float(v) for v in weight[row, group * GROUP : (group + 1) * GROUP].float()]
            if symmetric:
                scale, zero, ends = max(abs(v) for v in values) / 3, 0, (-3, 3)
            else:
                low, high = min(0.0, *values), max(0.0, *values)
                scale = (high - low) / 7
                zero, ends = round(-low / scale), (0, 7)
            assert float(found.scale_OG[row, group]) == pytest.approx(scale, rel=1e-6)
            codes = found.codes_OC[row, group * GROUP : (group + 1) * GROUP].tolist()
            assert codes == [min(max(round(v / scale) + zero, ends[0]), ends[1]) for v in values]


@pytest.mark.parametrize("spec", [s for s in ACTS if s.granularity != "per_tensor"], ids=describe)
def test_a_token_does_not_depend_on_its_batch(spec, normal):
    x = normal(3, 5, 48).float() * torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    together = fake_quantize_activation(x, ActQuant(spec))
    for sample in range(3):
        for token in range(5):
            alone = fake_quantize_activation(x[sample : sample + 1, token : token + 1], ActQuant(spec))
            assert torch.equal(alone[0, 0], together[sample, token])


def test_one_dynamic_scale_per_tensor_is_that_of_a_sample_and_not_of_the_batch(normal):
    x = normal(3, 5, 48) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1)
    quant = ActQuant(QuantSpec(8, "per_tensor", dynamic=True))
    together = fake_quantize_activation(x, quant)
    for sample in range(3):
        assert torch.equal(together[sample : sample + 1], fake_quantize_activation(x[sample : sample + 1], quant))
        scale = float(x[sample].abs().max()) / 127
        torch.testing.assert_close(together[sample], (x[sample] / scale).round() * scale)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_one_group_as_wide_as_the_layer_is_one_scale_per_row(symmetric, normal):
    x = normal(6, 48) + 0.2
    per_channel = quantize_weight(x, QuantSpec(4, "per_channel", symmetric))
    per_group = quantize_weight(x, QuantSpec(4, "per_group", symmetric, group_size=48))
    assert torch.equal(per_channel.codes_OC, per_group.codes_OC)
    assert torch.equal(per_channel.scale_OG, per_group.scale_OG)
    per_token = fake_quantize(x, QuantSpec(4, "per_token", symmetric, dynamic=True))
    assert torch.equal(per_token, fake_quantize(x, QuantSpec(4, "per_group", symmetric, dynamic=True, group_size=48)))


def test_smaller_groups_lose_less_on_an_outlier_channel(normal):
    x = normal(6, 48)
    x[:, 7] *= 50
    errors = [
        float((fake_quantize(x, QuantSpec(4, "per_group", dynamic=True, group_size=size)) - x).norm())
        for size in (48, 24, 12)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("side", ["weight", "act"])
def test_a_group_size_that_does_not_divide_a_layer_is_refused_with_its_name(side, small_target):
    grouped = QuantSpec(4, "per_group", dynamic=side == "act", group_size=36)
    bits = Bits(grouped, None) if side == "weight" else Bits(None, grouped)
    with pytest.raises(UserError) as error:
        nearest(small_target, bits, {})
    message = str(error.value)
    assert message.startswith(f"{small_target.layers[0]}: group_size 36 does not divide C=48")
    assert "16, 24, 48" in message


def test_weights_per_token_are_refused(normal):
    with pytest.raises(ValueError, match="per_token"):
        quantize_weight(normal(4, 8), QuantSpec(4, "per_token"))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_the_searched_range_is_the_best_of_the_three_percentiles(symmetric, normal):
    """Against a loop over the percentiles, on a heavy-tailed row where they differ."""
    values = (normal(20_000) ** 3).float()
    spec = QuantSpec(4, "per_tensor", symmetric)
    errors = {}
    for percentile in MSE_PERCENTILES:
        low, high = (float(torch.quantile(values.double(), p)) for p in (1 - percentile, percentile))
        scale, zero_point = affine_from_range(torch.tensor(low), torch.tensor(high), spec)
        zero = 0.0 if zero_point is None else zero_point
        codes = (torch.round(values / scale) + zero).clamp(spec.quant_min, spec.quant_max)
        errors[low, high] = float(((codes - zero) * scale - values).double().square().sum())
    assert len(errors) == 3
    best = min(errors, key=errors.__getitem__)
    assert tuple(float(end) for end in mse_percentile_range(values, spec)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("spec", WEIGHTS, ids=describe)
@pytest.mark.parametrize("bits", [3, 8])
def test_searched_ranges_are_no_worse_than_min_max_on_rows_of_a_dits_width(spec, bits, normal):
    """But for what the widest percentile cuts off: the releases do not try the whole range, and at 8 bits that can be seen."""
    weight = normal(6, 4608).float()
    weight[1] = weight[1] ** 5
    weight[2, 0] = 40.0
    spec = replace(spec, bits=bits)
    squared = {
        ranges: (quantize_weight(weight, spec, ranges=ranges).dequantize() - weight).square().sum(1)
        for ranges in ("minmax", "mse")
    }
    if spec.granularity == "per_tensor":
        squared = {ranges: error.sum() for ranges, error in squared.items()}
    assert bool((squared["mse"] <= squared["minmax"] * (1.0 if bits == 3 else 1.3)).all())


def test_searched_ranges_gain_when_few_values_stand_far_out(normal):
    weight = normal(4, 4608).float()
    weight[:, 7] = 8.0
    spec = QuantSpec(4, "per_channel")
    mse, minmax = (
        (quantize_weight(weight, spec, ranges=ranges).dequantize() - weight).square().sum(1)
        for ranges in ("mse", "minmax")
    )
    assert bool((mse < 0.5 * minmax).all())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_static_quantizer_takes_the_range_of_its_step_and_clips_to_it(symmetric):
    low = StepTable(torch.tensor([-1.0, -10.0]), torch.tensor([0, 0, 1]))
    high = StepTable(torch.tensor([3.0, 5.0]), torch.tensor([0, 0, 1]))
    quant = static_quant(low, high, QuantSpec(8, "per_tensor", symmetric))
    x = torch.tensor([-100.0, 0.0, 100.0])
    ends = {
        0: (-3.0 if symmetric else -1.0, 3.0),
        1: (-3.0 if symmetric else -1.0, 3.0),
        2: (-10.0, 10.0 if symmetric else 5.0),
    }
    for step, (lowest, highest) in ends.items():
        output = fake_quantize_activation(x, quant, torch.tensor(step))
        torch.testing.assert_close(output, torch.tensor([lowest, 0.0, highest]), atol=highest / 255, rtol=0)
        assert float(output[1]) == 0


def test_a_static_scale_does_not_follow_the_input(normal):
    quant = static_quant(StepTable(torch.tensor([-1.0])), StepTable(torch.tensor([1.0])), QuantSpec(4, "per_tensor"))
    x = normal(4, 48).float() * 0.01
    assert torch.equal(fake_quantize_activation(x, quant), torch.zeros_like(x))


def test_nan_stays_nan_and_in_its_own_token(normal):
    x = normal(3, 48)
    x[1, 4] = torch.nan
    output = fake_quantize(x, QuantSpec(8, "per_token", dynamic=True))
    assert bool(output[1].isnan().all())
    assert torch.equal(output[[0, 2]], fake_quantize(x[[0, 2]], QuantSpec(8, "per_token", dynamic=True)))


def test_half_precision_inputs_are_rounded_in_float32(normal):
    x = normal(3, 48).bfloat16()
    output = fake_quantize_activation(x, ActQuant(QuantSpec(8, "per_token", dynamic=True)))
    assert output.dtype == torch.float32
    assert torch.equal(output, fake_quantize_activation(x.float(), ActQuant(QuantSpec(8, "per_token", dynamic=True))))


def test_quantizing_leaves_its_input_alone(normal):
    x = normal(4, 48).float()
    before = x.clone()
    for spec in WEIGHTS:
        quantize_weight(x, spec, ranges="mse")
    for spec in ACTS:
        fake_quantize_activation(x, ActQuant(spec))
    assert torch.equal(x, before)


@pytest.mark.parametrize("share", [0.25, 0.21])
def test_shrunken_ranges_go_down_to_a_fifth(share):
    """Two bits know −s, 0 and s: a row of ±1 and one 1 / share does best at s = 1, that share of its range; 0.21 is the last of 80."""
    weight = torch.ones(1, 40_000)
    weight[:, ::2], weight[0, 0] = -1.0, 1 / share
    found = quantize_weight(weight, QuantSpec(2, "per_channel"), ranges="shrink")
    assert found.scale_OG.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("rows", [128, 1152])
def test_percentile_ranges_are_torchs_quantiles_and_do_something_on_narrow_rows(rows, normal):
    """As the releases of RepQ-ViT and PTQ4DiT have it; by nearest rank a row of 128 kept its extremes."""
    x = normal(6, rows).float() ** 3
    spec = QuantSpec(4, "per_channel", symmetric=False)
    found, plain = quantize_weight(x, spec, ranges="mse"), quantize_weight(x, spec)
    scales, errors = [], []
    for p in (0.999, 0.9999, 0.99999):
        low, high = (torch.quantile(x.double(), q, dim=1) for q in (1 - p, p))
        scale = (high - low) / 15
        zero = torch.round(-low / scale)
        rounded = (torch.clamp(torch.round(x / scale[:, None]) + zero[:, None], 0, 15) - zero[:, None]) * scale[:, None]
        scales.append(scale)
        errors.append((rounded - x).square().sum(1))
    best = torch.stack(errors).argmin(0)
    expected = torch.stack(scales)[best, torch.arange(6)]
    torch.testing.assert_close(found.scale_OG[:, 0].double(), expected, rtol=1e-4, atol=0)
    assert bool((found.scale_OG < plain.scale_OG).all())
    assert float((found.dequantize() - x).square().sum()) < float((plain.dequantize() - x).square().sum())


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_a_dynamic_range_reaches_to_both_ends_of_its_input(granularity, clip, normal):
    """Far from zero, small and large: neither end is held anywhere but at zero."""
    for factor in (1e-3, 1.0, 300.0):
        x = factor * normal(2, 48).float()
        low, high = (x.amin(-1), x.amax(-1))
        spec = QuantSpec(8, granularity, symmetric=False, dynamic=True)
        scale, _ = activation_affine(x, ActQuant(spec, clip=clip), None)
        torch.testing.assert_close(scale.flatten(), clip * (high - low) / 255)
