"""FP8: codes are values of the e4m3 grid. Against the grid written out from its definition and the nearest of it in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends import simulate
from ditbench.harness.fitting.conformance import relative_error
from ditbench.harness.fitting.rounding import act_quant, nearest
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import (
    ActQuant,
    fake_quantize_activation,
    quantize_weight,
    static_quant,
    to_codes,
    to_e4m3,
)
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable

# 4 bits of exponent, bias 7; 3 of mantissa; the last pattern is NaN, so that the largest value is 1.75 · 2⁸.
POSITIVE = [m * 2.0**-9 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
GRID = torch.tensor([-value for value in POSITIVE[:0:-1]] + POSITIVE, dtype=torch.float64)
EVEN = torch.tensor([abs(place - 126) % 2 == 0 for place in range(253)])  # the last bit of the mantissa

WEIGHT = QuantSpec(8, "per_channel", number="e4m3")
TOKEN = QuantSpec(8, "per_token", dynamic=True, number="e4m3")


def nearest_of_the_grid(x: Tensor) -> Tensor:
    """One value after the other; of two at the same distance the even one."""
    found = []
    for value in x.double().flatten():
        distance = (GRID - value).abs()
        closest = distance == distance.min()
        found.append(GRID[closest & EVEN if closest.sum() > 1 else closest][0])
    return torch.stack(found).reshape(x.shape)


def test_the_grid_has_253_values_and_keeps_each_of_them():
    assert len(GRID) == len(GRID.unique()) == 253 and float(GRID.max()) == 448
    stored = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(stored[~stored.isnan()].unique(), GRID)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_e4m3(GRID.to(dtype)), GRID.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_goes_to_the_nearest_of_the_grid_and_a_tie_to_the_even_one(dtype, normal):
    middles = (GRID[1:] + GRID[:-1]) / 2
    x = torch.cat([normal(1000) * (3 * normal(1000, seed=1)).exp(), middles]).to(dtype)
    rounded = to_e4m3(x)
    assert rounded.dtype == dtype and torch.equal(rounded.double(), nearest_of_the_grid(x))
    assert torch.equal(rounded, x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype))  # torch's own cast


def test_float64_is_not_rounded_twice():
    """Just beside a tie, where float32 would put it on the tie."""
    off = 1e-12
    x = torch.tensor([1 + 1 / 16 + off, 1 + 3 / 16 - off, 2.0**-10 + 1e-15, -(1 + 1 / 16) - off], dtype=torch.float64)
    assert to_e4m3(x).tolist() == [1.125, 1.125, 2.0**-9, -1.125]


def test_what_lies_outside_is_an_end_and_nan_stays_nan():
    x = torch.tensor([449.0, 1e30, torch.inf, -torch.inf, -480.0, torch.nan, 0.0])
    for values in (x, x.double()):
        assert to_e4m3(values)[[0, 1, 2, 3, 4, 6]].tolist() == [448, 448, 448, -448, -448, 0]
        assert bool(to_e4m3(values)[5].isnan())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("ratios", [(1.0, 1.0), (0.5, 0.5)], ids=["whole", "clipped"])
def test_a_weight_is_codes_of_the_grid_times_its_largest_magnitude_over_448(granularity, ratios, normal):
    weight_OC = (normal(6, 48) * normal(6, 1, seed=1).exp()).float()
    weight_OC[2] = 0
    spec = QuantSpec(8, granularity, group_size=12 if granularity == "per_group" else None, number="e4m3")
    rounded = quantize_weight(weight_OC, spec, ratios=ratios)
    shared = {"per_tensor": (1, 1, -1), "per_channel": (6, 1, 48), "per_group": (6, 4, 12)}[granularity]
    scale = ratios[0] * weight_OC.reshape(shared).abs().amax(-1, keepdim=True) / 448
    scale = scale.masked_fill(scale == 0, 1)
    codes = nearest_of_the_grid((weight_OC.reshape(shared) / scale).clamp(-448, 448))
    assert rounded.codes_OC.dtype == torch.float8_e4m3fn and rounded.zero_point_OG is None
    assert torch.equal(rounded.codes_OC.double(), codes.reshape(6, 48))
    torch.testing.assert_close(
        rounded.dequantize().double(), (codes * scale.double()).reshape(6, 48), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_activations_are_rounded_by_token(clip, normal):
    x = normal(2, 5, 48) * normal(2, 5, 1, seed=1).exp()
    x[1, 2] = 0
    scale = clip * x.abs().amax(-1, keepdim=True) / 448
    scale[scale == 0] = 1
    expected = nearest_of_the_grid((x / scale).clamp(-448, 448)) * scale
    torch.testing.assert_close(fake_quantize_activation(x, ActQuant(TOKEN, clip=clip)), expected, rtol=1e-12, atol=0)


def test_static_activations_saturate_at_the_ends_of_their_range():
    spec = QuantSpec(8, "per_tensor", number="e4m3")
    quant = static_quant(StepTable.constant(torch.tensor(-2.0)), StepTable.constant(torch.tensor(1.0)), spec)
    x = torch.tensor([-9.0, -2.0, 0.0, 1.0, 5.0])
    assert fake_quantize_activation(x, quant).tolist() == [-2, -2, 0, 1, 2]


@pytest.mark.parametrize("act", [TOKEN, QuantSpec(8, "per_tensor", number="e4m3")], ids=["dynamic", "static"])
def test_a_layer_multiplies_codes_and_scales_the_sums(act, normal):
    x, weight_OC = normal(9, 48).float(), normal(7, 48, seed=1).float()
    state = {"layer/act_low": torch.tensor([-2.0]), "layer/act_high": torch.tensor([3.0])}
    quant = act_quant(act, state, "layer")
    scale_M1 = x.abs().amax(1, keepdim=True) / 448 if act.dynamic else torch.tensor(3.0) / 448
    scale_O = weight_OC.abs().amax(1) / 448
    codes_MC = nearest_of_the_grid((x / scale_M1).clamp(-448, 448))
    codes_OC = nearest_of_the_grid(weight_OC / scale_O[:, None])
    expected = codes_MC @ codes_OC.T * scale_O.double() * scale_M1.double()
    recipe = LayerRecipe(weight=quantize_weight(weight_OC, WEIGHT), act=quant)
    kernel = simulate.make_kernel(recipe, weight_OC)
    assert relative_error(kernel(x, None), expected) < 3e-7
    assert kernel.packed.dtype == torch.uint8 and kernel.packed.numel() == weight_OC.numel()
    assert torch.equal(kernel.quantized_weight().codes_OC.float(), recipe.weight.codes_OC.float())


def test_gptq_keeps_the_output_better_than_rounding_to_nearest(normal):
    x, weight_OC = normal(200, 48) @ normal(48, 48, seed=2), normal(7, 48, seed=1)
    solved = gptq(weight_OC, x.T @ x, WEIGHT)
    assert solved.codes_OC.dtype == torch.float8_e4m3fn
    solved_error, plain_error = (
        relative_error(x @ each.dequantize().double().T, x @ weight_OC.T)
        for each in (solved, quantize_weight(weight_OC, WEIGHT))
    )
    assert 0 < solved_error < 0.9 * plain_error


def test_searched_ranges_are_judged_on_the_grid(normal):
    weight_OC = normal(4, 600).float()
    plain, searched = (quantize_weight(weight_OC, WEIGHT, ranges=ranges) for ranges in ("minmax", "shrink"))
    errors = [(each.dequantize() - weight_OC).abs().pow(2.4).sum(1) for each in (plain, searched)]
    assert bool((errors[1] <= errors[0]).all()) and bool((errors[1] < errors[0]).any())


def test_attention_operands_are_e4m3_with_e4m3_activations(small_model):
    target = small_model.target(attention=True)
    bits = Bits(WEIGHT, TOKEN)
    for recipe in nearest(target, bits, {}).attention.values():
        for quant in vars(recipe).values():
            assert quant.spec == QuantSpec(8, "per_tensor", dynamic=True, number="e4m3")


def test_codes_of_nan_are_nan():
    codes = to_codes(torch.tensor([[torch.nan, 1.0]]), torch.ones(1, 1), None, TOKEN)
    assert bool(codes[0, 0].isnan()) and float(codes[0, 1]) == 1
