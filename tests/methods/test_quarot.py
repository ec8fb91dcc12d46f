from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.quant.hadamard import hadamard
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.methods import quarot, rtn
from ditbench.methods.quarot import Params

LAYER = "transformer_blocks.1.ff.net.2"
SITE = "transformer_blocks.1.ff_mid"


def recipe_of(target, calibration, bits=DYNAMIC, params=Params()):
    return quarot.apply(target, quarot.fit(target, calibration, bits, params), bits, params)


def test_a_layer_computes_the_product_of_both_rotated_sides(small_target, small_calibration, normal):
    """Q = diag(±1) H / √C written out: y = Q₈(X Q) Q₄(W Q)ᵀ + b."""
    state = quarot.fit(small_target, small_calibration, DYNAMIC, Params(seed=3))
    recipe = quarot.apply(small_target, state, DYNAMIC, Params(seed=3))
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[LAYER]
    factors = layer.transform.rotations[0]
    # H of the layer is a Kronecker product of two smaller ones; which two does not matter to the paper
    plain = torch.kron(hadamard(len(factors.left_aa)), hadamard(len(factors.right_bb)))
    rotation = state[f"{SITE}/signs"].double().diag() @ plain / 192**0.5
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(192, dtype=torch.float64), atol=1e-12, rtol=0)
    x, linear = normal(5, 192), small_target.module(LAYER)
    weight = quantize_weight(linear.weight.double() @ rotation, DYNAMIC.weight).dequantize().double()
    rounded = fake_quantize_activation(x @ rotation, ActQuant(DYNAMIC.act))
    torch.testing.assert_close(layer(x), rounded @ weight.T + linear.bias.double(), rtol=1e-6, atol=1e-6)


def test_the_seed_and_nothing_else_draws_the_signs(small_target, small_calibration):
    torch.manual_seed(1)
    one = quarot.fit(small_target, small_calibration, DYNAMIC, Params(seed=5))
    torch.manual_seed(2)
    same, other = (quarot.fit(small_target, small_calibration, DYNAMIC, Params(seed=s)) for s in (5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert all(set(signs.tolist()) == {-1, 1} for signs in one.values())


def test_every_site_draws_its_own_signs(small_target, small_calibration):
    state = quarot.fit(small_target, small_calibration, DYNAMIC, Params())
    wide = [signs for signs in state.values() if len(signs) == 48]
    assert len(wide) == 6 and len({tuple(signs.tolist()) for signs in wide}) == 6


def test_rotations_run_online_and_nothing_is_folded(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration)
    assert not recipe.folded
    for site in small_target.sites:
        shared = {id(recipe.layers[name].transform) for name in site.consumers}
        assert len(shared) == 1
        transform = recipe.layers[site.consumers[0]].transform
        assert transform.rotations and transform.shift is None and transform.scale_C is None


def test_a_layer_that_stays_in_float_is_not_rotated(small_model, small_calibration):
    target = small_model.target(skip=["to_k"])
    recipe = recipe_of(target, small_calibration)
    assert set(recipe.layers) == set(target.layers)


@pytest.mark.parametrize(("asked", "taken"), [(None, (48, 192)), (12, (12, 12)), (24, (24, 24))])
def test_the_block_size_is_the_whole_width_or_what_was_asked_for(asked, taken, small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, params=Params(block_size=asked))
    blocks = [
        recipe.layers[f"transformer_blocks.0.ff.net.{name}"].transform.rotations[0].block_size
        for name in ("0.proj", "2")
    ]
    assert tuple(blocks) == taken


def test_static_ranges_are_those_of_the_rotated_input(small_target, small_calibration):
    plain = rtn.fit(small_target, small_calibration, STATIC, rtn.Params())
    rotated = quarot.fit(small_target, small_calibration, STATIC, Params())
    assert not torch.allclose(plain[f"{LAYER}/act_high"], rotated[f"{LAYER}/act_high"], rtol=1e-3)


def test_with_outlier_channels_it_loses_less_than_rounding_alone(own_model, small_calibration):
    """At 7 bits; with too few, noise spread over all channels is worse than small channels rounded to 0."""
    own_model.inject_outliers(channels=4, log2_factor=5, seed=0)
    target, bits = own_model.target(), Bits(None, QuantSpec(7, "per_token", dynamic=True))
    inputs = own_model.step_inputs(4)
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**inputs).sample
        errors = [
            relative_error(build(target, recipe, dtype=torch.float32)(**inputs).sample, expected)
            for recipe in (recipe_of(target, small_calibration, bits), rtn.apply(target, {}, bits, rtn.Params()))
        ]
    assert errors[0] < 0.5 * errors[1]


def test_a_block_of_one_channel_is_refused():
    with pytest.raises(ValueError, match="block_size must be at least 2"):
        Params(block_size=1)


def test_clip_shrinks_the_range_of_dynamic_tokens_and_leaves_static_ones(small_target, small_calibration, normal):
    clipped = recipe_of(small_target, small_calibration, params=Params(clip=0.8)).layers[LAYER]
    x = normal(5, 192)
    scale = 0.8 * x.abs().amax(-1, keepdim=True) / 127
    expected = (x / scale).round().clamp(-127, 127) * scale
    torch.testing.assert_close(fake_quantize_activation(x, clipped.act), expected, rtol=1e-5, atol=1e-6)
    assert recipe_of(small_target, small_calibration, STATIC, Params(clip=0.8)).layers[LAYER].act.clip == 1.0


def test_clip_is_a_share():
    with pytest.raises(ValueError, match=r"clip must be in \(0, 1\]"):
        Params(clip=1.2)


def test_signs_are_where_the_release_has_them(small_target, small_calibration):
    """residual: none before an attention's output layer and a feed-forward's second one; the others keep theirs."""
    every, residual, none = (
        quarot.fit(small_target, small_calibration, DYNAMIC, Params(signs=signs))
        for signs in ("all", "residual", "none")
    )
    unsigned = {
        f"{site.name}/signs"
        for site in small_target.linear_sites()
        if site.consumers[0].endswith(("to_out.0", "ff.net.2"))
    }
    assert len(unsigned) == 4 < len(every) == 8
    for name, signs in every.items():
        assert bool((none[name] == 1).all()) and not bool((signs == 1).all())
        assert torch.equal(residual[name], none[name] if name in unsigned else signs)


def test_without_signs_a_mean_of_all_channels_comes_to_lie_in_few():
    """What a GELU's output has; with signs it is spread like anything else."""
    x = torch.ones(1, 128, dtype=torch.float64)
    signs = torch.randint(0, 2, (128,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, signed = (quarot.rotation("a", s, Params())(x)[0].abs() for s in (torch.ones(128), signs))
    assert float(plain.max()) > 0.5 * 128**0.5 and float(signed.max()) < 0.3 * 128**0.5


def test_the_published_weights_are_gptqs_on_rotated_inputs_with_searched_ranges(small_target, small_calibration):
    params = Params(**quarot.FORMS["published"].params)
    state = quarot.fit(small_target, small_calibration, DYNAMIC, params)
    found = quarot.apply(small_target, state, DYNAMIC, params).layers[LAYER].weight
    assert torch.equal(found.codes_OC, state[f"{LAYER}/codes"])
    without = {name: value for name, value in state.items() if name.endswith("/signs")}
    nearest = quarot.apply(small_target, without, DYNAMIC, params).layers[LAYER].weight
    minmax = quarot.apply(small_target, without, DYNAMIC, Params(signs="residual")).layers[LAYER].weight
    torch.testing.assert_close(found.scale_OG, nearest.scale_OG)  # per row, so GPTQ's are those of the plain weight
    assert not torch.equal(found.codes_OC, nearest.codes_OC)
    assert bool((nearest.scale_OG <= minmax.scale_OG + 1e-12).all()) and bool(
        (nearest.scale_OG < minmax.scale_OG).any()
    )


@pytest.mark.parametrize("wrong", [{"signs": "some"}, {"weights": "rtn"}, {"ranges": "max"}])
def test_a_choice_that_there_is_not_is_refused(wrong):
    with pytest.raises(ValueError, match=f"quarot: {next(iter(wrong))} must be one of"):
        Params(**wrong)
