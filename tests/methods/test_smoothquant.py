from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.calibration.recording import selected
from ditbench.harness.fitting.conformance import DYNAMIC, relative_error
from ditbench.harness.quant.smoothing import smoothing_scale
from ditbench.methods import smoothquant
from ditbench.methods.smoothquant import Params


def by_hand(target, calibration, site, strength: float, floor: float) -> list[float]:
    """Eq. 4 in plain loops, from the raw inputs of the layers."""
    model, largest = float_copy(target, dtype=torch.float32), [0.0] * 48

    def see(_, args) -> None:
        for token in args[0].flatten(0, -2).tolist():
            for channel, value in enumerate(token):
                largest[channel] = max(largest[channel], abs(value))

    model.get_submodule(site.consumers[-1]).register_forward_pre_hook(see)
    with torch.no_grad():
        for inputs in calibration.per_step:
            model(**inputs)
    scales = []
    for channel in range(48):
        weight = max(abs(float(w)) for n in site.consumers for w in target.module(n).weight[:, channel])
        scale = max(largest[channel], floor) ** strength / max(weight, floor) ** (1 - strength)
        scales.append(max(scale, floor))
    return scales


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", ["attn_in", "ff_in"])
def test_the_scale_is_equation_four_over_all_samples_tokens_and_steps(name, block, small_target, small_calibration):
    """Strength 0.7: at 0.5 a swap of the two exponents could not be seen."""
    site = next(s for s in small_target.sites if s.name == f"transformer_blocks.{block}.{name}")
    state = smoothquant.fit(small_target, small_calibration, DYNAMIC, Params(strength=0.7))
    expected = torch.tensor(by_hand(small_target, small_calibration, site, 0.7, 1e-5))
    torch.testing.assert_close(state[f"{site.name}/scale"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0])
def test_one_factor_per_channel_from_both_ranges(strength, normal):
    act, weight = normal(48).abs().exp(), normal(48, seed=1).abs() * 0.1
    act[3], weight[5] = 0.0, 0.0
    expected = [
        max(max(float(a), 1e-3) ** strength / max(float(w), 1e-3) ** (1 - strength), 1e-3)
        for a, w in zip(act, weight, strict=True)
    ]
    found = smoothing_scale(act, weight, strength, 1e-3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_at_one_half_both_sides_get_the_same_range(normal):
    act, weight = normal(48).abs().exp(), normal(48, seed=1).abs() * 0.1
    scale = smoothing_scale(act, weight, 0.5, 1e-5)
    torch.testing.assert_close(act / scale, weight * scale)


def test_the_inputs_of_norms_are_smoothed_and_folded_and_q_k_v_share(small_target, small_calibration):
    state = smoothquant.fit(small_target, small_calibration, DYNAMIC, Params())
    recipe = smoothquant.apply(small_target, state, DYNAMIC, Params())
    smoothed = {site.name for site in small_target.sites if site.modulated}
    assert recipe.folded == smoothed and len(smoothed) == 4
    assert set(state) == {f"{name}/scale" for name in smoothed}
    for site in small_target.sites:
        transforms = [recipe.layers[name].transform for name in site.consumers]
        assert all(transform is transforms[0] or transform.is_identity for transform in transforms)
        assert transforms[0].is_identity == (site.name not in smoothed)
    built = build(small_target, recipe, dtype=torch.float32)
    assert all(layer.transform is None for layer in quant_layers(built).values()), "nothing runs online"


@pytest.mark.parametrize("skip", ["attn1.to_k", "attn1.to_q", "ff.net.0", "attn1"])
def test_a_layer_that_stays_in_float_follows_the_fold(skip, small_model, small_calibration):
    target = small_model.target(skip=[skip])
    params = Params(strength=0.7)
    recipe = smoothquant.apply(target, smoothquant.fit(target, small_calibration, DYNAMIC, params), DYNAMIC, params)
    quantized = {name for name, layer in recipe.layers.items() if layer.weight is not None}
    assert quantized == set(target.layers) and not any(skip in name for name in quantized)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in small_model.step_inputs(2).items()}
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float64)(**inputs).sample
        output = build(target, recipe.without_rounding(), dtype=torch.float64)(**inputs).sample
    assert relative_error(output, expected) < 1e-10


def test_the_order_of_calibration_rows_does_not_matter(small_target, small_calibration):
    backwards = torch.arange(small_calibration.num_rows(0)).flip(0)
    turned = selected(small_calibration, [backwards] * small_calibration.num_steps, "turned")
    one, other = (smoothquant.fit(small_target, c, DYNAMIC, Params()) for c in (small_calibration, turned))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_outside_zero_to_one_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\]"):
        Params(strength=strength)
