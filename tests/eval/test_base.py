"""One metric that breaks costs its own number and no other; what a record cannot hold is not handed to it."""

import errno

import numpy as np
import pytest
import torch

from ditbench.eval import base
from ditbench.eval.base import Measurement, PerSample, evaluate, evaluate_samples


@pytest.fixture
def plugin(monkeypatch):
    """plugin(compute) registers a metric named "plugin" until the test ends."""

    def register(compute):
        made = base.Metric("plugin", compute, "higher", False, "", "a stranger's")
        monkeypatch.setitem(base.known_metrics(), "plugin", made)

    return register


def test_a_metric_that_breaks_has_failed_and_the_others_keep_their_numbers(plugin, evidence):
    def full(evidence):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    plugin(full)
    entries, samples = evaluate_samples(["psnr", "plugin", "ssim"], evidence)
    assert [entries[name]["status"] for name in entries] == ["ok", "failed", "ok"] and set(samples) == {"psnr", "ssim"}
    assert entries["plugin"]["value"] is None and entries["plugin"]["n"] == 0
    assert entries["plugin"]["reason"].startswith("out of memory: OutOfMemoryError in test_base.py")
    assert entries["plugin"]["reason"].endswith("CUDA out of memory.")


@pytest.mark.parametrize(
    "measurement",
    [
        Measurement(float("nan"), None, 3),
        Measurement(1.0, (float("-inf"), 2.0), 3),
        Measurement(1.0, (0.0, 2.0), 3, {"side": np.int64(8)}),
        Measurement(1.0, (0.0, 2.0), 3, {"per_frame": [float("nan")]}),
        Measurement(1.0, (0.0, 2.0), 3, {}, PerSample(np.ones(3))),
        Measurement(1.0, (0.0, 2.0), 96, {}, PerSample(np.ones(96), strata_N=np.zeros(95, int))),
        Measurement(1.0, (0.0, 2.0), 96, {}, PerSample(np.append(np.ones(95), np.inf))),
    ],
)
def test_what_a_record_cannot_hold_fails_here_and_not_when_the_run_is_written(plugin, evidence, measurement):
    plugin(lambda evidence: measurement)
    entry = evaluate(["plugin"], evidence)["plugin"]
    assert (entry["status"], entry["value"]) == ("failed", None) and entry["reason"]


def test_a_value_may_be_a_number_of_any_library(plugin, evidence):
    values_N = np.ones(96)
    plugin(
        lambda evidence: Measurement(
            torch.tensor(2.0), (np.float32(1), torch.tensor(3)), np.int64(96), {}, PerSample(values_N)
        )
    )
    entry = evaluate(["plugin"], evidence)["plugin"]
    assert (entry["status"], entry["value"], entry["ci95"], entry["n"]) == ("ok", 2.0, [1.0, 3.0], 96)


def test_a_disk_that_is_full_is_not_taken_for_a_metric_that_broke(plugin, evidence):
    def no_room(evidence):
        raise OSError(errno.ENOSPC, "No space left on device")

    plugin(no_room)
    with pytest.raises(OSError, match="No space left"):
        evaluate(["plugin"], evidence)


def test_names_may_come_one_by_one(evidence):
    assert set(evaluate((name for name in ("psnr", "ssim")), evidence)) == {"psnr", "ssim"}
