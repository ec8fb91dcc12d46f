"""CLQ as a whole: its parts together, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clq_cases import BLOCK, BOTH, BOTH_STATIC, FAST, LAST

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC, relative_error
from ditbench.harness.fitting.trial_layers import float_model
from ditbench.harness.quant.spec import Bits
from ditbench.methods import clq, rtn
from ditbench.methods.clq import Params


@pytest.mark.parametrize("bits", [BOTH, BOTH_STATIC], ids=["dynamic", "static"])
def test_with_no_part_it_is_rounding_to_nearest(bits, small_target, small_calibration):
    params = replace(FAST, parts="none")
    state = clq.fit(small_target, small_calibration, bits, params)
    plain = rtn.fit(small_target, small_calibration, bits, rtn.Params())
    assert {n: t.tolist() for n, t in state.items()} == {n: t.tolist() for n, t in plain.items()}
    models = [
        build(small_target, module.apply(small_target, own, bits, p), dtype=torch.float32, backend="simulate")
        for module, own, p in ((clq, state, params), (rtn, plain, rtn.Params()))
    ]
    for one, other in zip(*(quant_layers(model).values() for model in models), strict=True):
        assert torch.equal(one.kernel.unpacked(), other.kernel.unpacked())
        assert one.kernel.act.spec == other.kernel.act.spec


def test_each_part_leaves_its_own_traces(small_target, small_calibration):
    kinds = {
        parts: {
            key.rsplit("/", 1)[1] for key in clq.fit(small_target, small_calibration, BOTH, replace(FAST, parts=parts))
        }
        for parts in ("cbc", "cbc+obs", "clps", "cbc+obs+clps")
    }
    assert kinds == {
        "cbc": set(),
        "cbc+obs": {"order", "signs"},
        "clps": {"weight_ratios", "act_clip"},
        "cbc+obs+clps": {"order", "signs", "weight_ratios", "act_clip"},
    }


def test_layers_that_share_an_input_share_its_clip(small_target, small_calibration):
    for bits, key in ((BOTH, "act_clip"), (BOTH_STATIC, "act_low")):
        state = clq.fit(small_target, small_calibration, bits, FAST)
        assert len({float(state[f"{LAST}.attn1.to_{operand}/{key}"]) for operand in "qkv"}) == 1


def test_cbc_changes_static_ranges_and_clps_lies_inside_them(small_target, small_calibration):
    floats, crossed, clipped = (
        clq.fit(small_target, small_calibration, BOTH_STATIC, replace(FAST, parts=parts))
        for parts in ("none", "cbc", "cbc+clps")
    )
    name = f"{LAST}.ff.net.2"
    assert float(crossed[f"{name}/act_high"]) != float(floats[f"{name}/act_high"])
    first = f"{BLOCK}.attn1.to_q"
    torch.testing.assert_close(crossed[f"{first}/act_high"], floats[f"{first}/act_high"])
    for end in ("low", "high"):
        for layer in small_target.layers[:6]:  # the first block reads the same in both
            ratio = float(clipped[f"{layer}/act_{end}"] / crossed[f"{layer}/act_{end}"])
            assert min(abs(ratio - share) for share in (1.0, 0.8, 0.6, 0.4)) < 1e-5


def test_with_outlier_channels_it_loses_less_than_rounding_alone(own_model, small_calibration):
    own_model.inject_outliers(channels=4, log2_factor=5, seed=0)
    target = own_model.target()
    inputs = own_model.step_inputs(4)
    params = replace(FAST, grid=10)
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**inputs).sample
        recipes = (
            clq.apply(target, clq.fit(target, small_calibration, BOTH, params), BOTH, params),
            rtn.apply(target, {}, BOTH, rtn.Params()),
        )
        errors = [relative_error(build(target, r, dtype=torch.float32)(**inputs).sample, expected) for r in recipes]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bits", [Bits(BOTH.weight, None), Bits(None, BOTH.act)], ids=["W4A16", "W16A4"])
def test_one_side_alone_is_searched_alone(bits, small_target, small_calibration):
    state = clq.fit(small_target, small_calibration, bits, FAST)
    assert any(key.endswith("weight_ratios") for key in state) == (bits.weight is not None)
    assert any(key.endswith("act_clip") for key in state) == (bits.act is not None)
    clq.apply(small_target, state, bits, FAST)


def test_layers_outside_the_blocks_are_rounded_plainly(small_model, small_calibration):
    target = small_model.target("all")
    params = replace(FAST, parts="obs")
    recipe = clq.apply(target, clq.fit(target, small_calibration, DYNAMIC, params), DYNAMIC, params)
    outside = [name for name in target.layers if not name.startswith("transformer_blocks.")]
    assert outside and all(recipe.layers[name].transform.is_identity for name in outside)
    assert all(recipe.layers[name].act.spec == DYNAMIC.act for name in outside)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"parts": "cbc+osb"}, "parts are none, or some of cbc, obs, clps"),
        ({"parts": "obs+obs"}, "parts are none"),
        ({"cbc_depth": "2"}, "cbc_depth must be one of all, 1"),
        ({"permutation": "sorted"}, "permutation must be one of"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"probe": ()}, "probe and lowest"),
        ({"probe": (0.0, 1.0)}, "probe and lowest"),
        ({"reach": -1}, "reach must be at least 0"),
    ],
)
def test_values_that_cannot_be_used_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Params(**values)


def test_what_hydra_gives_is_what_python_gives():
    assert Params(cbc_depth=1, probe=[0.5, 1.0]) == Params(cbc_depth="1", probe=(0.5, 1.0))
    given = registry.defaults("clq") | {"cbc_depth": 1, "probe": [0.5, 1.0]}  # as the command line gives them
    assert registry.params_of(given) == Params(cbc_depth="1", probe=(0.5, 1.0))


@pytest.mark.parametrize(("rows_of_tokens", "rows"), [(100, 6), (4, 4), (1, 2)])
def test_the_search_has_a_budget_of_tokens_but_sees_every_step(rows_of_tokens, rows, small_target, small_calibration):
    stream = BlockStream(float_model(small_target, [], torch.float32), small_target, small_calibration)
    per_row = stream.inputs[0].hidden_BTC.shape[1]
    calls = stream.sample(steps=2, rows=3, tokens=rows_of_tokens * per_row)
    assert sum(len(call.hidden_BTC) for call in calls) == rows
