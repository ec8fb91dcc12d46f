"""A recording is read in as many rows as its tokens allow, so that what observes it fits where drawing fitted."""

from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.fitting import registry
from ditbench.harness.measurement.layer_errors import error_atlas
from ditbench.harness.models import batch_sizes
from ditbench.harness.models.batch_sizes import rows_by_tokens
from ditbench.harness.quant.spec import Bits, QuantSpec

W8A8 = Bits(QuantSpec(8, "per_channel"), QuantSpec(8, "per_token", dynamic=True))


@pytest.fixture
def long(small_model, small_sampler, small_calibration, monkeypatch):
    """What `small_calibration` is, of a model whose rows are long: two of them at once."""
    assert small_calibration.rows_at_once == 64
    tokens = batch_sizes.tokens_of_row(small_model, float_copy(small_model.target(), dtype=torch.float32))
    monkeypatch.setattr(batch_sizes, "TOKENS", 2 * tokens + 1)
    return calibrate(small_model, small_sampler, n=3, seed=0, batch_size=64)


def test_true_sizes_are_read_in_few_rows():
    found = [rows_by_tokens(tokens, 64) for tokens in (64, 256, 4608, 32_760, 10**6)]
    assert found == [64, 64, 4, 1, 1], "tiny-dit, DiT-XL/2, FLUX at 1024², Wan at 480p"


def test_whoever_reads_gets_no_more_rows_at_once(long):
    assert long.rows_at_once == 2 and long.num_rows(0) > 2
    assert {call.num_rows for _, call in long.batches()} == {2}
    assert all(call.num_rows <= 2 for call in long.rows(0, 5)) and sum(c.num_rows for c in long.rows(0, 5)) == 5
    assert {call.num_rows for _, call in long.batches(4, steps=[0])} == {4, 2}, "unless asked for"


def test_statistics_and_layer_errors_are_those_of_larger_batches(small_target, small_calibration, long):
    expected, found = (channel_stats(small_target, each) for each in (small_calibration, long))
    for name, stats in expected.items():
        for field, value in vars(stats).items():
            torch.testing.assert_close(getattr(found[name], field), value, rtol=1e-4, atol=1e-5)
    method = registry.method("rtn")
    recipe = method.apply(small_target, {}, W8A8, method.Params())
    errors = []
    for each in (small_calibration, long):
        quantized = build(small_target, recipe, dtype=torch.float32, backend="simulate")
        errors.append(torch.from_numpy(error_atlas(small_target, recipe, quantized, each).sqnr_db_LS))
    torch.testing.assert_close(errors[1], errors[0], rtol=0, atol=0.5, equal_nan=True)
