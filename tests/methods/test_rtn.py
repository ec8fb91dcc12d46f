from __future__ import annotations

import pytest
import torch
from torch import nn

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.target import Site, Target
from ditbench.methods import rtn

FIRST = "transformer_blocks.1.attn1.to_k"


def round_half_to_even(value: float) -> int:
    return round(value)


def fake_quantized(
    values: list[float], bits: int, symmetric: bool, ends: tuple[float, float] | None = None
) -> list[float]:
    """The equations of the docstring, one value at a time in Python's float64."""
    low, high = ends or (min(values), max(values))
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale = max(-low, high) / (2 ** (bits - 1) - 1)
        zero, first, last = 0, -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    else:
        scale = (high - low) / (2**bits - 1)
        zero, first, last = -round_half_to_even(low / scale), 0, 2**bits - 1
    return [(min(max(round_half_to_even(v / scale) + zero, first), last) - zero) * scale for v in values]


@pytest.mark.parametrize("act_symmetric", [True, False], ids=["act sym", "act asym"])
@pytest.mark.parametrize("weight_symmetric", [True, False], ids=["weight sym", "weight asym"])
def test_a_layer_computes_what_plain_loops_compute(weight_symmetric, act_symmetric, small_target, normal):
    """W3A5: one scale per output channel, one per token."""
    bits = Bits(
        QuantSpec(3, "per_channel", weight_symmetric),
        QuantSpec(5, "per_token", act_symmetric, dynamic=True),
    )
    recipe = rtn.apply(small_target, rtn.fit(small_target, None, bits, rtn.Params()), bits, rtn.Params())
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[FIRST]
    x, linear = normal(3, 48) + 0.3, small_target.module(FIRST)
    rows = [fake_quantized(row, 3, weight_symmetric) for row in linear.weight.tolist()]
    expected = []
    for token in x.tolist():
        rounded = fake_quantized(token, 5, act_symmetric)
        products = [sum(a * b for a, b in zip(rounded, row, strict=True)) for row in rows]
        expected.append([y + b for y, b in zip(products, linear.bias.tolist(), strict=True)])
    torch.testing.assert_close(layer(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_static_activations_take_the_range_of_the_whole_calibration(small_target, small_calibration, normal):
    state = rtn.fit(small_target, small_calibration, STATIC, rtn.Params())
    recipe = rtn.apply(small_target, state, STATIC, rtn.Params())
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64, backend="simulate"))[FIRST]
    ends = extremes(small_target, small_calibration)
    x, linear = 3 * normal(3, 48), small_target.module(FIRST)  # beyond the range: clipped
    weight = torch.tensor([fake_quantized(row, 8, False) for row in linear.weight.tolist()], dtype=torch.float64)
    rounded = torch.tensor([fake_quantized(token, 8, False, ends) for token in x.tolist()], dtype=torch.float64)
    assert bool((rounded - x).abs().max() > 0.5)
    torch.testing.assert_close(layer(x), rounded @ weight.T + linear.bias.double(), rtol=1e-5, atol=1e-5)


def extremes(target, calibration) -> tuple[float, float]:
    """Smallest and largest value that the layer of the float model reads."""
    model, seen = float_copy(target, dtype=torch.float32), []
    model.get_submodule(FIRST).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
    with torch.no_grad():
        for inputs in calibration.per_step:
            model(**inputs)
    return float(torch.cat(seen).min()), float(torch.cat(seen).max())


def test_weight_ranges_are_the_extremes_however_far_out(normal):
    """1,200 wide, where a percentile would cut the outlier off."""
    linear = nn.Linear(1200, 3).requires_grad_(False)
    linear.weight.copy_(0.02 * normal(3, 1200))
    linear.weight[:, 7] = 0.2
    target = Target(nn.Sequential(linear), ("0",), (Site("0", ("0",)),))
    codes = rtn.apply(target, {}, DYNAMIC, rtn.Params()).layers["0"].weight
    expected = torch.tensor([fake_quantized(row, 4, True) for row in linear.weight.tolist()])
    torch.testing.assert_close(codes.dequantize(), expected)


def test_nothing_is_transformed_or_folded(small_target, small_calibration):
    recipe = rtn.apply(
        small_target, rtn.fit(small_target, small_calibration, DYNAMIC, rtn.Params()), DYNAMIC, rtn.Params()
    )
    assert set(recipe.layers) == set(small_target.layers)
    assert not recipe.folded and not recipe.attention and recipe.num_steps is None
    assert all(layer.transform.is_identity and layer.low_rank is None for layer in recipe.layers.values())
