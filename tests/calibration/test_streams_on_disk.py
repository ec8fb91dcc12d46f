"""Block inputs and block outputs that are too large for memory lie on disk, and give the same numbers bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ditbench.harness.build.build import build
from ditbench.harness.calibration import block_stream
from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.calibration.on_disk import StoredTensor
from ditbench.harness.common.files import tensors_sha256
from ditbench.harness.common.scratch import SCRATCH
from ditbench.harness.fitting import registry
from ditbench.harness.measurement import layer_errors
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec

W4A8 = Bits(QuantSpec(4, "per_channel"), QuantSpec(8, "per_token", dynamic=True))
W8A8 = Bits(QuantSpec(8, "per_channel"), QuantSpec(8, "per_tensor", dynamic=False))


@pytest.fixture
def on_disk(monkeypatch):
    """From now on nothing is held."""
    return lambda: [monkeypatch.setattr(module, "HELD_BYTES", 0) for module in (block_stream, layer_errors)]


def stream_of(target, calibration, **settings) -> BlockStream:
    return BlockStream(build(target, ModelRecipe({}), dtype=torch.float32), target, calibration, **settings)


def states(stream: BlockStream) -> list[torch.Tensor]:
    return [call.hidden_BTC.clone() for call in stream.calls()]


def test_a_stream_on_disk_goes_through_the_same_states(small_target, small_calibration, on_disk):
    held = stream_of(small_target, small_calibration)
    on_disk()
    stored = stream_of(small_target, small_calibration)
    assert held.spool is None and stored.spool is not None
    for (_, one), (_, other) in zip(held, stored, strict=True):
        assert all(isinstance(call.state, StoredTensor) for call in stored.inputs)
        assert all(torch.equal(a, b) for a, b in zip(states(held), states(stored), strict=True))
        for ours, theirs in zip(held.inputs, stored.inputs, strict=True):
            assert ours.is_like(theirs) and ours.tokens == theirs.tokens and ours.num_rows == theirs.num_rows
        samples = held.sample(3, 2, 64), stored.sample(3, 2, 64)
        assert all(torch.equal(a.hidden_BTC, b.hidden_BTC) for a, b in zip(*samples, strict=True))
        assert torch.equal(next(iter(held.outputs(one))), next(iter(stored.outputs(other))))


def test_only_one_blocks_states_lie_on_disk(small_target, small_calibration, on_disk):
    on_disk()
    stream = stream_of(small_target, small_calibration)
    files = [len(list(stream.spool.scratch.folder.iterdir())) for _ in stream]
    assert len(files) == len(small_target.blocks) and len(set(files)) == 1


def test_streams_that_restart_at_each_other_keep_what_either_needs(small_target, small_calibration, on_disk):
    on_disk()
    floats, stream = (stream_of(small_target, small_calibration) for _ in range(2))
    (_, block), *_ = floats
    before = states(floats)
    stream.restart_at(floats)
    floats.advance(block)
    assert all(torch.equal(a, b) for a, b in zip(before, states(stream), strict=True))


def test_a_budget_of_rows_is_the_same_on_disk(small_target, small_calibration, on_disk):
    few = stream_of(small_target, small_calibration, max_bytes=1)
    on_disk()
    stored = stream_of(small_target, small_calibration, max_bytes=1)
    assert [call.num_rows for call in few.inputs] == [call.num_rows for call in stored.inputs]
    assert all(call.num_rows == 1 for call in few.inputs)


@pytest.mark.parametrize(
    ("name", "bits", "settings"),
    [
        ("gptq", W4A8, {}),
        ("clq", W4A8, {"grid": 4}),
        ("q_diffusion", W8A8, {"iterations": 5, "input_prob": 0.5}),
    ],
)
def test_fits_on_disk_learn_the_same_bit_for_bit(small_target, small_calibration, on_disk, name, bits, settings):
    method = registry.method(name)
    params = method.Params(**settings)
    held = method.fit(small_target, small_calibration, bits, params)
    on_disk()
    assert tensors_sha256(method.fit(small_target, small_calibration, bits, params)) == tensors_sha256(held)


def test_layer_errors_on_disk_are_the_same_bit_for_bit(small_target, small_calibration, on_disk, tmp_path):
    method = registry.method("rtn")
    recipe = method.apply(small_target, {}, W4A8, method.Params())
    model = build(small_target, recipe, dtype=torch.float32, backend="simulate")
    held = layer_errors.error_atlas(small_target, recipe, model, small_calibration)
    on_disk()
    stored = layer_errors.error_atlas(small_target, recipe, model, small_calibration)
    assert np.array_equal(held.noise_LS, stored.noise_LS) and np.array_equal(held.signal_LS, stored.signal_LS)


def test_the_spool_lies_in_the_recordings_cache(small_target, small_calibration, on_disk, tmp_path):
    on_disk()
    stream = stream_of(small_target, replace(small_calibration, cache=tmp_path))
    assert stream.spool.scratch.folder.parent == tmp_path / SCRATCH
