from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.uneven import LogSqrt2Quant, log_sqrt2, log_sqrt2_delta
from ditbench.methods import repq, rtn
from ditbench.methods.repq import Params, channel_quantizers, reparameterise

ACT = QuantSpec(6, "per_tensor", symmetric=False)
SITE = "transformer_blocks.1.ff_in"
LAYER = "transformer_blocks.1.ff.net.0.proj"


def recipe_of(target, calibration, bits=STATIC, params=Params()):
    return repq.apply(target, repq.fit(target, calibration, bits, params), bits, params)


def uneven(normal, tokens: int = 200, channels: int = 48):
    """Channels with other widths and other centres."""
    return normal(tokens, channels) * normal(channels, seed=1).exp() + 2 * normal(channels, seed=2)


def quantizers_by_hand(values_NC, bits: int) -> tuple[list[float], list[int]]:
    """δ, z of each channel from its extremes, in Python's float64."""
    scales, zero_points = [], []
    for channel in values_NC.T.tolist():
        low, high = min(*channel, 0.0), max(*channel, 0.0)
        scales.append((high - low) / (2**bits - 1))
        zero_points.append(-round(low / scales[-1]))
    return scales, zero_points


def test_shift_and_scale_are_those_of_the_paper_written_out(normal):
    """δ̃ = mean δ, z̃ = mean z, r = δ/δ̃, b = act_min/r − target_min; x' = x/r − b is (x − shift)/scale."""
    x = uneven(normal)
    scales, zero_points = quantizers_by_hand(x, 6)
    found = channel_quantizers(x.float(), ACT, Params(ranges="minmax"))
    torch.testing.assert_close(found[0].double(), torch.tensor(scales, dtype=torch.float64), rtol=1e-5, atol=0)
    assert found[1].tolist() == zero_points
    mean_scale, mean_zero = sum(scales) / 48, round(sum(zero_points) / 48)
    assert 0 < mean_zero < 63 and len(set(zero_points)) > 20
    shift, ratio, low, high = reparameterise(
        *(torch.tensor(v, dtype=torch.float64) for v in (scales, zero_points)), ACT
    )
    for c in range(48):
        r = scales[c] / mean_scale
        b = -zero_points[c] * scales[c] / r + mean_zero * mean_scale
        ours = (x[:, c] - shift[c]) / ratio[c]
        torch.testing.assert_close(ours, x[:, c] / r - b, rtol=1e-9, atol=1e-9)
    assert float(low) == pytest.approx(-mean_zero * mean_scale) and float(high - low) == pytest.approx(63 * mean_scale)


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_quantizer_rounds_as_the_channels_own_did(symmetric, normal):
    """The point of it: after the shift and the scale, per tensor is per channel, code by code up to a shift of codes."""
    act, x = replace(ACT, symmetric=symmetric), uneven(normal)
    scale, zero_point = (t.double() for t in channel_quantizers(x.float(), act, Params(ranges="minmax")))
    shift, ratio, low, high = reparameterise(scale, zero_point, act)
    step = (high - low) / (act.quant_max - act.quant_min)
    mean_zero = zero_point.mean().round()
    own = (x / scale).round() + zero_point
    shared = ((x - shift) / ratio / step).round() + mean_zero
    near_tie = ((x / scale) % 1 - 0.5).abs() < 1e-6
    assert torch.equal(own[~near_tie], shared[~near_tie])
    assert int(shared.min()) >= act.quant_min and int(shared.max()) <= act.quant_max


def test_every_channel_fills_the_one_range(small_target, small_calibration):
    state = repq.fit(small_target, small_calibration, STATIC, Params(ranges="minmax"))
    transform = repq.placement(small_target, state)[0][LAYER]
    model, seen = float_copy(small_target, dtype=torch.float32), []
    model.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for inputs in small_calibration.per_step:
            model(**inputs)
    x = transform(torch.cat(seen))
    low, high = state[f"{LAYER}/act_low"][0], state[f"{LAYER}/act_high"][0]
    step = float(high - low) / 255
    assert float(x.min()) > float(low) - step and float(x.max()) < float(high) + step
    spans = x.amax(0) - x.amin(0)
    torch.testing.assert_close(spans, torch.full((48,), float(high - low)), rtol=0.02, atol=0)


def test_adaln_inputs_are_reparameterised_and_folded_and_nothing_runs_online(small_target, small_calibration):
    state = repq.fit(small_target, small_calibration, STATIC, Params())
    recipe = repq.apply(small_target, state, STATIC, Params())
    sites = {site.name for site in small_target.sites if site.modulated}
    assert recipe.folded == sites and len(sites) == 4
    assert {f"{s}/{part}" for s in sites for part in ("shift", "scale")} <= set(state)
    built = build(small_target, recipe, dtype=torch.float32)
    assert all(layer.transform is None for layer in quant_layers(built).values())


def test_the_output_is_unchanged_before_rounding_and_the_shift_takes_part(small_model, small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in small_model.step_inputs(2).items()}
    with torch.no_grad():
        expected = float_copy(small_target, dtype=torch.float64)(**inputs).sample
        output = build(small_target, recipe.without_rounding(), dtype=torch.float64)(**inputs).sample
    assert relative_error(output, expected) < 1e-10
    shift, scale = recipe.layers[LAYER].transform.shift.rows[0], recipe.layers[LAYER].transform.scale_C
    assert float(shift.abs().max()) > 0.1 and float(scale.max() / scale.min()) > 1.2


@pytest.mark.parametrize("skip", ["attn1.to_k", "attn1.to_q", "ff.net.0"])
def test_a_layer_that_stays_in_float_follows_the_fold(skip, small_model, small_calibration):
    target = small_model.target(skip=[skip])
    recipe = recipe_of(target, small_calibration)
    assert {n for n, layer in recipe.layers.items() if layer.weight} == set(target.layers)
    inputs = small_model.step_inputs(2)
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**inputs).sample
        output = build(target, recipe.without_rounding(), dtype=torch.float32)(**inputs).sample
    assert relative_error(output, expected) < 1e-5


def test_the_layers_take_the_one_range_and_its_zero_point(small_target, small_calibration):
    state = repq.fit(small_target, small_calibration, STATIC, Params())
    recipe = repq.apply(small_target, state, STATIC, Params())
    values = repq.channel_values(small_target, small_calibration, Params().tokens)
    for site in repq.reparameterised_sites(small_target):
        scale_C, zero_point_C = channel_quantizers(values[site.name], STATIC.act, Params())
        for name in site.consumers:
            act = recipe.layers[name].act
            torch.testing.assert_close(act.scale.rows[0], scale_C.mean(), rtol=1e-5, atol=0)
            assert float(act.zero_point.rows[0]) == round(float(zero_point_C.mean()))


def test_other_layers_have_the_ranges_of_their_own_input(small_target, small_calibration):
    plain = rtn.fit(small_target, small_calibration, STATIC, rtn.Params())
    state = repq.fit(small_target, small_calibration, STATIC, Params(ranges="minmax"))
    for name in small_target.layers:
        same = torch.allclose(plain[f"{name}/act_high"], state[f"{name}/act_high"], rtol=1e-4)
        assert same == name.endswith(("to_out.0", "net.2"))


def test_weights_are_rounded_after_the_fold_with_searched_ranges(small_target, small_calibration):
    state = repq.fit(small_target, small_calibration, STATIC, Params())
    weight = small_target.module(LAYER).weight.double() * state[f"{SITE}/scale"].double()
    found = repq.apply(small_target, state, STATIC, Params()).layers[LAYER].weight
    assert torch.equal(found.codes_OC, quantize_weight(weight, STATIC.weight, ranges="mse").codes_OC)
    assert not torch.equal(found.codes_OC, quantize_weight(small_target.module(LAYER).weight, STATIC.weight).codes_OC)


@pytest.mark.parametrize("ranges", ["mse", "minmax"])
def test_weight_ranges_are_the_chosen_ones(ranges, normal):
    """1,200 wide, where the two differ."""
    linear = nn.Linear(1200, 3).requires_grad_(False)
    linear.weight.copy_(0.02 * normal(3, 1200))
    linear.weight[:, 7] = 0.2
    target = Target(nn.Sequential(linear), ("0",), (Site("0", ("0",)),))
    codes = {r: quantize_weight(linear.weight, DYNAMIC.weight, ranges=r).codes_OC for r in ("mse", "minmax")}
    assert not torch.equal(codes["mse"], codes["minmax"])
    found = repq.apply(target, {}, DYNAMIC, Params(ranges=ranges)).layers["0"].weight
    assert torch.equal(found.codes_OC, codes[ranges])


def test_all_tokens_and_steps_count_and_extremes_are_exact(small_target, small_calibration):
    values = repq.channel_values(small_target, small_calibration, 5)[SITE]
    assert values.shape == (2 + 5 * small_calibration.num_batches(), 48)
    model, low = float_copy(small_target, dtype=torch.float32), torch.full((48,), torch.inf)

    def see(_, args) -> None:
        torch.minimum(low, args[0].flatten(0, -2).amin(0), out=low)

    model.get_submodule(LAYER).register_forward_pre_hook(see)
    with torch.no_grad():
        for inputs in small_calibration.per_step:
            model(**inputs)
    torch.testing.assert_close(values.amin(0), low, rtol=1e-5, atol=1e-6)


def test_outlier_channels_cost_less_than_with_one_range_alone(own_model, small_calibration):
    """Static 6-bit activations, four channels up to 32 times too large."""
    own_model.inject_outliers(channels=4, log2_factor=5, seed=0)
    target, bits = own_model.target(), Bits(None, ACT)
    inputs = own_model.step_inputs(4)
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**inputs).sample
        ours, plain = (
            build(target, m.apply(target, m.fit(target, small_calibration, bits, m.Params()), bits, m.Params()), dtype=torch.float32)
            for m in (repq, rtn)
        )  # fmt: skip
        errors = [relative_error(model(**inputs).sample, expected) for model in (ours, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_a_dead_channel_follows_the_others(normal):
    x = uneven(normal).float()
    x[:, 3], x[:, 4] = 0.0, 1e-30
    scale, zero_point = channel_quantizers(x, ACT, Params())
    shift, ratio, *_ = reparameterise(scale, zero_point, ACT)
    for channel in (3, 4):
        assert float(ratio[channel]) == pytest.approx(1, abs=1e-6)
        assert float(shift[channel]) == pytest.approx(0, abs=float(scale.mean()))
    live = [c for c in range(48) if c not in (3, 4)]
    without = channel_quantizers(x[:, live], ACT, Params())[0].mean()
    torch.testing.assert_close(scale.mean(), without)
    every = channel_quantizers(torch.zeros(10, 48), ACT, Params())
    assert bool(every[0].isfinite().all()) and bool((every[0] > 0).all())


def test_with_dynamic_activations_the_fold_remains(small_target, small_calibration):
    state = repq.fit(small_target, small_calibration, DYNAMIC, Params())
    recipe = repq.apply(small_target, state, DYNAMIC, Params())
    assert {name.rpartition("/")[2] for name in state} == {"shift", "scale"} and len(recipe.folded) == 4
    assert all(layer.act.spec == DYNAMIC.act for layer in recipe.layers.values())


def test_with_float_activations_nothing_is_reparameterised(small_target, small_calibration):
    bits = Bits(STATIC.weight, None)
    assert repq.fit(small_target, small_calibration, bits, Params()) == {}
    assert not recipe_of(small_target, small_calibration, bits).folded


@pytest.mark.parametrize(("wrong", "message"), [({"ranges": "max"}, "mse or minmax"), ({"tokens": 0}, "at least 1")])
def test_parameters_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Params(**wrong)


def test_the_softmax_map_takes_log_sqrt2_codes_by_hand():
    """δ = 1, 3 bits: levels 1, 1/√2, 1/2, … 2^(−7/2); what lies below the last is 0."""
    x = torch.tensor([1.0, 0.9, 0.72, 0.5, 0.3, 2**-3.5, 2**-3.9, 0.0, 1.7], dtype=torch.float64)
    levels = [2 ** (-q / 2) for q in range(8)]
    expected = [1.0, 1.0, levels[1], levels[2], levels[3], levels[7], 0.0, 0.0, 1.0]
    torch.testing.assert_close(log_sqrt2(x, torch.tensor(1.0), 3), torch.tensor(expected, dtype=torch.float64))


def test_delta_is_the_percentile_with_the_least_error(normal):
    values = normal(4000).abs().float()
    values[0] = 50.0
    found = log_sqrt2_delta(values, 4)
    tried = [torch.quantile(values.double(), p) for p in (0.999, 0.9999, 0.99999)]
    errors = [float((log_sqrt2(values, delta, 4) - values).square().sum()) for delta in tried]
    assert float(found) == pytest.approx(float(tried[errors.index(min(errors))]), rel=1e-5)


@pytest.mark.parametrize(("softmax", "kind"), [("log_sqrt2", LogSqrt2Quant), ("uniform", ActQuant)])
def test_a_protocol_with_attention_gets_the_map_it_asks_for(softmax, kind, small_model, small_calibration):
    target = small_model.target(attention=True)
    params = Params(softmax=softmax)
    recipe = repq.apply(target, repq.fit(target, small_calibration, STATIC, params), STATIC, params)
    for attention in recipe.attention.values():
        assert type(attention.probabilities) is kind and attention.probabilities.spec.bits == 8
        assert type(attention.query) is ActQuant
    model = build(target, recipe, dtype=torch.float32)
    inputs = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in small_calibration.per_step[0].items()
    }
    with torch.no_grad():
        model.clock.set(0, small_calibration.num_steps)
        assert bool(model(**inputs).sample.isfinite().all())
