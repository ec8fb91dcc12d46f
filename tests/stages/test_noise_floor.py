"""What a run has against the float model of the same noise, and the noise floor that follows."""

import numpy as np
import pytest
from scipy.stats import t

from ditbench.eval.base import PerSample
from ditbench.harness.stages.evaluate import apart, hold_against_float


def test_the_noise_floor_is_half_of_the_students_interval_of_the_paired_difference():
    random = np.random.default_rng(0)
    theirs = random.normal(size=30)
    ours = theirs + random.normal(0.2, 0.1, 30)
    entries = {"m": {}, "of the set": {}}
    hold_against_float(entries, {"m": PerSample(ours), "of the set": PerSample(ours)}, {"m": PerSample(theirs)})
    delta = ours - theirs
    error = delta.std(ddof=1) / np.sqrt(30)
    low, high = entries["m"]["against_float"]["ci95"]
    assert entries["m"]["against_float"]["difference"] == pytest.approx(delta.mean())
    assert (low + high) / 2 == pytest.approx(delta.mean()) and entries["m"]["noise_floor"] == pytest.approx(
        (high - low) / 2
    )
    # Degrees of freedom are at most n − 1, fewer where the values have heavy tails.
    assert t.ppf(0.975, 29) * error <= entries["m"]["noise_floor"] * (1 + 1e-9) < 1.2 * t.ppf(0.975, 29) * error
    assert entries["of the set"] == {}, "nothing to hold it against"


def test_seeds_set_the_floor_by_how_far_two_of_them_lie_apart():
    values = [3.0, 5.0, 4.5]
    assert apart(values) == pytest.approx(t.ppf(0.975, 2) * np.sqrt(2) * np.std(values, ddof=1))
    assert apart([3.0, None, 4.5]) is None


def test_a_metric_that_counts_other_samples_of_each_model_is_held_against_nothing():
    """A stranger's may measure only what it finds: no pair is left, and the run goes on."""
    ours, theirs = np.array([1.0, 2.0, np.nan, np.nan]), np.array([np.nan, np.nan, 1.0, 2.0])
    entries = {"m": {}}
    hold_against_float(entries, {"m": PerSample(ours)}, {"m": PerSample(theirs)})
    assert entries == {"m": {}}
