"""HTG against its equations, away from the defaults."""

import pytest
import torch

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.methods import htg

STATIC = Bits(QuantSpec(8, "per_channel", symmetric=False), QuantSpec(8, "per_tensor", symmetric=False))
PARAMS = htg.Params(groups=2, momentum=0.995)


@pytest.fixture(scope="module")
def state(small_target, small_calibration):
    return htg.fit(small_target, small_calibration, STATIC, PARAMS)


@pytest.fixture(scope="module")
def recorded(small_target, small_calibration):
    """{site: [X_t (B, T, C) for each step]} of the float model, float64."""
    found = {}
    sites = {site.consumers[0]: site.name for site in small_target.linear_sites()}
    handles = [
        small_target.module(layer).register_forward_pre_hook(
            lambda _, inputs, site=site: found.setdefault(site, []).append(inputs[0].double())
        )
        for layer, site in sites.items()
    ]
    for inputs in small_calibration.per_step:
        with torch.no_grad():
            small_target.transformer(**inputs)
    for handle in handles:
        handle.remove()
    return found


def test_shift_groups_and_scale_are_the_papers(small_target, state, recorded):
    for site in small_target.linear_sites():
        if not site.foldable:
            assert f"{site.name}/shift" not in state
            continue
        steps = recorded[site.name]
        centres = torch.stack([(x.amax(1).mean(0) + x.amin(1).mean(0)) / 2 for x in steps])
        group = state[f"{site.name}/group_of_step"]
        for g in range(2):
            expected = centres[group == g].mean(0)
            torch.testing.assert_close(state[f"{site.name}/shift"][g].double(), expected, rtol=1e-5, atol=1e-6)
        running = None
        for t, x in enumerate(steps):  # step 0 is the noisiest
            largest = (x - state[f"{site.name}/shift"][group[t]].double()).abs().amax((0, 1))
            kept = 0.995 ** (99 / (len(steps) - 1))  # what the α of 100 steps is at so few
            running = largest if running is None else kept * running + (1 - kept) * largest
        weight = torch.stack([small_target.module(n).weight.double().abs().amax(0) for n in site.consumers]).amax(0)
        expected = (running.clamp(min=1e-5) / weight.clamp(min=1e-5)).sqrt()
        torch.testing.assert_close(state[f"{site.name}/scale"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_channel_shifted_by_its_own_centre_is_symmetric(small_target, small_calibration):
    """Exact where the extremes are those of one sample: its maximum is minus its minimum."""
    stats = channel_stats(small_target, small_calibration)[small_target.layers[0]]
    centre = (stats.max_SC + stats.min_SC) / 2
    torch.testing.assert_close(stats.max_SC - centre, -(stats.min_SC - centre))


def test_the_running_magnitude_has_its_closed_form(normal):
    magnitude = normal(6, 5).abs()
    weights = torch.tensor([0.7**5] + [0.3 * 0.7**k for k in (4, 3, 2, 1, 0)], dtype=magnitude.dtype)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    expected = (weights[:, None] * magnitude).sum(0)
    torch.testing.assert_close(htg.running_magnitude(magnitude, 0.7), expected)
    assert torch.equal(htg.running_magnitude(magnitude, 0.0), magnitude[-1])
    assert torch.equal(htg.running_magnitude(magnitude, 1.0), magnitude[0])


def test_there_is_one_integer_weight_for_all_groups(small_target, state):
    """Scale, and so the codes, do not depend on the group; biases and ranges do."""
    recipe = htg.apply(small_target, state, STATIC, PARAMS)
    model = build(small_target, recipe, dtype=torch.float32)
    for name, layer in quant_layers(model).items():
        if name in small_target.layers and recipe.layers[name].transform.shift is not None:
            assert recipe.layers[name].weight.codes_OC.ndim == 2
            assert len(layer.bias.rows) >= 2


def test_static_ranges_differ_between_groups_and_cover_what_was_seen(small_target, state, recorded):
    widths = []
    for name in small_target.layers:
        low, high = state[f"{name}/act_low"], state[f"{name}/act_high"]
        assert low.shape == high.shape == (2,)
        widths.append((high - low).diff().abs())
    assert max(float(width) for width in widths) > 0
    site = next(site for site in small_target.linear_sites() if site.foldable)
    group, name = state[f"{site.name}/group_of_step"], site.consumers[0]
    for step, x in enumerate(recorded[site.name]):
        shifted = (x - state[f"{site.name}/shift"][group[step]].double()) / state[f"{site.name}/scale"].double()
        assert float(shifted.amax()) <= float(state[f"{name}/act_high"][group[step]]) + 1e-4
        assert float(shifted.amin()) >= float(state[f"{name}/act_low"][group[step]]) - 1e-4


def test_there_are_ten_groups_or_one_for_each_step(small_target, small_calibration):
    site, steps = small_target.linear_sites()[0], small_calibration.num_steps
    assert steps < 10 and [htg.Params().groups_of(t) for t in (12, 20, 100, 250)] == [10] * 4
    for groups, expected in ((10, steps), (3, 3)):
        state = htg.fit(small_target, small_calibration, STATIC, htg.Params(groups=groups))
        assert len(state[f"{site.name}/shift"]) == expected


def test_the_noisiest_step_has_the_weight_of_the_paper_at_any_number_of_steps():
    """α^99 = 0.37 at the paper's T = 100; there α is the paper's own."""
    params = htg.Params()
    assert params.momentum_of(100) == params.momentum == 0.99
    for steps in (2, 12, 20, 50, 100, 250):
        noisiest = torch.eye(steps)[:, :1]  # 1 at the first step and 0 behind it
        assert float(htg.running_magnitude(noisiest, params.momentum_of(steps))) == pytest.approx(0.99**99, rel=1e-4)
    assert params.momentum_of(1) < 1


def test_switched_off_parts_leave_no_trace(small_target, small_calibration):
    state = htg.fit(small_target, small_calibration, STATIC, htg.Params(groups=2, parts="group"))
    site = small_target.linear_sites()[0]
    assert not state[f"{site.name}/shift"].any() and f"{site.name}/scale" not in state


@pytest.mark.parametrize("wrong", [{"momentum": 1.5}, {"groups": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match="htg: "):
        htg.Params(**wrong)


def test_without_grouping_all_steps_are_one_group():
    assert htg.Params(parts="shift+scale", groups=3).groups_of(20) == 1
    assert htg.Params(groups=3).groups_of(20) == 3 and htg.Params().groups_of(20) == 10
