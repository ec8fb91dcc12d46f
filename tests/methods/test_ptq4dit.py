from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.smoothing import weight_absmax
from ditbench.harness.quant.target import Site, Target
from ditbench.methods import ptq4dit, smoothquant
from ditbench.methods.ptq4dit import Params, balance, spearman, timestep_weights

ROUNDED = Params(reconstruct="none")  # where only the balance is looked at


def saliences(normal, steps: int = 5, channels: int = 48):
    """Outliers that move over the steps, in channels that are partly those of the weight."""
    act = normal(steps, channels).abs() + 0.1
    act[:, 3] *= torch.linspace(1, 40, steps, dtype=torch.float64)
    weight = normal(channels, seed=1).abs() * 0.1 + 0.01
    act[0] *= 1 + 20 * weight
    weight[7] = 2.0
    return act, weight


def activation_salience(target, calibration, layer: str) -> list[list[float]]:
    """s(X^(t)) = max|X_j| from the raw inputs of one layer, step by step."""
    model, seen = float_copy(target, dtype=torch.float32), []
    model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2).abs().tolist())
    )
    with torch.no_grad():
        for inputs in calibration.per_step:
            model(**inputs)
    return [[max(token[channel] for token in tokens) for channel in range(len(tokens[0]))] for tokens in seen]


@pytest.mark.parametrize("name", ["0.attn_in", "0.attn_out", "1.ff_in"])
def test_the_balance_is_equations_4_to_11_written_out(name, small_target, small_calibration):
    """From raw activations in plain loops, ρ by scipy."""
    site = next(s for s in small_target.sites if s.name == f"transformer_blocks.{name}")
    act = activation_salience(small_target, small_calibration, site.consumers[-1])
    weight = [
        max(abs(float(w)) for n in site.consumers for w in small_target.module(n).weight[:, c]) for c in range(48)
    ]
    rho = [float(spearmanr(row, weight)[0]) for row in act]
    total = sum(math.exp(-r) for r in rho)
    eta = [math.exp(-r) / total for r in rho]
    over_time = [sum(e * row[c] for e, row in zip(eta, act, strict=True)) for c in range(48)]
    # B^X = diag(s̃ / s_ρ(X)) with s̃ = √(s_ρ(X) s(W)); the input is divided by its inverse
    expected = [over_time[c] / math.sqrt(over_time[c] * weight[c]) for c in range(48)]
    assert max(rho) - min(rho) > 1e-3
    state = ptq4dit.fit(small_target, small_calibration, DYNAMIC, ROUNDED)
    torch.testing.assert_close(state[f"{site.name}/scale"], torch.tensor(expected), rtol=1e-4, atol=0)


def test_weights_over_timesteps_sum_to_one_and_turn_the_order_of_rho_around(normal):
    act, weight = saliences(normal)
    rho = spearman(act, weight).double()
    eta = timestep_weights(rho)
    assert float(eta.sum()) == pytest.approx(1, abs=1e-12) and bool((eta > 0).all())
    assert torch.equal(eta.argsort(), rho.argsort(descending=True))
    assert int(eta.argmax()) == int(rho.argmin())


def test_the_weights_differ_by_at_most_e_squared():
    eta = timestep_weights(torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64))
    assert float(eta.max() / eta.min()) == pytest.approx(math.e**2, rel=1e-12)


def test_equal_correlations_give_the_mean_over_timesteps(normal):
    assert torch.equal(timestep_weights(torch.full((4,), 0.3)), torch.full((4,), 0.25))
    act, weight = saliences(normal)
    ranked = act.sort(dim=1).values  # all rows in the same order: equal ρ
    uniform = (ranked.mean(0) / weight).sqrt()
    torch.testing.assert_close(balance(ranked, weight, Params()), uniform, rtol=1e-6, atol=0)


def test_without_ssc_it_is_the_plain_mean_and_that_differs(normal):
    act, weight = saliences(normal)
    plain = balance(act, weight, Params(parts="csb"))
    torch.testing.assert_close(plain, (act.mean(0) / weight).sqrt(), rtol=1e-6, atol=0)
    assert not torch.allclose(plain, balance(act, weight, Params()), rtol=1e-3)


def test_what_the_input_is_divided_by_the_weight_is_multiplied_by(small_target, small_calibration):
    """B^X ⊙ B^W = 1."""
    state = ptq4dit.fit(small_target, small_calibration, DYNAMIC, ROUNDED)
    transforms, folded = ptq4dit.placement(small_target, state)
    for site in ptq4dit.balanced_sites(small_target):
        for name in site.consumers:
            scale = state[f"{site.name}/scale"].double()
            x = torch.ones(48, dtype=torch.float64)
            balanced_weight = transforms[name].of_weight(x[None])[0]
            torch.testing.assert_close(transforms[name](x) * balanced_weight, x, rtol=1e-12, atol=0)
            torch.testing.assert_close(balanced_weight, scale, rtol=1e-12, atol=0)


def test_at_one_timestep_both_sides_meet_at_their_geometric_mean(normal):
    """Eq. 5–7, and Eq. 8: no salience grows beyond the larger of the two largest."""
    act, weight = saliences(normal, steps=1)
    scale = balance(act, weight, Params())
    mean = (act[0] * weight).sqrt()
    torch.testing.assert_close(act[0] / scale, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight * scale, mean, rtol=1e-6, atol=0)
    assert float(mean.max()) <= max(float(act.max()), float(weight.max()))


@pytest.mark.parametrize("factor", [0.04, 9.0])
def test_a_larger_weight_divides_the_scale_by_the_root_of_its_factor(factor, normal):
    act, weight = saliences(normal)
    torch.testing.assert_close(
        balance(act, factor * weight, Params()), balance(act, weight, Params()) / math.sqrt(factor), rtol=1e-6, atol=0
    )
    assert torch.equal(spearman(act, factor * weight), spearman(act, weight))


def test_with_one_timestep_it_is_smoothquant_at_one_half(small_target, small_calibration):
    one_step = replace(small_calibration, steps=small_calibration.steps[:1])
    balanced = ptq4dit.fit(small_target, one_step, DYNAMIC, ROUNDED)
    smoothed = smoothquant.fit(small_target, one_step, DYNAMIC, smoothquant.Params(strength=0.5))
    assert len(smoothed) == 4
    for name, scale in smoothed.items():
        torch.testing.assert_close(balanced[name], scale, rtol=1e-5, atol=0)


def test_the_rank_correlation_is_scipys_with_ties_too(normal):
    rows, reference = normal(4, 48), normal(48, seed=1)
    rows[1] = (2 * rows[1]).round()
    rows[2] = reference**3
    rows[3] = -reference
    tied = reference.round()
    for against in (reference, tied):
        expected = torch.tensor([spearmanr(row, against)[0] for row in rows])
        torch.testing.assert_close(spearman(rows, against), expected.float(), rtol=0, atol=1e-6)
    assert spearman(rows, reference)[2:].tolist() == pytest.approx([1, -1])


def test_a_side_without_variation_has_no_correlation(normal):
    rows = normal(2, 48)
    rows[1] = 0.7
    assert float(spearman(rows, normal(48, seed=1))[1]) == 0
    assert spearman(rows, torch.full((48,), 0.1)).tolist() == [0, 0]


def test_a_dead_channel_gets_a_finite_scale(normal):
    act, weight = saliences(normal)
    act[:, 2], weight[9] = 0, 0
    scale = balance(act, weight, Params())
    assert bool((scale.isfinite() & (scale > 0)).all())


def test_attention_and_first_feed_forward_inputs_are_balanced_and_folded_and_the_rest_is_not(
    small_target, small_calibration
):
    state = ptq4dit.fit(small_target, small_calibration, DYNAMIC, ROUNDED)
    recipe = ptq4dit.apply(small_target, state, DYNAMIC, Params())
    expected = {f"transformer_blocks.{b}.{s}" for b in (0, 1) for s in ("attn_in", "attn_out", "ff_in")}
    assert recipe.folded == expected and set(state) == {f"{name}/scale" for name in expected}
    built = build(small_target, recipe, dtype=torch.float32)
    assert all(layer.transform is None for layer in quant_layers(built).values())
    assert recipe.layers["transformer_blocks.0.ff.net.2"].transform.is_identity


def test_salience_of_q_k_v_is_taken_over_the_three(small_target):
    site = small_target.sites[0]
    stacked = torch.cat([small_target.module(name).weight for name in site.consumers])
    assert stacked.shape == (144, 48)
    assert torch.equal(weight_absmax(small_target, site), stacked.abs().amax(0))


def test_switched_off_it_is_rounding_with_searched_ranges(small_target, small_calibration):
    params = replace(ROUNDED, parts="none")
    state = ptq4dit.fit(small_target, small_calibration, DYNAMIC, params)
    recipe = ptq4dit.apply(small_target, state, DYNAMIC, params)
    assert state == {} and not recipe.folded
    assert all(layer.transform.is_identity for layer in recipe.layers.values())


def test_weights_are_rounded_after_the_fold(small_target, small_calibration):
    """The V rows: columns balanced for q, k, v and rows for the output projection."""
    params, name = ROUNDED, "transformer_blocks.0.attn1.to_v"
    state = ptq4dit.fit(small_target, small_calibration, DYNAMIC, params)
    recipe = ptq4dit.apply(small_target, state, DYNAMIC, params)
    columns, rows = (state[f"transformer_blocks.0.{site}/scale"].double() for site in ("attn_in", "attn_out"))
    weight = small_target.module(name).weight.double() * columns / rows[:, None]
    expected = quantize_weight(weight, DYNAMIC.weight, ranges="mse")
    assert torch.equal(recipe.layers[name].weight.codes_OC, expected.codes_OC)
    torch.testing.assert_close(
        recipe.layers[name].weight.dequantize().double(), weight, rtol=0, atol=float(expected.scale_OG.max())
    )
    effective = effective_linear(small_target, name, *ptq4dit.placement(small_target, state))
    torch.testing.assert_close(effective.weight_OC, weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ranges", ["mse", "minmax"])
def test_weight_ranges_are_the_chosen_ones(ranges, normal):
    """1,200 wide, where the two differ."""
    linear = nn.Linear(1200, 3).requires_grad_(False)
    linear.weight.copy_(0.02 * normal(3, 1200))
    linear.weight[:, 7] = 0.2
    target, params = Target(nn.Sequential(linear), ("0",), (Site("0", ("0",)),)), Params(ranges=ranges)
    codes = {r: quantize_weight(linear.weight, DYNAMIC.weight, ranges=r).codes_OC for r in ("mse", "minmax")}
    assert not torch.equal(codes["mse"], codes["minmax"])
    found = ptq4dit.apply(target, {}, DYNAMIC, params).layers["0"].weight
    assert torch.equal(found.codes_OC, codes[ranges])


def test_static_ranges_are_searched_unless_told_otherwise(small_target, small_calibration):
    """At 4 bits a percentile range is narrower than the extremes somewhere."""
    bits = STATIC.with_widths(8, 4)
    searched, extremes = (
        ptq4dit.fit(small_target, small_calibration, bits, replace(ROUNDED, ranges=r)) for r in ("mse", "minmax")
    )
    spans = [[float(s[f"{n}/act_high"] - s[f"{n}/act_low"]) for n in small_target.layers] for s in (searched, extremes)]
    assert all(a <= b for a, b in zip(*spans, strict=True)) and spans[0] != spans[1]


def test_other_ranges_are_refused():
    with pytest.raises(ValueError, match="mse or minmax, got 'max'"):
        Params(ranges="max")


@pytest.mark.parametrize("bits", [DYNAMIC, STATIC.with_widths(4, 8)], ids=["dynamic", "static"])
def test_reconstruction_brings_the_output_closer_to_float(bits, small_target, small_calibration, small_model):
    errors = {}
    for params in (ROUNDED, Params(iterations=40)):
        state = ptq4dit.fit(small_target, small_calibration, bits, params)
        built = build(small_target, ptq4dit.apply(small_target, state, bits, params), dtype=torch.float32)
        exact = float_copy(small_target, dtype=torch.float32)
        errors[params.reconstruct] = 0.0
        with torch.no_grad():
            for inputs in small_calibration.per_step:
                errors[params.reconstruct] += float((built(**inputs).sample - exact(**inputs).sample).square().sum())
    assert errors["block"] < 0.95 * errors["none"], (
        errors
    )  # ranges of these narrow rows are cut, which rounding cannot mend


def test_the_learned_weights_are_those_balanced_and_folded(small_target, small_calibration):
    """Within one step of the weight that the balance makes, in every layer, and not simply the nearest."""
    params = Params(iterations=40)
    state = ptq4dit.fit(small_target, small_calibration, DYNAMIC, params)
    recipe = ptq4dit.apply(small_target, state, DYNAMIC, params)
    plain = ptq4dit.apply(small_target, state, DYNAMIC, ROUNDED)
    for name in small_target.layers:
        weight = effective_linear(small_target, name, *ptq4dit.placement(small_target, state)).weight_OC
        learned = recipe.layers[name].weight
        clamp = (weight.abs() / learned.scale_OG).clamp(min=learned.spec.quant_max) - learned.spec.quant_max
        assert bool(((learned.dequantize() - weight).abs() <= (1.0001 + clamp) * learned.scale_OG).all())
        assert torch.equal(learned.codes_OC, state[f"{name}/codes"])
    assert plain.layers.keys() == recipe.layers.keys()


def test_static_scales_are_learned_along(small_target, small_calibration):
    plain, learned = (ptq4dit.fit(small_target, small_calibration, STATIC, p) for p in (ROUNDED, Params(iterations=5)))
    for name in small_target.layers:
        assert not torch.equal(plain[f"{name}/act_high"], learned[f"{name}/act_high"])
        torch.testing.assert_close(plain[f"{name}/act_high"], learned[f"{name}/act_high"], rtol=0.05, atol=0)
