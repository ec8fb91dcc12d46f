from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import CONF
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.quant.hadamard import hadamard
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec, bits_of
from ditbench.harness.quant.transforms import Hadamard, Transform, random_signs
from ditbench.harness.sweep.compose import register
from ditbench.methods import vidit_q
from ditbench.methods.vidit_q import Params, bit_plan

SITE, LAYER = "transformer_blocks.1.ff_mid", "transformer_blocks.1.ff.net.2"


def recipe_of(target, calibration, bits=DYNAMIC, params=Params()):
    return vidit_q.apply(target, vidit_q.fit(target, calibration, bits, params), bits, params)


def mask_by_hand(target, calibration, site, alpha: float, steps: list[int]) -> list[float]:
    """mask = max|W|^α / max|X|^(1−α) in plain loops, from the raw inputs of the layers at the given steps."""
    model, width = float_copy(target, dtype=torch.float32), target.module(site.consumers[0]).in_features
    largest = [0.0] * width

    def see(_, args) -> None:
        for token in args[0].flatten(0, -2).tolist():
            for channel, value in enumerate(token):
                largest[channel] = max(largest[channel], abs(value))

    model.get_submodule(site.consumers[-1]).register_forward_pre_hook(see)
    with torch.no_grad():
        for step in steps:
            model(**calibration.per_step[step])
    weight = [max(abs(float(w)) for n in site.consumers for w in target.module(n).weight[:, c]) for c in range(width)]
    return [w**alpha / x ** (1 - alpha) for x, w in zip(largest, weight, strict=True)]


@pytest.mark.parametrize(("statistics", "steps"), [("high_noise", [0]), ("all_steps", [0, 1, 2, 3])])
@pytest.mark.parametrize("name", ["attn_in", "attn_out", "ff_mid"])
def test_what_the_input_is_divided_by_is_one_over_the_mask(name, statistics, steps, small_target, small_calibration):
    """α 0.8: at 0.5 the weight's exponent and the activation's could be swapped unseen."""
    site = next(s for s in small_target.sites if s.name == f"transformer_blocks.1.{name}")
    state = vidit_q.fit(small_target, small_calibration, DYNAMIC, Params(alpha=0.8, statistics=statistics))
    mask = torch.tensor(mask_by_hand(small_target, small_calibration, site, 0.8, steps))
    torch.testing.assert_close(state[f"{site.name}/scale"], 1 / mask, rtol=1e-4, atol=0)


def test_the_two_statistics_differ(small_target, small_calibration):
    first, all_steps = (
        vidit_q.fit(small_target, small_calibration, DYNAMIC, Params(statistics=s)) for s in ("high_noise", "all_steps")
    )
    assert not torch.allclose(first[f"{SITE}/scale"], all_steps[f"{SITE}/scale"], rtol=1e-2)


def test_a_layer_computes_the_product_of_both_scaled_and_rotated_sides(small_target, small_calibration, normal):
    """y = Q₈(X diag(s)⁻¹ Q) Q₄(W diag(s) Q)ᵀ + b, with Q written out."""
    params = Params(alpha=0.3, seed=3)
    state = vidit_q.fit(small_target, small_calibration, DYNAMIC, params)
    recipe = vidit_q.apply(small_target, state, DYNAMIC, params)
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[LAYER]
    factors = layer.transform.rotations[0]
    plain = torch.kron(hadamard(len(factors.left_aa)), hadamard(len(factors.right_bb)))
    rotation = state[f"{SITE}/signs"].double().diag() @ plain / 192**0.5
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(192, dtype=torch.float64), atol=1e-12, rtol=0)
    x, linear, scale = normal(5, 192), small_target.module(LAYER), state[f"{SITE}/scale"].double()
    weight = quantize_weight((linear.weight.double() * scale) @ rotation, DYNAMIC.weight).dequantize().double()
    rounded = fake_quantize_activation((x / scale) @ rotation, ActQuant(DYNAMIC.act))
    torch.testing.assert_close(layer(x), rounded @ weight.T + linear.bias.double(), rtol=1e-6, atol=1e-6)


def test_rotating_before_scaling_is_another_transform(normal):
    scale, rotation = normal(48).abs() + 0.1, Hadamard(48, random_signs(48, torch.Generator().manual_seed(0)))
    x = normal(5, 48)
    ours = Transform(scale_C=scale, rotations=(rotation,))(x)
    torch.testing.assert_close(ours, (x / scale) @ rotation.matrix(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours, rotation(x) / scale, rtol=0.1)


def test_scaling_and_rotating_each_make_tokens_less_incoherent(own_model, small_calibration):
    """max / RMS at the highest noise, with four outlier channels: less after either, and after both."""
    own_model.inject_outliers(channels=4, log2_factor=5, seed=0)
    target, name = own_model.target(), "transformer_blocks.0.ff.net.0.proj"
    incoherence = {}
    for scale in (False, True):
        for rotate in (False, True):
            params = Params(scale=scale, rotate=rotate)
            recipe = recipe_of(target, small_calibration, Bits(None, None), params)
            model, seen = build(target, recipe, dtype=torch.float32), []
            layer = quant_layers(model)[name]
            layer.kernel.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            model(**small_calibration.per_step[0])
            x = seen[0].flatten(0, -2)
            incoherence[scale, rotate] = float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())
    raw, scaled, rotated, both = (incoherence[key] for key in ((0, 0), (1, 0), (0, 1), (1, 1)))
    assert scaled < 0.8 * raw and rotated < 0.8 * raw and both < 0.8 * raw


def test_scales_are_folded_where_the_input_has_a_producer_and_rotations_run_online(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration)
    assert recipe.folded == {site.name for site in small_target.sites if site.foldable}
    layers = quant_layers(build(small_target, recipe, dtype=torch.float32))
    for name in small_target.layers:
        assert layers[name].transform.rotations
        assert (layers[name].transform.scale_C is not None) == name.endswith("ff.net.2")


@pytest.mark.parametrize("skip", ["attn1.to_k", "attn1.to_v", "ff.net.0", "attn1"])
def test_a_layer_that_stays_in_float_follows_the_fold(skip, small_model, small_calibration):
    target = small_model.target(skip=[skip])
    recipe = recipe_of(target, small_calibration)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in small_model.step_inputs(2).items()}
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float64)(**inputs).sample
        output = build(target, recipe.without_rounding(), dtype=torch.float64)(**inputs).sample
    assert relative_error(output, expected) < 1e-10


def test_scale_and_rotation_switch_off_one_by_one(small_target, small_calibration):
    off = Params(scale=False, rotate=False)
    assert vidit_q.fit(small_target, small_calibration, DYNAMIC, off) == {}
    recipe = recipe_of(small_target, small_calibration, params=off)
    assert not recipe.folded and all(layer.transform.is_identity for layer in recipe.layers.values())
    for params, part in ((Params(scale=False), "signs"), (Params(rotate=False), "scale")):
        state = vidit_q.fit(small_target, small_calibration, DYNAMIC, params)
        assert {name.rpartition("/")[2] for name in state} == {part} and len(state) == 8


def test_the_seed_and_nothing_else_draws_the_signs(small_target, small_calibration):
    one, same, other = (vidit_q.fit(small_target, small_calibration, DYNAMIC, Params(seed=s)) for s in (5, 5, 6))
    assert torch.equal(one[f"{SITE}/signs"], same[f"{SITE}/signs"])
    assert not torch.equal(one[f"{SITE}/signs"], other[f"{SITE}/signs"])
    assert not torch.equal(one["transformer_blocks.0.attn_in/signs"], one["transformer_blocks.1.attn_in/signs"])


def test_static_ranges_are_those_of_the_scaled_and_rotated_input(small_target, small_calibration):
    state = vidit_q.fit(small_target, small_calibration, STATIC, Params())
    transform = vidit_q.placement(small_target, state)[0][LAYER]
    model, highest = float_copy(small_target, dtype=torch.float32), []
    model.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: highest.append(transform(args[0]).amax()))
    with torch.no_grad():
        for inputs in small_calibration.per_step:
            model(**inputs)
    torch.testing.assert_close(state[f"{LAYER}/act_high"], torch.stack(highest).amax()[None], rtol=1e-4, atol=0)


def test_the_largest_value_of_a_token_is_exact_when_symmetric(normal):
    x = normal(7, 48)
    rounded = fake_quantize_activation(x, ActQuant(QuantSpec(4, "per_token", dynamic=True)))
    largest = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(rounded.gather(-1, largest), x.gather(-1, largest), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_every_layer_gets_exactly_one_width(bits, small_target, small_calibration):
    params = Params(mixed={r"ff\.net\.2$": "w8a8", r"blocks\.0\.attn1\.to_[qk]$": "w2a16"})
    recipe = recipe_of(small_target, small_calibration, bits, params)
    for name in small_target.layers:
        expected = (bits.weight.bits, bits.act.bits)
        if name.endswith("ff.net.2"):
            expected = (8, 8)
        if name.endswith(("0.attn1.to_q", "0.attn1.to_k")):
            expected = (2, None)
        layer = recipe.layers[name]
        assert (layer.weight.spec.bits, layer.act and layer.act.spec.bits) == expected
        assert int(layer.weight.codes_OC.max()) <= layer.weight.spec.quant_max
    assert bit_plan(small_target, bits, params).keys() == set(small_target.layers)


def test_a_plan_gives_single_layers_fp8_or_integers(small_target):
    (name,) = (name for name in small_target.layers if name.endswith("1.attn1.to_q"))
    bits = bit_plan(small_target, DYNAMIC, Params(mixed={r"1\.attn1\.to_q": "fp8"}))[name]
    assert bits.label == "FP8" and (bits.weight.granularity, bits.act.dynamic) == ("per_channel", True)
    assert bit_plan(small_target, bits, Params(mixed={"to_q": "w4a8"}))[name] == DYNAMIC
    alone = bit_plan(small_target, Bits(DYNAMIC.weight, None), Params(mixed={"to_q": "fp8"}))[name]
    assert alone.label == "WFP8_A16" and alone.act is None


def test_a_plan_gives_single_layers_blocks_and_layers_in_blocks_integers(small_target):
    (name,) = (name for name in small_target.layers if name.endswith("1.attn1.to_q"))
    for label in ("nvfp4", "wmxfp4_amxfp8", "wfp8_block_a8"):
        bits = bit_plan(small_target, DYNAMIC, Params(mixed={r"1\.attn1\.to_q": label}))[name]
        assert bits == bits_of(label)
    back = bit_plan(small_target, bits_of("nvfp4"), Params(mixed={"to_q": "w4a8"}))[name]
    assert back == bits_of("w4a8")
    with pytest.raises(UserError, match="activations in blocks .mxfp8. are dynamic"):
        bit_plan(small_target, Bits(DYNAMIC.weight, QuantSpec(8, "per_tensor")), Params(mixed={"to_q": "mxfp8"}))


def test_a_plan_changes_widths_and_nothing_else(small_target):
    plan = bit_plan(small_target, DYNAMIC, Params(mixed={"to_q": "w8a4"}))
    name = "transformer_blocks.0.attn1.to_q"
    assert plan[name] == Bits(replace(DYNAMIC.weight, bits=8), replace(DYNAMIC.act, bits=4))
    assert plan["transformer_blocks.0.attn1.to_k"] is DYNAMIC
    weight_only = bit_plan(small_target, Bits(DYNAMIC.weight, None), Params(mixed={"to_q": "w8a4"}))
    assert weight_only[name] == Bits(replace(DYNAMIC.weight, bits=8), None)


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        ({"to_q": "w8a8", "attn1": "w4a8"}, "'to_q' and 'attn1' both name transformer_blocks.0.attn1.to_q"),
        ({"mlp.fc2": "w8a8"}, "'mlp.fc2' names no layer to quantize, such as transformer_blocks.0"),
    ],
)
def test_a_plan_with_two_widths_for_a_layer_or_for_none_is_refused(mixed, message, small_target, small_calibration):
    with pytest.raises(UserError, match=message):
        vidit_q.fit(small_target, small_calibration, DYNAMIC, Params(mixed=mixed))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\]"),
        ({"statistics": "mean"}, "high_noise or all_steps, got 'mean'"),
        ({"mixed": {"to_(": "w8a8"}}, "not a regular expression"),
        ({"mixed": {"to_q": "8"}}, "no bits '8'"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, message):
    with pytest.raises((ValueError, UserError), match=message):
        Params(**wrong)


def test_a_plan_can_be_given_on_the_command_line():
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("config", ["method=vidit_q", r"+method.mixed={to_q:w8a8,ff.net.2$:w6a8}"])
    params = registry.params_of(OmegaConf.to_container(config.method, resolve=True))
    assert params.mixed == {"to_q": "w8a8", "ff.net.2$": "w6a8"}


def test_statistics_are_of_all_steps_unless_the_first_one_is_asked_for(small_target, small_calibration):
    default, every, first = (
        vidit_q.fit(small_target, small_calibration, DYNAMIC, vidit_q.Params(**asked))
        for asked in ({}, {"statistics": "all_steps"}, {"statistics": "high_noise"})
    )
    scales = [name for name in default if name.endswith("/scale")]
    assert scales and all(torch.equal(default[name], every[name]) for name in scales)
    assert any(not torch.equal(default[name], first[name]) for name in scales)
