"""What the settings of block reconstruction mean: how steps shrink, what the error is summed over, which do not go together."""

from __future__ import annotations

import math

import pytest
import torch

from ditbench.harness.fitting.conformance import STATIC
from ditbench.harness.fitting.reconstruct import Reconstruction, output_error, reconstruct, sharpness
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.spec import Bits


def test_the_learning_rate_of_scales_falls_along_a_cosine_to_nothing(small_target, small_calibration, monkeypatch):
    rates, kept = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return kept(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    bits = Bits(None, STATIC.act)
    recipe = nearest(small_target, bits, static_ranges(small_target, bits, small_calibration))
    reconstruct(small_target, recipe, small_calibration, Reconstruction(iterations=8, scale_learning_rate=4e-3))
    expected = [4e-3 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates == pytest.approx(expected * len(small_target.blocks), rel=1e-6)


def test_the_error_is_summed_over_channels_or_over_tokens(normal):
    output, target = normal(3, 5, 7), normal(3, 5, 7, seed=1)
    by_hand = {"channels": 0.0, "tokens": 0.0}
    for error in ((output - target).abs() ** 2.4).tolist():
        for token in error:
            by_hand["channels"] += sum(token) / (3 * 5)
            by_hand["tokens"] += sum(token) / (3 * 7)
    for over, expected in by_hand.items():
        assert float(output_error(output, target, 2.4, over)) == pytest.approx(expected)


def test_float_inputs_without_a_pass_for_scales_are_refused():
    with pytest.raises(ValueError, match="float_inputs=true leaves the scales to a pass of their own"):
        Reconstruction(float_inputs=True)
    with pytest.raises(ValueError, match="error_over must be channels or tokens"):
        Reconstruction(error_over="rows")


def test_the_regulariser_waits_and_then_sharpens_linearly():
    settings = Reconstruction(iterations=10, warmup=0.3, sharpness_start=11.0, sharpness_end=4.0)
    assert [sharpness(i, settings) for i in range(3)] == [None] * 3
    assert [sharpness(i, settings) for i in range(3, 10)] == pytest.approx([11, 10, 9, 8, 7, 6, 5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruct": "layer"}, "block or none, got 'layer'"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"scale_power": 1.0}, "scale_power must be above 1, got 1.0"),
        ({"sharpness_end": 0.5}, "sharpness_end must be above 1, got 0.5"),
        ({"warmup": 1.5}, r"warmup must be in \[0, 1\], got 1.5"),
        ({"input_prob": -0.1}, r"input_prob must be in \[0, 1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Reconstruction(**options)
