from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.calibration.channel_statistics import (
    channel_stats,
    inputs_observed,
    run_calibration,
    token_sample,
)
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, Case, relative_error, transforms_are_exact
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import (
    ActQuant,
    LookupWeight,
    QuantizedWeight,
    fake_quantize_activation,
    quantize_weight,
)
from ditbench.harness.quant.rotations import Dual, dual_rotation
from ditbench.harness.quant.smoothing import weight_absmax
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.tlq import Search, twin_log
from ditbench.harness.quant.transforms import Hadamard, Permutation, Transform
from ditbench.methods import lrq_dit, rtn
from ditbench.methods.lrq_dit import Params, takes_dual

W3A4 = DYNAMIC.with_widths(3, 4)
FAST = {"steps": 16, "tokens": 64}
LAYER, SITE = "transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_mid"  # nothing is folded into its producer


@pytest.fixture
def outlier_target(own_model):
    """A few channels of SITE far larger than the others, so that there is something to spread after smoothing."""
    own_model.transformer.get_submodule("transformer_blocks.1.ff.net.0.proj").weight.data[5:8] *= 1e4
    return own_model.target()


def recipe_of(target, calibration, bits=W3A4, **params):
    params = Params(**FAST | params)
    return lrq_dit.apply(target, lrq_dit.fit(target, calibration, bits, params), bits, params)


def kinds(recipe) -> dict[str, str]:
    """{layer: hadamard, dual or nothing}."""
    found = {}
    for name, layer in recipe.layers.items():
        types = [type(rotation).__name__ for rotation in layer.transform.rotations]
        found[name] = {1: "hadamard", 3: "dual", 0: ""}[len(types)]
    return found


def inputs_of(target, calibration, site):
    """Every input of a site by step, from the float model."""
    seen = []
    model = float_copy(target, dtype=torch.float32)
    with inputs_observed(model, {site.consumers[0]: site.name}, lambda _, step, x: seen.append(x)) as set_step:
        run_calibration(model, calibration, set_step, "test")
    return seen


@pytest.mark.parametrize("threshold", [0.0, 1e9], ids=["dual", "hadamard"])
def test_a_layer_is_smoothed_rotated_and_rounded_in_that_order(threshold, outlier_target, small_calibration, normal):
    """The whole layer away from the defaults, written out: y = Q₄((X m) R) · TLQ₃((W / m) R)ᵀ + b."""
    params, target = Params(alpha=0.3, threshold=threshold, block_size=40, seed=5, steps=9, tokens=30), outlier_target
    state = lrq_dit.fit(target, small_calibration, W3A4, params)
    layer = quant_layers(build(target, lrq_dit.apply(target, state, W3A4, params), dtype=torch.float64))[LAYER]
    linear = target.module(LAYER)
    weight = linear.weight.double()
    amax = channel_stats(target, small_calibration)[LAYER].absmax_C.double()
    m = weight.abs().amax(0) ** 0.3 / amax**0.7
    if threshold:
        rotation = Hadamard(192, state[f"{SITE}/signs"]).matrix()
    else:
        dual = Dual.from_state(SITE, state)
        assert len(dual.first_gg) == 32  # the largest divisor of 192 up to 40
        assert not any(torch.equal(part, torch.eye(32).double()) for part in (dual.first_gg, dual.second_gg))
        rotation = torch.block_diag(*[dual.first_gg] * 6)[:, dual.order_C] @ torch.block_diag(*[dual.second_gg] * 6)
    x = normal(5, 192)
    rounded_x = fake_quantize_activation((x * m) @ rotation, ActQuant(W3A4.act))
    rounded_weight = twin_log((weight / m) @ rotation, W3A4.weight).dequantize().double()
    expected = rounded_x @ rounded_weight.T + linear.bias.double()
    assert relative_error(layer(x), expected) < 1e-5


def test_the_energy_of_an_input_is_its_rms_over_all_steps(small_target, small_calibration):
    state = lrq_dit.fit(small_target, small_calibration, W3A4, Params(parts="smooth"))
    for site in (small_target.sites[0], small_target.site_of(LAYER)):
        pooled = torch.cat([x.double().flatten() for x in inputs_of(small_target, small_calibration, site)])
        assert float(state[f"{site.name}/rms"]) == pytest.approx(float(pooled.square().mean().sqrt()), rel=1e-5)


def test_the_energy_scales_with_the_input_and_does_not_see_rotations(small_target, small_calibration):
    stats = channel_stats(small_target, small_calibration)[LAYER]
    energy = float(lrq_dit.rms(stats))
    assert float(lrq_dit.rms(replace(stats, sumsq_SC=9 * stats.sumsq_SC))) == pytest.approx(3 * energy)
    total = stats.sumsq_SC.sum(1, keepdim=True)  # an orthogonal map may move the energy to other channels, no more
    moved = torch.cat([total, torch.zeros(len(total), stats.sumsq_SC.shape[1] - 1)], 1)
    assert float(lrq_dit.rms(replace(stats, sumsq_SC=moved))) == pytest.approx(energy)
    # energies of parts of the calibration combine by their counts: a chunked pass is one pass
    halves = [replace(stats, sumsq_SC=stats.sumsq_SC[s], count_S=stats.count_S[s]) for s in (slice(0, 1), slice(1, 4))]
    squares = [float(lrq_dit.rms(h)) ** 2 * float(h.count_S.sum()) for h in halves]
    assert math.sqrt(sum(squares) / float(stats.count_S.sum())) == pytest.approx(energy, rel=1e-5)


def test_the_boundary_of_the_energy_belongs_to_the_dual_rotation():
    one = torch.tensor(1.0)
    assert not takes_dual(one - 1e-6, Params())
    assert takes_dual(one, Params()) and takes_dual(one + 1e-6, Params())
    assert not takes_dual(one, Params(threshold=1.5))


def test_each_site_takes_the_rotation_of_its_energy(small_target, small_calibration):
    state = lrq_dit.fit(small_target, small_calibration, W3A4, Params(parts="smooth"))
    energies = {site.name: float(state[f"{site.name}/rms"]) for site in small_target.sites}
    threshold = sorted(energies.values())[4]
    taken = kinds(recipe_of(small_target, small_calibration, parts="rotate", threshold=threshold))
    for site in small_target.sites:
        expected = "hadamard" if energies[site.name] < threshold else "dual"
        assert {taken[name] for name in site.consumers} == {expected}
    assert set(taken.values()) == {"hadamard", "dual"}


def test_measured_takes_the_rotation_with_the_lower_output_error(small_target, small_calibration):
    bits = W3A4
    params = Params(parts="smooth+rotate", choose="measured", **FAST)
    state = lrq_dit.fit(small_target, small_calibration, bits, params)
    either = [
        lrq_dit.fit(small_target, small_calibration, bits, replace(params, choose="paper", threshold=threshold))
        for threshold in (1e9, 0.0)
    ]
    sites = small_target.linear_sites()
    tokens = token_sample(small_target, small_calibration, sites, params.tokens)
    choices = []
    for site in sites:
        scale, x = state[f"{site.name}/scale"], tokens[site.consumers[0]].double()
        errors = []
        for candidate in either:
            transform = Transform(scale_C=scale, rotations=lrq_dit.rotations(site.name, candidate)).double()
            error = 0.0
            for name in site.consumers:
                weight = small_target.module(name).weight.double()
                rounded = lrq_dit.quantize_weight(transform.of_weight(weight), bits.weight).dequantize().double()
                y = fake_quantize_activation(transform(x), ActQuant(bits.act)) @ rounded.T
                error += float((y - x @ weight.T).square().sum())
            errors.append(error)
        choices.append(errors[1] < errors[0])
        assert (f"{site.name}/dual/order_C" in state) == choices[-1]
        assert (f"{site.name}/signs" in state) != choices[-1]
    assert len(set(choices)) == 2, "both rotations should win somewhere, or this test sees nothing"


def test_only_layers_that_are_quantized_count_in_the_output_error(small_model, normal):
    whole, part = small_model.target(), small_model.target(skip=["to_k"])
    site = whole.site_of("transformer_blocks.0.attn1.to_k")
    x, bits = normal(20, 48), Bits(QuantSpec(3, "per_channel"), None)
    error = {
        name: lrq_dit.output_error(
            target, site, dict.fromkeys(site.consumers, x), Transform(), bits, Params(parts="none")
        )
        for name, target in (("whole", whole), ("part", part))
    }
    weight = whole.module("transformer_blocks.0.attn1.to_k").weight.double()
    of_k = float((x @ (quantize_weight(weight, bits.weight).dequantize().double() - weight).T).square().sum())
    assert error["whole"] - error["part"] == pytest.approx(of_k, rel=1e-5)


def test_choosing_the_dual_rotation_for_one_site_moves_no_other(small_target, small_calibration):
    """Signs are drawn per site; a site that takes the other branch leaves them alone."""
    all_hadamard = lrq_dit.fit(small_target, small_calibration, W3A4, Params(parts="rotate", threshold=1e9, **FAST))
    energies = sorted(float(v) for n, v in all_hadamard.items() if n.endswith("/rms"))
    mixed = lrq_dit.fit(small_target, small_calibration, W3A4, Params(parts="rotate", threshold=energies[4], **FAST))
    shared = [name for name in mixed if name.endswith("/signs")]
    assert 0 < len(shared) < len(energies)
    assert all(torch.equal(mixed[name], all_hadamard[name]) for name in shared)


@pytest.mark.parametrize(
    ("parts", "smooth", "rotate", "tlq"),
    [
        ("none", False, False, False),
        ("smooth", True, False, False),
        ("smooth+rotate", True, True, False),
        ("smooth+rotate+tlq", True, True, True),
        ("tlq", False, False, True),
    ],
)
def test_parts_switch_what_they_name(parts, smooth, rotate, tlq, small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, parts=parts)
    for name in small_target.layers:
        layer = recipe.layers[name]
        assert (layer.transform.scale_C is not None) == smooth
        assert bool(layer.transform.rotations) == rotate
        assert isinstance(layer.weight, LookupWeight if tlq else QuantizedWeight)
    with_producer = {site.name for site in small_target.sites if site.foldable}
    assert recipe.folded == (with_producer if smooth else set())


def test_without_parts_it_is_rounding_to_nearest(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, parts="none")
    plain = rtn.apply(small_target, {}, W3A4, rtn.Params())
    for name in small_target.layers:
        assert torch.equal(recipe.layers[name].weight.codes_OC, plain.layers[name].weight.codes_OC)


@pytest.mark.parametrize("parts", ["smooth", "rotate", "smooth+rotate+tlq"])
@pytest.mark.parametrize("threshold", [0.0, 1e9], ids=["dual", "hadamard"])
def test_every_part_is_exact_before_rounding(parts, threshold):
    case = Case("lrq_dit")
    case.params = Params(parts=parts, threshold=threshold, **FAST)
    transforms_are_exact(case)


def test_with_float_weights_there_is_no_log_grid(small_target, small_calibration):
    bits = Bits(None, DYNAMIC.act)
    recipe = recipe_of(small_target, small_calibration, bits)
    assert all(recipe.layers[name].weight is None for name in small_target.layers)
    assert not any("levels" in name for name in lrq_dit.fit(small_target, small_calibration, bits, Params(**FAST)))


def test_grids_are_those_of_the_transformed_and_folded_weight(small_target, small_calibration):
    params = Params(per_row=True, **FAST)
    state = lrq_dit.fit(small_target, small_calibration, W3A4, params)
    recipe = lrq_dit.apply(small_target, state, W3A4, params)
    placed = lrq_dit.placement(small_target, state)
    name = "transformer_blocks.0.attn1.to_v"  # a consumer of one fold and the producer of another
    weight = effective_linear(small_target, name, *placed).weight_OC
    expected = twin_log(weight, W3A4.weight, search=Search(per_row=True))
    assert torch.equal(recipe.layers[name].weight.codes_OC, expected.codes_OC)
    per_layer = twin_log(weight, W3A4.weight)
    assert not torch.equal(expected.dequantize(), per_layer.dequantize())


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_the_other_readings_of_the_grid_can_be_chosen(mode, small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, tlq=mode)
    layer = recipe.layers[LAYER]
    weight = layer.transform.of_weight(small_target.module(LAYER).weight.double())
    assert torch.equal(layer.weight.codes_OC, twin_log(weight, W3A4.weight, mode).codes_OC)


def test_a_layer_that_stays_in_float_follows_a_fold_and_is_not_rounded(small_model, small_calibration):
    target = small_model.target(skip=["to_k", "ff.net.2"])
    recipe = recipe_of(target, small_calibration)
    skipped = recipe.layers["transformer_blocks.0.attn1.to_k"]
    assert skipped.weight is None and skipped.transform is recipe.layers["transformer_blocks.0.attn1.to_q"].transform
    assert "transformer_blocks.0.ff.net.2" not in recipe.layers


def test_rotations_are_fitted_on_a_sample_of_every_step(small_target, small_calibration):
    site = small_target.site_of(LAYER)
    sample = token_sample(small_target, small_calibration, [site], 40)[LAYER]
    calls = inputs_of(small_target, small_calibration, site)
    expected = []
    for x in calls:
        rows = x.reshape(-1, x.shape[-1])
        expected += [rows[round(i * (len(rows) - 1) / 9)] for i in range(10)]  # 40 tokens over 4 calls
    assert torch.equal(sample, torch.stack(expected))


def test_only_the_calibration_decides(outlier_target, small_calibration):
    """Applying the recipe to other data leaves its rotations as they were fitted, and smoothing precedes the fit."""
    params, small_target = Params(threshold=0.0, **FAST), outlier_target
    state = lrq_dit.fit(small_target, small_calibration, W3A4, params)
    site = small_target.site_of(LAYER)
    tokens = token_sample(small_target, small_calibration, [site], params.tokens)[LAYER]
    index = [s.name for s in small_target.linear_sites()].index(site.name)
    seed = lrq_dit.sample_seeds(0, len(small_target.linear_sites()), stream="lrq_dit")[index]
    generator = torch.Generator().manual_seed(seed)
    lrq_dit.random_signs(192, generator)
    dual = dual_rotation(tokens / state[f"{site.name}/scale"], 128, params.steps, generator)
    assert torch.equal(state[f"{site.name}/dual/second_gg"], dual.second_gg)
    model = build(small_target, lrq_dit.apply(small_target, state, W3A4, params), dtype=torch.float32)
    before = quant_layers(model)[LAYER].transform.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    model.clock.set(0, 4)
    model(**{n: 30 * t if t.is_floating_point() else t for n, t in small_calibration.per_step[0].items()})
    assert all(torch.equal(before[n], t) for n, t in quant_layers(model)[LAYER].transform.state_dict().items())


def test_a_dead_channel_gets_a_finite_factor(small_target, small_calibration):
    stats = dict(channel_stats(small_target, small_calibration))
    for name in small_target.site_of(LAYER).consumers:
        stats[name] = replace(stats[name], min_SC=0 * stats[name].min_SC, max_SC=0 * stats[name].max_SC)
    scale = lrq_dit.smoothing(small_target, stats, 0.3, 1e-5)[f"{SITE}/scale"]
    expected = 1e-5**0.7 / weight_absmax(small_target, small_target.site_of(LAYER)) ** 0.3
    torch.testing.assert_close(scale, expected.clamp(min=1e-5))


def test_the_log_grid_is_what_three_bits_need(own_model, small_calibration):
    """Heavy-tailed weights at W3A16: the model with log grids is closer to the float one than with nearest rounding."""
    generator = torch.Generator().manual_seed(0)
    target = own_model.target()
    for name in target.layers:
        weight = target.module(name).weight
        weight.data *= 1 + 7 * (torch.rand(weight.shape, generator=generator) < 0.01)
    bits = Bits(QuantSpec(3, "per_channel"), None)
    inputs = own_model.step_inputs(4)
    errors = {}
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**inputs).sample
        for parts in ("none", "tlq"):
            model = build(target, recipe_of(target, small_calibration, bits, parts=parts), dtype=torch.float32)
            errors[parts] = relative_error(model(**inputs).sample, expected)
    assert errors["tlq"] < 0.7 * errors["none"]


def test_static_ranges_are_those_of_the_transformed_input(small_target, small_calibration):
    params = Params(**FAST)
    plain = lrq_dit.fit(small_target, small_calibration, STATIC, Params(parts="none"))
    moved = lrq_dit.fit(small_target, small_calibration, STATIC, params)
    assert not torch.allclose(plain[f"{LAYER}/act_high"], moved[f"{LAYER}/act_high"], rtol=1e-3)


def test_the_permutation_of_the_dual_rotation_is_stored_as_such(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, threshold=0.0)
    assert isinstance(recipe.layers[LAYER].transform.rotations[1], Permutation)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"parts": "smooth+rotation"}, "parts are smooth, rotate, tlq"),
        ({"parts": ""}, "parts are smooth, rotate, tlq"),
        ({"alpha": 1.2}, r"alpha must be in \[0, 1\]"),
        ({"choose": "best"}, "choose must be paper or measured"),
        ({"tlq": "log"}, "tlq must be one of strict, paper, code"),
        ({"steps": -1}, "steps at least 0"),
    ],
)
def test_a_parameter_out_of_range_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Params(**params)


def test_weights_in_groups_are_refused():
    with pytest.raises(UserError, match="grids per_channel"):
        lrq_dit.check_bits(Bits(QuantSpec(4, "per_group", group_size=16), None))
