"""NVFP4, MXFP4/6/8, FP8 in blocks, INT4 in groups: against a slow reference written from their definitions, value by value."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from ditbench.harness.backends import simulate
from ditbench.harness.backends.base import choose
from ditbench.harness.backends.matrix import example_recipe
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import relative_error
from ditbench.harness.fitting.rounding import nearest
from ditbench.harness.quant.accounting import account, stored_bytes
from ditbench.harness.quant.block_scales import stored, to_grid, values
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.serialize import decode, encode
from ditbench.harness.quant.spec import GRIDS, NAMED, Bits, QuantSpec, bits_of
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Site, Target

# (bits of the exponent, bits of the mantissa, bias, patterns at the top that are no number)
DEFINED = {
    "e2m1": (2, 1, 1, 0),
    "e2m3": (2, 3, 1, 0),
    "e3m2": (3, 2, 3, 0),
    "e4m3": (4, 3, 7, 1),
    "e5m2": (5, 2, 15, 4),
}
BLOCKS = [name for name in NAMED if name != "fp8"]
E4M3_LEAST = 2.0**-9


def positive(number: str) -> list[float]:
    """From 0 up, in the order of the bits: of two neighbours the one at an even place has an even last bit."""
    exponent, mantissa, bias, lacking = DEFINED[number]
    found = []
    for power in range(2**exponent):
        for step in range(2**mantissa):
            fraction = step / 2**mantissa
            found.append(fraction * 2.0 ** (1 - bias) if power == 0 else (1 + fraction) * 2.0 ** (power - bias))
    return found[: len(found) - lacking]


def rounded(x: float, grid: list[float]) -> float:
    """The nearest of the grid, of two the one at an even place, by exact fractions."""
    sign, size = math.copysign(1, x), Fraction(abs(x))
    distances = [abs(Fraction(value) - size) for value in grid]
    least = min(distances)
    places = [place for place, distance in enumerate(distances) if distance == least]
    return sign * grid[places[0] if len(places) == 1 else next(place for place in places if place % 2 == 0)]


def float32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float())


def power_of_two(largest: float, grid: list[float], rule: str, mantissa: int) -> float:
    """By comparing with one power after the other."""
    if largest == 0:
        return 2.0**-127
    most = max(power for power in range(-20, 20) if 2.0**power <= grid[-1])
    below = max(power for power in range(-150, 128) if Fraction(2) ** power <= Fraction(largest))
    if rule == "floor":
        power = below - most
    elif rule == "ceil":
        power = below - most + (Fraction(largest) != Fraction(2) ** below)
    elif rule == "even":  # as if the mantissa were rounded to the grid's, a half upwards
        digits = round_half_up(Fraction(largest) / Fraction(2) ** below * 2**mantissa)
        power = below - most + (digits == 2 ** (mantissa + 1))
    else:
        wanted = Fraction(float32(float32(largest) / grid[-1]))
        power = min(power for power in range(-150, 128) if Fraction(2) ** power >= wanted)
    return 2.0 ** max(power, -127)


def round_half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def reference(x: Tensor, spec: QuantSpec) -> Tensor:
    """(R, C) rounded and back, one block after the other, in float64 but for what is kept in fewer bits."""
    integers = spec.number == "int"
    grid = [float(n) for n in range(int(spec.quant_max) + 1)] if integers else positive(spec.number)
    result = torch.empty(x.shape, dtype=torch.float64)
    tensor = float32(float(x.abs().max()) / (448 * 6)) if float(x.abs().max()) else 1.0
    for row in range(0, len(x), spec.block_rows):
        for column in range(0, x.shape[1], spec.group_size):
            place = slice(row, row + spec.block_rows), slice(column, column + spec.group_size)
            largest = float(x[place].abs().max())
            scale = float32(largest / grid[-1])
            if spec.scale == "e8m0":
                scale = power_of_two(largest, grid, spec.rule, 0 if integers else DEFINED[spec.number][1])
            elif spec.scale == "bfloat16":
                scale = float(torch.tensor(scale).bfloat16())
            elif spec.scale == "e4m3":
                scale = float32(tensor * rounded(min(float32(scale / tensor), 448.0), positive("e4m3")))
            for i, j in (
                (i, j) for i in range(*place[0].indices(len(x))) for j in range(*place[1].indices(x.shape[1]))
            ):
                value = float32(float(x[i, j]) / scale) if scale else 0.0
                result[i, j] = rounded(max(-grid[-1], min(grid[-1], value)), grid) * scale
    return result


def ugly(width: int) -> Tensor:
    """Zero blocks, one outlier, values below the grid's normal numbers, powers of two, ties."""
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(width))
    x[0] = 0
    x[1, :20] = 0
    x[2, 3] = 900.0
    x[3] *= torch.exp2(torch.arange(width) % 17 - 12.0)
    x[4] = torch.exp2(torch.arange(width) % 9 - 4.0)
    x[5] = (torch.arange(width) % 25 - 12) / 4.0
    return x


def specs() -> list[QuantSpec]:
    found = [bits_of(name).weight for name in BLOCKS]
    found += [
        replace(bits_of(name).weight, rule=rule) for name in ("mxfp4", "mxfp8") for rule in ("floor", "ceil", "even")
    ]
    found += [
        replace(bits_of("mxfp6").weight, number="e2m3"),
        replace(bits_of("mxfp8").weight, number="e5m2", rule="even"),
    ]
    return [*found, replace(bits_of("fp8_block").weight, block_rows=4, group_size=24)]


@pytest.mark.parametrize("number", DEFINED)
def test_each_grid_has_the_values_of_its_definition_in_the_order_of_their_bits(number):
    grid = torch.tensor(positive(number))
    spec = QuantSpec(GRIDS[number].bits, "per_block", group_size=16, number=number)
    assert float(grid[-1]) == spec.quant_max
    both = torch.cat([grid, -grid[1:]])
    assert torch.equal(to_grid(both, number), both) and torch.equal(values(stored(both, spec), spec), both)
    if spec.code_dtype == torch.uint8:
        assert stored(grid, spec).tolist() == list(range(len(grid))), "a code is the pattern of its bits"
        assert stored(-grid[1:], spec).tolist() == [2 ** (spec.bits - 1) + place for place in range(1, len(grid))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", DEFINED)
def test_a_number_goes_to_the_nearest_of_its_grid_and_a_tie_to_the_even_one(number, dtype, normal):
    grid = positive(number)
    middles = [(a + b) / 2 for a, b in zip(grid, grid[1:], strict=False)]
    x = torch.cat([normal(200) * normal(200, seed=1).exp(), torch.tensor(middles), -torch.tensor(middles)]).to(dtype)
    assert to_grid(x, number).tolist() == [rounded(max(-grid[-1], min(grid[-1], float(each))), grid) for each in x]


@pytest.mark.parametrize("width", [128, 200])
@pytest.mark.parametrize(
    "spec", specs(), ids=lambda spec: f"{spec.name}-{spec.number}-{spec.scale_rule}-{spec.block_rows}"
)
def test_a_weight_is_what_its_definition_says(spec, width):
    """Widths that are no multiple of a block as well: the last block is shorter."""
    x = ugly(width)
    for values_RC in (x, x.bfloat16().float()):
        found = quantize_weight(values_RC, spec)
        assert found.codes_OC.shape == x.shape and found.codes_OC.dtype == spec.code_dtype
        expected = reference(values_RC, spec)
        assert torch.equal(found.dequantize(), expected.float()), f"{(found.dequantize() != expected).sum()} differ"


@pytest.mark.parametrize("width", [128, 200])
@pytest.mark.parametrize("name", BLOCKS)
def test_activations_are_rounded_as_weights_are_and_each_sample_for_itself(name, width):
    """The second level is of one sample, so that no sample depends on what else is in the batch."""
    weight, act = (replace(side, block_rows=1) for side in (bits_of(name).weight, bits_of(name).act))
    x = torch.stack([ugly(width), 100 * ugly(width).flip(1)])
    found = fake_quantize_activation(x, ActQuant(act))
    assert torch.equal(found, torch.stack([quantize_weight(each, weight).dequantize() for each in x]))


def test_scales_of_mx_round_as_their_rule_says():
    """max = 7 by e2m1: 4 · 2⁰ … 8 · 2⁰; and one that is a power of two already, where all but rceil agree on its own."""
    spec = bits_of("mxfp4").weight
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 0] = 7.0, 4.0
    found = {
        rule: quantize_weight(x, replace(spec, rule=rule)).scale_OG.float().flatten().tolist()
        for rule in ("floor", "ceil", "even", "rceil")
    }
    assert found == {"floor": [1, 1], "ceil": [2, 1], "even": [2, 1], "rceil": [2, 1]}
    assert quantize_weight(x, spec).scale_OG.dtype == torch.float8_e8m0fnu and spec.rule == "rceil"


@pytest.mark.parametrize("rule", ["rceil", "floor", "ceil", "even"])
def test_a_block_without_end_has_the_largest_power_and_nan_stays_nan(rule):
    act = ActQuant(replace(bits_of("mxfp8").act, rule=rule))
    x = torch.ones(3, 64)
    x[0, 3], x[1, 40] = torch.inf, torch.nan
    found = fake_quantize_activation(x, act)
    assert float(found[0, 3]) > 1e38 and bool(found[1, 32:].isnan().all())
    assert (
        torch.equal(found[0, 32:], x[0, 32:]) and torch.equal(found[1, :32], x[1, :32]) and torch.equal(found[2], x[2])
    )


def test_the_second_level_lets_the_largest_block_have_the_largest_scale(normal):
    x = normal(4, 64).float()
    x[2, 17] = 50.0
    found = quantize_weight(x, bits_of("nvfp4").weight)
    assert found.scale_OG.dtype == torch.float8_e4m3fn and float(found.scale_OG.float().max()) == 448
    assert float(found.tensor_scale) == pytest.approx(50 / (448 * 6)) and float(
        found.dequantize()[2, 17]
    ) == pytest.approx(50)


def test_a_reciprocal_rule_keeps_scales_in_the_normal_numbers_of_e4m3(normal):
    x = normal(2, 32).float()
    x[:, 16:] *= 1e-6
    divided, reciprocal = (
        quantize_weight(x, replace(bits_of("nvfp4").weight, rule=rule)).scale_OG.float()
        for rule in ("divide", "reciprocal")
    )
    assert float(divided.min()) == 0 and float(reciprocal.min()) == 2.0**-6


def test_four_over_six_takes_of_both_ends_the_one_that_errs_less(normal):
    x = normal(8, 160).float()
    plain = bits_of("nvfp4").weight
    chosen = quantize_weight(x, replace(plain, four_over_six=True))
    tensor = x.abs().max() / (256 * 6)
    assert torch.equal(chosen.tensor_scale, tensor)
    errors = []
    for end in (6, 4):
        scale = (x.unflatten(1, (-1, 16)).abs().amax(-1) / end / tensor).to(torch.float8_e4m3fn).float() * tensor
        wide = scale.repeat_interleave(16, 1)
        grid = positive("e2m1")
        back = torch.tensor([[rounded(max(-6, min(6, float(v))), grid) for v in row] for row in x / wide]) * wide
        errors.append((back - x).square().unflatten(1, (-1, 16)).sum(-1))
    ours = (chosen.dequantize() - x).square().unflatten(1, (-1, 16)).sum(-1)
    torch.testing.assert_close(ours, torch.minimum(*errors))
    assert 0.2 < float((errors[1] < errors[0]).float().mean()) < 0.8, "both ends are chosen"
    assert ours.sum() < (quantize_weight(x, plain).dequantize() - x).square().sum()


@pytest.mark.parametrize("width", [96, 200])
@pytest.mark.parametrize(
    "label", [*BLOCKS, "wnvfp4_afp8", "wmxfp4_amxfp8", "wint4_g64_afp8_block", "wfp8_block_a8", "w4_anvfp4"]
)
def test_a_layer_is_the_product_of_what_both_sides_are_rounded_to(label, width, normal):
    bits = bits_of(label)
    x, weight_OC = normal(2, 5, width).float(), normal(7, width, seed=1).float()
    recipe = LayerRecipe(weight=quantize_weight(weight_OC, bits.weight), act=ActQuant(bits.act))
    kernel = simulate.make_kernel(recipe, weight_OC)
    expected = fake_quantize_activation(x.double(), recipe.act) @ recipe.weight.dequantize().double().T
    assert relative_error(kernel(x, None), expected) < 1e-6
    again = kernel.quantized_weight()
    assert torch.equal(again.dequantize(), recipe.weight.dequantize())
    stored_here = sum(tensor.numel() * tensor.itemsize for tensor in kernel.state_dict().values())
    assert stored_bytes(recipe, folded=False) == stored_here


def test_weights_alone_and_activations_alone_run_too(normal):
    x, weight_OC = normal(3, 40).float(), normal(6, 40, seed=1).float()
    for label in ("wnvfp4_a16", "w16_amxfp8"):
        bits = bits_of(label)
        weight = None if bits.weight is None else quantize_weight(weight_OC, bits.weight)
        act = None if bits.act is None else ActQuant(bits.act)
        expected = (x if act is None else fake_quantize_activation(x, act)) @ (
            weight_OC if weight is None else weight.dequantize()
        ).T
        found = simulate.make_kernel(LayerRecipe(weight=weight, act=act), weight_OC)(x, None)
        assert relative_error(found, expected) < 1e-6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 384, bias=False)


@pytest.mark.parametrize(
    ("label", "bits", "act_bits"),
    [
        ("nvfp4", 4 + 8 / 16 + 32 / (256 * 384), 4 + 8 / 16),  # codes, an e4m3 for 16, a float32 for all
        ("mxfp8", 8 + 8 / 32, 8 + 8 / 32),
        ("int4_g64", 4 + 16 / 64, 4 + 16 / 64),
        ("fp8_block", 8 + 32 / (128 * 128), 8 + 32 / 128),
        ("wmxfp4_amxfp8", 4 + 8 / 32, 8 + 8 / 32),
    ],
)
def test_effective_bits_count_scales_at_both_levels(label, bits, act_bits):
    target = Target(Layer().requires_grad_(False), ("layer",), (Site("layer", ("layer",)),))
    recipe = nearest(target, bits_of(label), {})
    told, size = account(target, recipe, {"layer": 256 * 384, "": 256 * 384}, bits_of(label).label)
    assert told["weight_bits_effective"] == pytest.approx(bits, abs=0)
    assert told["act_bits_effective"] == act_bits and told["label"] == label.upper()
    assert size["model_bytes"] == bits * 256 * 384 / 8


@pytest.mark.parametrize("label", BLOCKS)
def test_gptq_keeps_the_output_better_than_rounding_to_nearest_on_every_grid(label, normal):
    spec = replace(bits_of(label).weight, group_size=16, block_rows=1)
    x, weight_OC = normal(300, 72) @ normal(72, 72, seed=2), normal(9, 72, seed=1)
    for settings in ({}, {"act_order": True}):
        solved = gptq(weight_OC, x.T @ x, spec, block=24, **settings)
        plain = quantize_weight(weight_OC, spec)
        assert solved.codes_OC.dtype == plain.codes_OC.dtype and solved.scale_OG.dtype == plain.scale_OG.dtype
        errors = [relative_error(x @ each.dequantize().double().T, x @ weight_OC.T) for each in (solved, plain)]
        assert 0 < errors[0] < 0.95 * errors[1]


def test_gptq_without_correlations_rounds_to_nearest(normal):
    weight_OC = normal(9, 72)
    for label in ("nvfp4", "mxfp4", "int4_g64", "fp8_block"):
        spec = bits_of(label).weight
        solved, plain = gptq(weight_OC, torch.eye(72), spec), quantize_weight(weight_OC, spec)
        assert torch.equal(solved.codes_OC.view(torch.uint8), plain.codes_OC.view(torch.uint8)), label
        assert torch.equal(solved.dequantize(), plain.dequantize())


@pytest.mark.parametrize("label", ["nvfp4", "int4_g64"])
def test_searched_ranges_err_less(label, normal):
    weight_OC, spec = normal(6, 200).float(), bits_of(label).weight
    errors = [
        (quantize_weight(weight_OC, spec, ranges=ranges).dequantize() - weight_OC).abs().pow(2.4).sum()
        for ranges in ("minmax", "shrink")
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("label", BLOCKS)
def test_a_recipe_comes_back_from_its_file(label, normal):
    bits = bits_of(label)
    recipe = LayerRecipe(weight=quantize_weight(normal(7, 72), bits.weight), act=ActQuant(bits.act))
    tensors: dict[str, Tensor] = {}
    again = decode(encode(recipe, "layer", tensors), tensors)
    assert again.weight.spec == bits.weight and again.act.spec == bits.act
    assert torch.equal(again.weight.dequantize(), recipe.weight.dequantize())


@pytest.mark.parametrize("label", [*BLOCKS, "wnvfp4_afp8", "wmxfp4_a16"])
def test_a_backend_that_does_not_know_a_format_leaves_it_to_simulate(label):
    assert choose(example_recipe(label), torch.device("cpu")).NAME == "simulate"
    with pytest.raises(UserError, match="in blocks|e2m1|e4m3|e3m2|is for quantized weights|needs weights"):
        choose(example_recipe(label), torch.device("cpu"), "vnni")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"symmetric": False}, "e2m1 has 4 bits and no zero point.*bits=nvfp4"),
        ({"bits": 8}, "e2m1 has 4 bits and no zero point; got 8"),
        ({"granularity": "per_channel", "group_size": None}, "goes with granularity per_block"),
        ({"scale": "fp8"}, "scale 'fp8' is none of float32, bfloat16, e8m0, e4m3"),
        ({"rule": "floor"}, "rule 'floor' of scale e4m3 is none of divide, reciprocal"),
        ({"scale": "float32"}, "rule 'divide' of scale float32 is of scales in e8m0 or e4m3"),
        ({"scale": "e8m0", "rule": None, "four_over_six": True}, "four_over_six is of bits=nvfp4"),
        ({"block_rows": 4}, "of floats in rows"),
        ({"block_rows": 0}, "block_rows must be at least 1"),
        ({"number": "int"}, "a scale in e4m3 is of floats"),
    ],
    ids=str,
)
def test_what_no_format_has_is_refused(changed, words):
    with pytest.raises(UserError, match=words):
        replace(bits_of("nvfp4").weight, **changed)


def test_blocks_of_activations_are_dynamic_and_of_one_token():
    for act in (replace(bits_of("mxfp8").act, dynamic=False), replace(bits_of("fp8_block").act, block_rows=128)):
        with pytest.raises(UserError, match="activations in blocks .* are dynamic"):
            Bits(None, act).check_sides()


def test_a_static_second_level_is_that_of_the_calibration_by_step_and_clips_what_lies_above(normal):
    bits = Bits(bits_of("nvfp4").weight, replace(bits_of("nvfp4").act, dynamic=False))
    bits.check_sides()
    table = StepTable(torch.tensor([2.0, 0.5]), torch.tensor([0, 1]))
    quant = static_quant(StepTable(-table.rows, table.group_of_step), table, bits.act)
    x = normal(2, 3, 40).float().clamp(-1.9, 1.9)
    x[0, 0, 0] = 2.0
    dynamic = fake_quantize_activation(x[:1], ActQuant(bits_of("nvfp4").act))
    assert torch.equal(fake_quantize_activation(x, quant, torch.tensor(0))[:1], dynamic), "the range that it was given"
    later = fake_quantize_activation(x, quant, torch.tensor(1))
    assert float(later.abs().max()) == 0.5 and float(x.abs().max()) == 2
    weight_OC = normal(6, 40, seed=1).float()
    recipe = LayerRecipe(weight=quantize_weight(weight_OC, bits.weight), act=quant)
    kernel = simulate.make_kernel(recipe, weight_OC)
    assert relative_error(kernel(x, torch.tensor(1)), later.double() @ recipe.weight.dequantize().double().T) < 1e-6
    assert stored_bytes(recipe, folded=False) == sum(
        each.numel() * (2 if each.dtype == torch.int64 else each.itemsize) for each in kernel.state_dict().values()
    )


def test_a_record_is_told_the_rule_of_its_scales():
    assert bits_of("mxfp8").weight.told == "e4m3 blocks of 1 × 32, scales in e8m0 (rceil)"
    told = replace(bits_of("nvfp4").weight, four_over_six=True).told
    assert told == "e2m1 blocks of 1 × 16, scales in e4m3 (divide) and one float32 of the tensor, four over six"
