"""The sentences under a sweep's table: what they say is what the paired tests say, and nothing of runs without a rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ditbench.eval.base import PerSample
from ditbench.eval.paired_differences import Difference, differences
from ditbench.eval.seed_differences import differences_over_seeds
from ditbench.harness.records import sample_values
from ditbench.harness.records.attempts import experiment_folder, read_all
from ditbench.harness.records.record import write
from ditbench.harness.report import compare, comparison_table, conclusions, report

N = 64
FLOAT_FID = 30.0


@pytest.fixture
def say(add_run, results_dir, metric, fid):
    """say((method, bits, psnr, fid, KiB, {what else the record has}), …) → the sentences of that one group.

    Values per sample lie beside: runs of the same number have the same ones, those of another scatter around it by 1 dB and 3 of FID.
    """

    def said(*runs):
        for method, bits, psnr, score, size, *more in runs:
            settings = dict(*more)
            metrics = {} if psnr is None else {"psnr": metric(psnr, 0.5, unit="dB")}
            metrics |= {"fid": fid(score)} | settings.pop("metrics", {})
            efficiency = {"model_bytes": size * 2**10, "speedup": None} | settings.pop("efficiency", {})
            record = add_run(method, bits, metrics=metrics, efficiency=efficiency, tested=False, **settings)
            folder = experiment_folder(results_dir, "demo") / record.run_id
            run = {"fid": PerSample(scattered(score, 3.0))}
            run |= {} if psnr is None else {"psnr": PerSample(scattered(psnr, 1.0))}
            of_float = {"fid": PerSample(scattered(FLOAT_FID, 3.0))}
            sample_values.save(sample_values.Values(run, of_float, "seed 0"), folder / sample_values.FILE)
            record.artifacts["per_sample"] = sample_values.FILE
            write(record, folder)
        (group,) = compare.groups(read_all(results_dir))
        return conclusions.conclusions(group)

    return said


def scattered(mean, spread):
    values_N = np.random.default_rng(int(10 * mean)).normal(0, spread, N)
    return mean + values_N - values_N.mean()


BLACK = {"value": 0.9, "better": "lower", "n": 64, "ci95": None, "paired": False, "status": "ok"}
BLACK |= {"passport": {"alarms": {"blank": {"share": 0.9, "n": 64}}, "alarmed": ["blank"]}}


def test_who_is_closest_and_how_far_the_last_is_behind_are_said_at_the_fewest_bits(say):
    closest, *_ = say(
        ("rtn", "W8A8", 40.0, 30.0, 520), ("quarot", "W8A8", 42.0, 30.0, 530),
        ("rtn", "W4A4", 20.0, 30.0, 250), ("mid", "W4A4", 24.0, 30.0, 255), ("quarot", "W4A4", 27.0, 30.0, 260),
    )  # fmt: skip
    assert closest.startswith(
        "At W4A4 quarot stays closest to the float model (PSNR 27.00 dB); rtn is 7.00 dB behind quarot ["
    )
    low, high = (float(end) for end in closest.partition("[")[2].rstrip(".").rstrip("]").split(","))
    assert 0 < low < 7.0 < high


def test_how_far_behind_is_positive_whichever_of_the_two_stands_first(say):
    closest, *_ = say(("a", "W4A4", 20.0, 30.0, 250), ("b", "W4A4", 27.0, 30.0, 250))
    low = float(closest.partition("a is 7.00 dB behind b [")[2].partition(",")[0])
    assert 0 < low < 7.0


def test_runs_that_nothing_tells_apart_are_called_so(say):
    closest, *_ = say(("a", "W4A4", 20.0, 30.0, 250), ("b", "W4A4", 20.0, 30.0, 250))
    assert closest == "At W4A4 the tests do not tell a and b apart in PSNR."


def test_of_two_that_are_tied_neither_is_called_closest(say):
    closest, *_ = say(("a", "W4A4", 25.0, 30.0, 250), ("b", "W4A4", 25.0, 30.0, 250), ("c", "W4A4", 20.0, 30.0, 250))
    assert closest.startswith(
        "At W4A4 a and b stay closest to the float model (PSNR 25.00 and 25.00 dB, not told apart); c is 5.00 dB"
    )


def test_runs_that_collapsed_are_named_and_compared_with_nobody(say):
    said = say(
        ("a", "W8A8", 40.0, 30.0, 500), ("rtn", "W4A4", 60.0, 3.0, 200, {"metrics": {"collapse": BLACK}}),
        ("b", "W4A4", 25.0, 30.0, 250), ("c", "W4A4", 20.0, 30.0, 260),
    )  # fmt: skip
    assert said[0].endswith("; rtn W4A4 (blank 90%) collapsed and has no rank.") and "b stays closest" in said[0]
    assert not any("rtn" in each for each in said[1:])


def test_where_all_others_collapsed_that_alone_is_said(say):
    said = say(("a", "W8A8", 40.0, 30.0, 500), ("rtn", "W4A4", 60.0, 3.0, 200, {"metrics": {"collapse": BLACK}}))
    assert said[0] == "rtn W4A4 (blank 90%) collapsed and has no rank."


def test_whose_quality_suffers_is_said_by_bits_and_of_the_others_only_that_they_are_not_told_apart(say):
    _, quality, _ = say(
        ("rtn", "W8A8", 40.0, FLOAT_FID, 500), ("rtn", "W4A8", 30.0, 20.0, 260),
        ("rtn", "W4A4", 20.0, 90.0, 250), ("b", "W4A4", 25.0, 80.0, 250),
    )  # fmt: skip
    assert quality == (
        "In FID, worse than the float model: b and rtn at W4A4; better than the float model: rtn at W4A8; "
        "the tests do not tell the other tested runs from it."
    )


def test_where_nobody_is_told_from_the_float_model_that_is_all_that_is_said(say):
    _, quality, *_ = say(("a", "W8A8", 40.0, FLOAT_FID, 500), ("b", "W8A8", 41.0, FLOAT_FID, 500))
    assert quality == "In FID the tests tell no tested run from the float model."


def test_the_smallest_within_a_decibel_of_plain_rounding_is_named_with_what_it_costs_and_gives(say):
    *_, smallest = say(
        ("rtn", "W8A8", 32.0, 30.0, 500), ("best", "W8A8", 41.0, 30.0, 510), ("good", "W4A8", 31.8, 30.0, 300,
         {"measured": True, "efficiency": {"speedup": 1.25}}), ("poor", "W4A8", 28.0, 30.0, 250),
    )  # fmt: skip
    assert smallest.startswith(
        "The smallest model within 1 dB of rtn W8A8 (PSNR 32.00 dB) is good W4A8: 0.60 × its bytes, −0.20 dB ["
    )
    assert smallest.endswith("], 1.25 × as fast as eager bf16.")


def test_without_plain_rounding_the_best_at_the_most_bits_is_the_measure_and_none_may_be_near(say):
    *_, smallest = say(("a", "W8A8", 41.0, 30.0, 500), ("b", "W8A8", 39.0, 30.0, 490), ("c", "W4A8", 30.0, 30.0, 300))
    assert smallest.startswith(
        "No smaller model is shown to be within 1 dB of a W8A8 (PSNR 41.00 dB); nearest is b W8A8: 0.98 ×"
    )


def test_the_smallest_is_searched_for_so_its_interval_is_widened():
    """Of ten candidates with the freedom of 64 plain samples: t(0.0025) / t(0.025) = 2.906 / 1.998; with that of five, 4.773 / 2.571."""
    found = Difference(-0.5, (-0.8, -0.2), 0.01, 64, "", "", freedom=63)
    assert conclusions._least(found, 1) == pytest.approx(-0.8)
    assert conclusions._least(found, 10) == pytest.approx(-0.5 - 0.3 * 2.906 / 1.998, abs=2e-3)
    assert conclusions._least(replace(found, freedom=5), 10) == pytest.approx(-0.5 - 0.3 * 4.773 / 2.571, abs=2e-3)


def test_a_difference_says_the_freedom_of_its_interval():
    """A few samples in the tails make the spread: fewer than n − 1."""
    values_N = np.zeros(64)
    values_N[:2] = 8.0, -6.0
    (found,) = differences([(PerSample(values_N), PerSample(np.zeros(64)))])
    assert found.freedom < 10
    (over_seeds,) = differences_over_seeds([[found, found, found]])
    assert over_seeds.freedom >= 2 and np.isfinite(over_seeds.freedom)


def test_a_speed_that_was_timed_beside_other_workers_is_not_said(say):
    *_, smallest = say(
        ("rtn", "W8A8", 32.0, 30.0, 500),
        ("good", "W4A8", 32.0, 30.0, 300, {"measured": True, "efficiency": {"speedup": 1.25, "timed_beside": 2}}),
    )
    assert "good W4A8" in smallest and "as fast" not in smallest


def test_one_run_alone_is_held_against_the_float_model_and_nothing_else(say):
    assert say(("rtn", "W8A8", 32.0, FLOAT_FID, 500)) == ["In FID the tests tell no tested run from the float model."]


def test_a_run_that_failed_alone_says_nothing(add_run, results_dir):
    add_run("rtn", "W4A4", error="ValueError: no")
    (group,) = compare.groups(read_all(results_dir))
    assert conclusions.conclusions(group) == [] and conclusions.printed([group], 120) == ""


def test_they_stand_under_the_table_of_a_sweep_and_keep_its_width(sweep, results_dir):
    below = comparison_table(read_all(results_dir), width=120).partition(conclusions.HEAD)[2]
    assert "At W4A4 hadamard stays closest to the float model" in below and "(stress: outliers x32)" in below
    assert max(map(len, below.splitlines())) <= 120


def test_a_report_has_them_too_but_not_where_it_ranks_at_equal_bytes(sweep, results_dir):
    assert conclusions.HEAD.partition(",")[0] in report(results_dir).text
    assert conclusions.HEAD.partition(",")[0] not in report(results_dir, equal_bytes=True).text
