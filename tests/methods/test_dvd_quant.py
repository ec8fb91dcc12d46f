from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.calibration.salient import salient
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import STATIC, relative_error
from ditbench.harness.quant.hadamard import hadamard
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec, bits_of
from ditbench.harness.quant.uneven import ChannelScaledQuant
from ditbench.methods import dvd_quant
from ditbench.methods.dvd_quant import Params

LAYER = "transformer_blocks.1.ff.net.2"
PUBLISHED = Bits(QuantSpec(4, "per_channel", symmetric=False), QuantSpec(4, "per_token", dynamic=True))


def recipe_of(target, calibration, bits=PUBLISHED, params=Params()):
    return dvd_quant.apply(target, dvd_quant.fit(target, calibration, bits, params), bits, params)


def refined_by_hand(row: torch.Tensor, levels: int, bounds: list[float], rounds: int) -> torch.Tensor:
    """One row, number by number: the start among all pairs of ends, then Δ, z and codes in turn while the error falls."""

    def codes_of(scale: float, zero: float) -> torch.Tensor:
        return ((row / scale).round() + zero).clamp(0, levels)

    def value(scale: float, zero: float, codes: torch.Tensor) -> torch.Tensor:
        return scale * (codes - zero)

    def error(*grid) -> float:
        return float((value(*grid) - row).square().sum())

    best = None
    for of_low, of_high in product(bounds, bounds):
        low, high = of_low * float(row.min()), of_high * float(row.max())
        scale = float(torch.tensor((high - low) / levels).float())
        zero = round(-low / ((high - low) / levels))
        grid = scale, zero, codes_of(scale, zero)
        if best is None or error(*grid) < (1 - 1e-9) * error(*best):
            best = grid
    for _ in range(rounds):
        scale, zero, codes = best
        centred = codes - zero
        scale = float((centred @ row / (centred @ centred)).float())
        zero = min(max(round(float((codes - row / scale).mean())), 0), levels)
        grid = scale, zero, codes_of(scale, zero)
        if error(*grid) >= error(*best):
            break
        best = grid
    return value(*best)


def test_a_row_is_refined_as_the_equations_say(normal):
    """Away from the defaults; one row with an outlier, one that is one-sided."""
    weight = normal(5, 40)
    weight[1, 3] = 9.0
    weight[2] = weight[2].abs()
    params = Params(bounds=4, least_bound=0.4, iterations=7)
    found = dvd_quant.refined(weight, QuantSpec(3, "per_channel", symmetric=False), params).dequantize().double()
    for row, ours in zip(weight, found, strict=True):
        expected = refined_by_hand(row, 7, [1.0, 0.8, 0.6, 0.4], 7)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_computes_q_of_x_h_over_lambda_times_lambda_times_the_weight(small_target, small_calibration, normal):
    """ARQ in float64, sample by sample: Y = Q₄(X H Λ⁻¹) Λ Ŵᵀ + b."""
    recipe = recipe_of(small_target, small_calibration, params=Params(signs="none"))
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[LAYER]
    factors = layer.transform.rotations[0]
    rotation = torch.kron(hadamard(len(factors.left_aa)), hadamard(len(factors.right_bb))) / 192**0.5
    x, linear = normal(2, 7, 192), small_target.module(LAYER)
    weight = dvd_quant.refined(linear.weight.double() @ rotation, PUBLISHED.weight, Params()).dequantize().double()
    expected = []
    for sample in x:
        turned = sample @ rotation
        scale = torch.stack([turned[:, channel].abs().max() for channel in range(192)])
        tokens = []
        for token in turned / scale:
            step = token.abs().max() / 7
            tokens.append((token / step).round().clamp(-7, 7) * step * scale)
        expected.append(torch.stack(tokens) @ weight.T + linear.bias.double())
    assert relative_error(layer(x), torch.stack(expected)) < 1e-5


def test_signs_are_drawn_with_the_seed_and_turn_columns_of_h(small_target):
    plain, drawn, again, other = (
        dvd_quant.rotations(small_target, Params(signs=signs, seed=seed))[LAYER].rotations[0]
        for signs, seed in (("none", 0), ("random", 0), ("random", 0), ("random", 1))
    )
    assert plain.signs_C is None and set(drawn.signs_C.tolist()) == {-1, 1}
    assert torch.equal(drawn.signs_C, again.signs_C) and not torch.equal(drawn.signs_C, other.signs_C)
    x = torch.eye(192, dtype=torch.float64)
    torch.testing.assert_close(drawn(x), drawn.signs_C[:, None] * plain(x))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, "per_channel", symmetric=False),
        QuantSpec(4, "per_channel"),
        QuantSpec(3, "per_group", group_size=24),
        QuantSpec(4, "per_tensor", symmetric=False),
    ],
    ids=lambda spec: f"{spec.granularity} {spec.bits} {spec.symmetric}",
)
def test_refinement_errs_less_than_its_start_and_that_less_than_minmax(spec, normal):
    weight = normal(16, 48)
    errors = [
        float((each.dequantize().double() - weight).square().sum())
        for each in (
            dvd_quant.refined(weight, spec, Params()),
            dvd_quant.refined(weight, spec, Params(iterations=0)),
            quantize_weight(weight, spec),
        )
    ]
    assert errors[0] < errors[1] < errors[2], errors
    found = dvd_quant.refined(weight, spec, Params())
    assert found.scale_OG.shape == quantize_weight(weight, spec).scale_OG.shape and found.spec == spec
    assert int(found.codes_OC.min()) >= spec.quant_min and int(found.codes_OC.max()) <= spec.quant_max


def test_an_empty_row_is_borne():
    found = dvd_quant.refined(torch.zeros(2, 8), PUBLISHED.weight, Params())
    assert not found.dequantize().any() and bool((found.scale_OG > 0).all())


@pytest.mark.parametrize(("params", "kind", "channels"), [({}, ChannelScaledQuant, 1), ({"channels": 16}, ChannelScaledQuant, 16), ({"channels": 0}, ActQuant, None)])  # fmt: skip
def test_channels_share_a_factor_or_have_none(params, kind, channels, small_target, small_calibration):
    act = recipe_of(small_target, small_calibration, params=Params(**params)).layers[LAYER].act
    assert type(act) is kind and getattr(act, "channels", None) == channels


def test_static_activations_have_no_factor_and_other_grids_no_refinement(small_target, small_calibration):
    static = recipe_of(small_target, small_calibration, STATIC).layers[LAYER]
    assert type(static.act) is ActQuant and static.act.scale is not None
    nvfp4 = bits_of("nvfp4")
    blocks = recipe_of(small_target, small_calibration, nvfp4).layers[LAYER]
    assert isinstance(blocks.act, ChannelScaledQuant) and blocks.weight.spec == nvfp4.weight


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "fp8"])
def test_floats_have_no_wider_grid_to_switch_to(small_target, small_calibration, label):
    with pytest.raises(UserError, match=f"activations of {label.upper()} have no wider grid.*set method.delta=null"):
        dvd_quant.fit(small_target, small_calibration, bits_of(label), Params(delta=0.1))


def test_steps_switch_when_the_change_since_the_last_switch_comes_to_delta():
    """F grows by 10, 10, 50, 10, 10 … percent; a step knows the outputs before it."""
    outputs, growth = [torch.tensor([1.0, -3.0])], [0.1, 0.1, 0.5, 0.1, 0.1, 0.1]
    for share in growth:
        outputs.append(outputs[-1] * (1 + share))
    assert dvd_quant.switching(outputs, 0.19) == [False, False, False, True, True, False, True]
    assert not any(dvd_quant.switching(outputs, 5.0))


def test_chosen_steps_have_8_bit_activations_and_the_same_weights(small_target, small_calibration):
    params = Params(delta=1e-6)  # every step but the first two
    recipe = recipe_of(small_target, small_calibration, params=params)
    assert recipe.num_steps == small_calibration.num_steps and recipe.starts == (0, 2)
    first, second = recipe.variants[LAYER]
    assert (first.act.spec.bits, second.act.spec.bits) == (4, 8) and first.weight is second.weight
    model = build(small_target, recipe, dtype=torch.float32)
    errors = []
    exact = build(small_target, recipe.without_rounding(), dtype=torch.float32)
    for step in (0, 3):
        rows = small_calibration.rows(step, 2)
        outputs = [small_calibration.call(each, step, rows).sample for each in (model, exact)]
        errors.append(relative_error(*outputs))
    assert errors[1] < errors[0]
    assert not recipe_of(small_target, small_calibration, bits_of("w4a8"), params).variants
    blocks = recipe_of(small_target, small_calibration, bits_of("int4_g64"), params).variants[LAYER]
    assert [(each.act.spec.bits, each.act.spec.group_size) for each in blocks] == [(4, 64), (8, 64)]


def test_static_activations_of_chosen_steps_have_the_scales_of_8_bits(small_target, small_calibration):
    """Of one range: 4 bits make 14 steps of it (symmetric), 8 bits 254."""
    bits = replace(STATIC, act=replace(STATIC.act, bits=4, symmetric=True))
    first, second = recipe_of(small_target, small_calibration, bits, Params(delta=1e-6)).variants[LAYER]
    assert (first.act.spec.bits, second.act.spec.bits) == (4, 8)
    torch.testing.assert_close(7 * first.act.scale.rows, 127 * second.act.scale.rows)


def test_switching_compares_the_steps_of_the_same_samples(small_target, small_calibration):
    with pytest.raises(UserError, match="method.delta compares the steps of the same samples"):
        dvd_quant.fit(small_target, salient(small_calibration, 3), PUBLISHED, Params(delta=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": -1}, "channels and iterations must be at least 0"),
        ({"bounds": 0}, "bounds at least 1"),
        ({"least_bound": 0.0}, r"least_bound must be in \(0, 1\]"),
        ({"delta": 0.0}, "delta must be positive, or null"),
        ({"signs": "all"}, "signs must be random or none, got 'all'"),
    ],
)
def test_params_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Params(**options)
