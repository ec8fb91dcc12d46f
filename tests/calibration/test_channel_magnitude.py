"""How large a channel is: the largest value, the root of the mean square, or a high percentile, over calls."""

from __future__ import annotations

import pytest
import torch

from ditbench.harness.calibration.channel_statistics import ChannelMagnitude


def test_a_magnitude_is_that_of_all_rows_seen(normal):
    calls = [normal(2, 600, 5), 3 * normal(1, 900, 5, seed=1)]
    rows = torch.cat([call.flatten(0, 1) for call in calls]).abs()
    expected = {
        "absmax": rows.amax(0),
        "rms": rows.square().mean(0).sqrt(),
        "p999": torch.stack(
            [call.flatten(0, 1).abs().sort(0).values[place] for call, place in zip(calls, (1198, 898), strict=True)]
        ).amax(0),
    }
    for kind, score in expected.items():
        found = ChannelMagnitude(kind)
        for call in calls:
            found.see(call)
        torch.testing.assert_close(found.of_channels("x"), score, rtol=1e-12, atol=0)
    assert not torch.equal(expected["absmax"], expected["p999"])


def test_a_channel_that_nothing_was_seen_of_is_named():
    with pytest.raises(RuntimeError, match="blocks.0.fc1 saw no calibration batch"):
        ChannelMagnitude("rms").of_channels("blocks.0.fc1")
