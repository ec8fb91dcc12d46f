"""GPTQ as a method: blocks one after the other, within a byte budget."""

from dataclasses import replace

import pytest
import torch

from ditbench.harness.build.build import build
from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.fitting.blockwise import Hessian, round_blockwise
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.target import Site
from ditbench.harness.quant.transforms import Transform
from ditbench.methods import gptq, rtn

W3A16 = Bits(QuantSpec(3, "per_channel"), None)


def block_error(target, calibration, method):
    """Distance of the last block's output from the float model's, on the calibration."""
    params = method.Params()
    recipe = method.apply(target, method.fit(target, calibration, W3A16, params), W3A16, params)
    exact = build(target, ModelRecipe(layers={}), dtype=torch.float32)
    rounded = build(target, recipe, dtype=torch.float32)
    total = 0.0
    for step, inputs in calibration.batches():
        for model in (exact, rounded):
            model.clock.set(step, calibration.num_steps)
        with torch.no_grad():
            total += float((exact(**inputs).sample - rounded(**inputs).sample).square().sum())
    return total


def test_the_models_output_is_closer_than_with_rounding_to_nearest(small_target, small_calibration):
    assert block_error(small_target, small_calibration, gptq) < 0.8 * block_error(small_target, small_calibration, rtn)


def test_each_block_is_observed_behind_the_rounded_blocks_before_it(small_target, small_calibration):
    """The second block's Hessians must change when the first block's rounding does; the first block's must not."""
    hessians = {}

    def rounder(bits, store):
        def round_weight(name, weight, hessian):
            store[name] = hessian
            return quantize_weight(weight, QuantSpec(bits, "per_channel"))

        return round_weight

    for bits in (2, 8):
        hessians[bits] = {}
        round_blockwise(small_target, small_calibration, rounder(bits, hessians[bits]))
    first = [name for name in small_target.layers if name.startswith(small_target.blocks[0])]
    second = [name for name in small_target.layers if name.startswith(small_target.blocks[1])]
    assert all(torch.equal(hessians[2][name], hessians[8][name]) for name in first)
    assert all(not torch.allclose(hessians[2][name], hessians[8][name]) for name in second)


@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "transformed"])
def test_layers_that_read_one_input_share_the_hessian_that_each_would_have_made(
    transformed, small_target, small_calibration, monkeypatch
):
    """The same numbers as with a site for every layer, from four products of a block's inputs instead of six."""

    def hessians_of(target, transforms):
        found, products = {}, []
        see = Hessian.see
        monkeypatch.setattr(Hessian, "see", lambda self, x: (products.append(self), see(self, x))[1])

        def round_weight(name, weight, hessian):
            found[name] = hessian
            return quantize_weight(weight, QuantSpec(4, "per_channel"))

        round_blockwise(target, small_calibration, round_weight, transforms)
        monkeypatch.setattr(Hessian, "see", see)
        return found, len(products) / small_calibration.num_batches()

    own = {name: Transform(scale_C=torch.linspace(1, 2, 48)) for name in small_target.layers if "attn1.to_q" in name}
    alone = replace(small_target, sites=tuple(Site(name, (name,)) for name in small_target.layers))
    shared, products = hessians_of(small_target, own if transformed else {})
    expected, products_alone = hessians_of(alone, own if transformed else {})
    assert products_alone == 2 * 6 and products == 2 * (5 if transformed else 4)
    assert shared.keys() == expected.keys() == set(small_target.layers)
    assert all(torch.equal(shared[name], expected[name]) for name in expected)


def test_a_stream_without_changes_gives_the_float_models_hidden_states(small_target, small_calibration):
    model = build(small_target, ModelRecipe(layers={}), dtype=torch.float32)
    seen = {name: [] for name in small_target.blocks}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name in small_target.blocks
    ]
    for step, inputs in small_calibration.batches():
        model.clock.set(step, small_calibration.num_steps)
        with torch.no_grad():
            model(**inputs)
    for handle in handles:
        handle.remove()
    stream = BlockStream(model, small_target, small_calibration)
    for name, _ in stream:
        for call, expected in zip(stream.calls(), seen[name], strict=True):
            torch.testing.assert_close(call.hidden_BTC, expected)


def test_a_small_budget_keeps_fewer_rows_of_every_step(small_target, small_calibration):
    model = build(small_target, ModelRecipe(layers={}), dtype=torch.float32)
    whole = BlockStream(model, small_target, small_calibration)
    held = sum(call.hidden_BTC.nbytes for call in whole.calls())
    half = BlockStream(model, small_target, small_calibration, max_bytes=held // 2)
    kept = list(half.calls())
    assert sum(call.hidden_BTC.nbytes for call in kept) <= held // 2
    assert [call.step for call in kept] == [call.step for call in whole.calls()]


def test_an_option_away_from_its_default_changes_the_codes(small_target, small_calibration):
    plain = gptq.fit(small_target, small_calibration, W3A16, gptq.Params())
    for params in (gptq.Params(damp=0.5), gptq.Params(act_order=True)):
        other = gptq.fit(small_target, small_calibration, W3A16, params)
        assert any(not torch.equal(plain[name], other[name]) for name in plain)
    blocked = gptq.fit(small_target, small_calibration, W3A16, gptq.Params(block=7))
    assert all(torch.equal(plain[name], blocked[name]) for name in plain)


@pytest.mark.parametrize("ranges", ["minmax", "mse", "shrink"])
def test_scales_are_searched_as_asked(ranges, small_target, small_calibration):
    state = gptq.fit(small_target, small_calibration, W3A16, gptq.Params(ranges=ranges))
    for name in small_target.layers:
        expected = quantize_weight(small_target.weight(name), W3A16.weight, ranges=ranges).scale_OG
        torch.testing.assert_close(state[f"{name}/weight_scale"], expected, rtol=1e-6, atol=0)


def test_groups_take_their_scales_from_weights_with_or_without_their_blocks_errors(small_target, small_calibration):
    """Groups of 12 in blocks of 48: the first group's scales are the same, those behind it are of weights that have moved or not."""
    grouped = Bits(QuantSpec(3, "per_group", group_size=12), None)
    ahead, before = (
        gptq.fit(small_target, small_calibration, grouped, gptq.Params(block=48, ahead=ahead))
        for ahead in (True, False)
    )
    name = next(name for name in small_target.layers if name.endswith("attn1.to_q"))
    still = quantize_weight(small_target.weight(name), grouped.weight).scale_OG
    torch.testing.assert_close(before[f"{name}/weight_scale"], still, rtol=1e-6, atol=0)
    assert torch.equal(ahead[f"{name}/weight_scale"][:, 0], before[f"{name}/weight_scale"][:, 0])
    assert not torch.equal(ahead[f"{name}/weight_scale"][:, 1:], before[f"{name}/weight_scale"][:, 1:])
