from dataclasses import replace

import pytest
from scipy import stats

from ditbench.harness.report import report
from ditbench.harness.report.over_seeds import CI_METHOD, over_seeds, t_interval


@pytest.fixture
def seeded(add_run):
    """seeded("rtn", psnr by seed) → one record per seed."""

    def add(method, values, metric, **more):
        runs = []
        for seed, value in enumerate(values):
            entry = metric(value, 0.5, unit="dB", floor=0.1 * (seed + 1))
            run = add_run(method, metrics={"psnr": entry}, experiment=f"seed{seed}", **more)
            runs.append(replace(run, config=run.config | {"seed": seed}, experiment="demo"))
        return runs

    return add


def test_seeds_become_one_row_with_their_mean_and_students_interval(seeded, metric):
    (row,) = over_seeds(seeded("rtn", [20.0, 21.0, 23.0], metric))
    entry = row.metrics["psnr"]
    expected = stats.t.interval(0.95, 2, loc=64 / 3, scale=stats.sem([20.0, 21.0, 23.0]))
    assert entry["value"] == pytest.approx(64 / 3) and entry["ci95"] == pytest.approx(list(expected))
    assert entry["noise_floor"] == pytest.approx(0.3) and entry["n"] == 64
    assert entry["passport"]["ci_method"] == CI_METHOD and entry["passport"]["seeds"] == 3
    assert row.config["seed"] == "0, 1, 2"


def test_times_and_sizes_are_means_and_labels_stay(seeded, metric):
    runs = seeded("rtn", [20.0, 21.0], metric, measured=True)
    runs[1] = replace(runs[1], efficiency=runs[1].efficiency | {"speedup": runs[0].efficiency["speedup"] + 1})
    (row,) = over_seeds(runs)
    assert row.efficiency["speedup"] == pytest.approx(runs[0].efficiency["speedup"] + 0.5)
    assert row.efficiency["latency_ms"] == runs[0].efficiency["latency_ms"]
    assert row.efficiency["kind"] == "measured" and row.bits["label"] == "W4A8"


def test_only_the_seed_may_differ(seeded, metric):
    runs = seeded("rtn", [20.0, 21.0], metric)
    other = replace(runs[1], config=runs[1].config | {"protocol": {"name": "another"}})
    assert len(over_seeds([runs[0], other])) == 2
    assert len(over_seeds([runs[0], seeded("quarot", [20.0, 21.0], metric)[1]])) == 2


def test_a_failed_seed_stays_a_row_of_its_own_and_is_no_part_of_the_mean(seeded, metric):
    runs = seeded("rtn", [20.0, 21.0, 40.0], metric)
    failed = replace(runs[2], status="failed", error="out of memory")
    merged, alone = over_seeds([*runs[:2], failed])
    assert merged.metrics["psnr"]["value"] == 20.5 and alone.status == "failed"


def test_a_metric_that_one_seed_skipped_is_skipped(seeded, metric):
    runs = seeded("rtn", [20.0, 21.0], metric)
    runs[1] = replace(runs[1], metrics={"psnr": metric(None, reason="no weights")})
    (row,) = over_seeds(runs)
    assert row.metrics["psnr"]["status"] == "skipped" and row.metrics["psnr"]["reason"] == "no weights"


def test_the_interval_of_equal_values_is_a_point():
    assert t_interval([2.0, 2.0]) == (2.0, 2.0)


def test_a_report_without_twins_is_the_same_with_and_without_merging(add_run, results_dir):
    add_run("fp", "W16A16")
    add_run("rtn")
    assert report(results_dir, merge_seeds=True).text == report(results_dir).text


def test_seeds_of_other_weights_are_not_averaged(seeded, metric):
    first, second = seeded("rtn", [20.0, 21.0], metric)
    assert len(over_seeds([first, replace(second, env=second.env | {"weights_sha256": "1" * 64})])) == 2
