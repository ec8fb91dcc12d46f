"""CLQ's cross-block calibration: every block sees what the finished blocks before it give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clq_cases import BLOCK, BOTH, FAST, FLOAT, block_inputs, entered

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.fitting.conformance import relative_error
from ditbench.methods import clq


@pytest.mark.parametrize("depth", ["all", "1"])
def test_without_rounding_a_block_is_calibrated_on_what_the_float_model_gives(depth, five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, parts="cbc+obs", cbc_depth=depth, permutation="group")
    # the rotation itself rounds in the last place of a float32, so it is taken out for "exactly"
    monkeypatch.setattr(clq, "transforms", lambda *args: {})
    seen, _ = entered(target, calibration, FLOAT, params, monkeypatch)
    expected = block_inputs(clq.float_model(target, target.layers, torch.float32), calibration, target.blocks)
    assert list(seen) == list(target.blocks)
    assert all(torch.equal(seen[name], expected[name]) for name in target.blocks)


def test_a_block_is_calibrated_on_what_the_finished_model_gives_it(five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, reach=1)
    seen, state = entered(target, calibration, BOTH, params, monkeypatch)
    finished = build(target, clq.apply(target, state, BOTH, params), dtype=torch.float32)
    expected = block_inputs(finished, calibration, target.blocks)
    floats = block_inputs(float_copy(target, dtype=torch.float32), calibration, target.blocks)
    for name in target.blocks:
        assert relative_error(seen[name], expected[name]) < 1e-6
        assert name == BLOCK or relative_error(seen[name], floats[name]) > 1e-3


def test_at_depth_one_only_the_block_before_is_rounded(five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, parts="cbc+obs", cbc_depth="1")
    seen, state = entered(target, calibration, BOTH, params, monkeypatch)
    recipe = clq.apply(target, state, BOTH, params)
    for index in (1, 3):
        before = target.layers_in(target.blocks[index - 1])
        one = build(target, replace(recipe, layers={n: recipe.layers[n] for n in before}), dtype=torch.float32)
        expected = block_inputs(one, calibration, target.blocks[index : index + 1])[target.blocks[index]]
        assert relative_error(seen[target.blocks[index]], expected) < 1e-6
    deep, _ = entered(target, calibration, BOTH, replace(params, cbc_depth="all"), monkeypatch)
    assert torch.equal(deep[target.blocks[1]], seen[target.blocks[1]])
    assert relative_error(deep[target.blocks[3]], seen[target.blocks[3]]) > 1e-3


def test_without_cbc_every_block_is_calibrated_on_the_float_network(five_blocks, monkeypatch):
    target, calibration = five_blocks
    seen, _ = entered(target, calibration, BOTH, replace(FAST, parts="obs"), monkeypatch)
    expected = block_inputs(float_copy(target, dtype=torch.float32), calibration, target.blocks)
    assert all(relative_error(seen[name], expected[name]) < 1e-5 for name in target.blocks)


def test_a_blocks_inputs_depend_on_the_quantizers_before_it_only(five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, parts="cbc+obs")
    plain, _ = entered(target, calibration, BOTH, params, monkeypatch)
    third, round_layer = target.layers_in(target.blocks[2]), clq.round_layer

    def coarser(target, layer, state, bits, params, name):
        round_layer(target, layer, state, bits.with_widths(2, 2) if name in third else bits, params, name)

    monkeypatch.setattr(clq, "round_layer", coarser)
    changed, _ = entered(target, calibration, BOTH, params, monkeypatch)
    assert [torch.equal(plain[name], changed[name]) for name in target.blocks] == [True, True, True, False, False]


def test_the_sampler_is_not_run_again_and_nothing_runs_through_the_whole_model(five_blocks, monkeypatch):
    """What runs up to the first block, once per recorded call and stream and twice before to see where rows lie, is all that the
    model's own forward does.
    """
    target, calibration = five_blocks
    entrances, finals = [], []
    first = type(target.transformer).forward
    monkeypatch.setattr(
        type(target.transformer), "forward", lambda self, *a, **k: entrances.append(1) or first(self, *a, **k)
    )
    handle = target.transformer.proj_out_2.register_forward_hook(lambda *_: finals.append(1))  # copies take it along
    clq.fit(target, calibration, BOTH, FAST)
    handle.remove()
    assert len(entrances) == 2 * (2 + calibration.num_batches()) and not finals
