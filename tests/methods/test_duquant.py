from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.calibration.channel_statistics import channel_stats, token_sample
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.rotations import Dual, dual_rotation
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.samples.seeds import sample_seeds
from ditbench.methods import duquant, rtn
from ditbench.methods.duquant import Params

FAST = {"steps": 16, "tokens": 64}
LAYER, SITE = "transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_mid"  # nothing is folded into its producer


@pytest.fixture
def outlier_target(own_model):
    """A few channels of SITE far larger than the others, so that there is something to spread after smoothing."""
    own_model.transformer.get_submodule("transformer_blocks.1.ff.net.0.proj").weight.data[5:8] *= 1e4
    return own_model.target()


def test_a_layer_computes_the_product_of_both_transformed_sides(outlier_target, small_calibration, normal):
    """Λ, R₁, P and R₂ written out: y = Q₈(X Λ⁻¹ R₁ P R₂) Q₄(W Λ R₁ P R₂)ᵀ + b, away from the defaults."""
    params, target = Params(alpha=0.7, block_size=40, seed=3, steps=9, tokens=30), outlier_target
    state = duquant.fit(target, small_calibration, DYNAMIC, params)
    layer = quant_layers(build(target, duquant.apply(target, state, DYNAMIC, params), dtype=torch.float64))[LAYER]
    linear = target.module(LAYER)
    weight = linear.weight.double()
    amax = channel_stats(target, small_calibration)[LAYER].absmax_C.double()
    factor = amax**0.7 / weight.abs().amax(0) ** 0.3
    torch.testing.assert_close(state[f"{SITE}/scale"].double(), factor, rtol=1e-5, atol=0)
    dual = Dual.from_state(SITE, state)
    assert not any(torch.equal(part, torch.eye(32).double()) for part in (dual.first_gg, dual.second_gg))
    rotation = torch.block_diag(*[dual.first_gg] * 6)[:, dual.order_C] @ torch.block_diag(*[dual.second_gg] * 6)
    x, factor = normal(5, 192), state[f"{SITE}/scale"].double()
    rounded = fake_quantize_activation((x / factor) @ rotation, ActQuant(DYNAMIC.act))
    rounded_weight = quantize_weight((weight * factor) @ rotation, DYNAMIC.weight).dequantize().double()
    assert relative_error(layer(x), rounded @ rounded_weight.T + linear.bias.double()) < 1e-5


@pytest.mark.parametrize("alpha", [0.2, 0.6, 1.0])
def test_alpha_weighs_activations_against_weights_at_every_site(alpha, small_target, small_calibration):
    state = duquant.fit(small_target, small_calibration, DYNAMIC, Params(alpha=alpha, **FAST))
    stats = channel_stats(small_target, small_calibration)
    for site in small_target.linear_sites():
        weight_C = torch.cat([small_target.module(name).weight for name in site.consumers]).abs().amax(0)
        expected_C = stats[site.consumers[0]].absmax_C ** alpha / weight_C ** (1 - alpha)
        torch.testing.assert_close(state[f"{site.name}/scale"], expected_C, rtol=1e-4, atol=1e-6)
    assert Params().alpha == 0.6  # the run scripts'


def test_the_releases_clipping_ratios_narrow_rows_and_tokens(small_target, small_calibration, normal):
    """swc and lac: both ends of a row of the transformed weight, and of a token, times the ratio."""
    bits = Bits(QuantSpec(4, "per_channel", symmetric=False), QuantSpec(4, "per_token", symmetric=False, dynamic=True))
    state = duquant.fit(small_target, small_calibration, bits, Params(**FAST))
    plain, cut = (
        duquant.apply(small_target, state, bits, params).layers[LAYER]
        for params in (Params(**FAST), Params(weight_clip=0.8, act_clip=0.9, **FAST))
    )
    torch.testing.assert_close(cut.weight.scale_OG, 0.8 * plain.weight.scale_OG)
    x = normal(4, 192).float()
    low, high = 0.9 * x.amin(-1, keepdim=True), 0.9 * x.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    expected = (torch.clamp(torch.round(x / scale) + zero, 0, 15) - zero) * scale
    torch.testing.assert_close(fake_quantize_activation(x, cut.act), expected, rtol=1e-5, atol=1e-6)
    assert plain.act.clip == 1.0 and duquant.FORMS["published"].params == {"weight_clip": 0.8, "act_clip": 0.9}


def test_rotations_are_fitted_on_smoothed_tokens(outlier_target, small_calibration):
    params, small_target = Params(seed=2, **FAST), outlier_target
    state = duquant.fit(small_target, small_calibration, DYNAMIC, params)
    sites = small_target.linear_sites()
    index = [site.name for site in sites].index(SITE)
    tokens = token_sample(small_target, small_calibration, sites, 64)[LAYER]
    generator = torch.Generator().manual_seed(sample_seeds(2, len(sites), stream="duquant")[index])
    expected = dual_rotation(tokens / state[f"{SITE}/scale"], 128, 16, generator)
    assert all(torch.equal(vars(Dual.from_state(SITE, state))[part], value) for part, value in vars(expected).items())


def test_every_site_is_rotated_and_the_smoothing_is_folded_where_it_can_be(small_target, small_calibration):
    params = Params(**FAST)
    state = duquant.fit(small_target, small_calibration, DYNAMIC, params)
    recipe = duquant.apply(small_target, state, DYNAMIC, params)
    assert all(len(recipe.layers[name].transform.rotations) == 3 for name in small_target.layers)
    assert recipe.folded == {site.name for site in small_target.sites if site.foldable}
    online = quant_layers(build(small_target, recipe, dtype=torch.float32))
    assert online["transformer_blocks.0.attn1.to_q"].transform.scale_C is None
    assert online[LAYER].transform.scale_C is not None


def test_a_layer_that_stays_in_float_follows_a_fold_and_is_spared_what_runs_online(small_model, small_calibration):
    target = small_model.target(skip=["to_k", "ff.net.2"])
    params = Params(**FAST)
    recipe = duquant.apply(target, duquant.fit(target, small_calibration, DYNAMIC, params), DYNAMIC, params)
    skipped = recipe.layers["transformer_blocks.0.attn1.to_k"]
    assert skipped.weight is None and skipped.transform is recipe.layers["transformer_blocks.0.attn1.to_q"].transform
    assert "transformer_blocks.0.ff.net.2" not in recipe.layers


def test_the_seed_and_nothing_else_draws_the_rotations(outlier_target, small_calibration):
    torch.manual_seed(1)
    one = duquant.fit(outlier_target, small_calibration, DYNAMIC, Params(seed=5, **FAST))
    torch.manual_seed(2)
    same, other = (duquant.fit(outlier_target, small_calibration, DYNAMIC, Params(seed=s, **FAST)) for s in (5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one[f"{SITE}/dual/first_gg"], other[f"{SITE}/dual/first_gg"])


def test_static_ranges_are_those_of_the_transformed_input(small_target, small_calibration):
    plain = rtn.fit(small_target, small_calibration, STATIC, rtn.Params())
    moved = duquant.fit(small_target, small_calibration, STATIC, Params(**FAST))
    assert not torch.allclose(plain[f"{LAYER}/act_high"], moved[f"{LAYER}/act_high"], rtol=1e-3)


def test_with_outlier_channels_it_loses_less_than_rounding_alone(own_model, small_calibration):
    own_model.inject_outliers(channels=4, log2_factor=5, seed=0)
    target, bits = own_model.target(), Bits(None, QuantSpec(6, "per_token", dynamic=True))
    inputs = own_model.step_inputs(4)
    params = Params(**FAST)
    recipe = duquant.apply(target, duquant.fit(target, small_calibration, bits, params), bits, params)
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**inputs).sample
        errors = [
            relative_error(build(target, each, dtype=torch.float32)(**inputs).sample, expected)
            for each in (recipe, rtn.apply(target, {}, bits, rtn.Params()))
        ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("params", "message"),
    [({"alpha": -0.1}, r"alpha must be in \[0, 1\]"), ({"block_size": 0}, "block_size and tokens must be at least 1")],
)
def test_a_parameter_out_of_range_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Params(**params)
