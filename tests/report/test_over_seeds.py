from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from ditbench.eval.base import PerSample
from ditbench.eval.paired_differences import holm
from ditbench.eval.seed_differences import MODERATED, OF_THE_SAMPLES, OVER_SEEDS
from ditbench.eval.statistics import INFLUENCE_OF_LOG, INFLUENCE_OF_PAIRS, WILSON
from ditbench.harness.records.attempts import experiment_folder, read_all
from ditbench.harness.records.record import add_metric
from ditbench.harness.report import compare, paired, paired_text, report
from ditbench.harness.report.marks import verdicts
from ditbench.harness.report.over_seeds import over_seeds
from ditbench.harness.report.table import table


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
    assert entry["passport"]["ci_method"] == OVER_SEEDS and entry["passport"]["seeds"] == 3
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


@pytest.fixture
def of_seeds(add_run, results_dir, metric):
    """of_seeds({"a": [psnr by seed], …}) → the one group of rows over seeds; the float row is of seed 0 only."""

    def make(by_method, **more):
        add_run("fp", "W16A16", metrics={"psnr": metric(52.0, 0.1)})
        for method, values in by_method.items():
            for seed, value in enumerate(values):
                add_run(method, metrics={"psnr": metric(value, 0.01)}, seed=seed, **more)
        (group,) = compare.groups(over_seeds(read_all(results_dir)), any_seed=True)
        return group

    return make


def marks(group):
    return {r.method: v.mark for r, v in zip(group.records, verdicts(group, "psnr"), strict=True)}


def test_the_float_row_stays_in_the_table_whatever_its_seeds(of_seeds):
    group = of_seeds({"a": [20.0, 21.0, 22.0]})
    assert [record.method for record in group.records] == ["fp", "a"] and "seeds 0, 1, 2" in group.label
    built = table(group, ["psnr"])
    place = [column.title for column in built.columns].index("seeds")
    assert [row.cells[place].text for row in built.rows] == ["0", "0, 1, 2"]


def test_marks_are_those_of_the_paired_tests_over_the_seeds(of_seeds):
    group = of_seeds({"a": [30.0, 32.0, 31.0], "b": [20.0, 22.0, 21.1], "c": [30.1, 31.8, 31.05]})
    found = {(each.first, each.second): each for each in paired.comparisons(group, "psnr")}
    steps = np.array([30.0, 32.0, 31.0]) - [20.0, 22.0, 21.1]
    assert found["a", "b"].difference.value == pytest.approx(steps.mean())
    assert found["a", "b"].difference.p == pytest.approx(
        stats.ttest_1samp(steps, 0).pvalue, rel=1e-4
    )  # values lie on disk in float32
    assert not found["a", "c"].told_apart and marks(group) == {"fp": "", "a": "best", "b": "", "c": "best"}


def test_one_seed_of_which_rows_over_seeds_are_asked_says_what_it_cannot_know(of_seeds):
    notes = table(of_seeds({"a": [30.0], "b": [20.0]}), ["psnr"]).notes
    (note,) = [note for note in notes if note.startswith("1 seed: intervals and tests are of its samples")]
    assert "cannot be known from fewer than 3" in note


def test_two_seeds_say_what_they_cannot_know(of_seeds):
    group = of_seeds({"a": [30.0, 30.0], "b": [20.0, 29.0]})
    (note,) = [note for note in table(group, ["psnr"]).notes if note.startswith("2 seeds")]
    assert "cannot be known from fewer than 3" in note
    entry = next(record for record in group.records if record.method == "b").metrics["psnr"]
    low, high = entry["ci95"]
    assert (high - low) / 2 == pytest.approx(0.01 / 2**0.5, rel=0.01) and entry["passport"][
        "ci_method"
    ] == OF_THE_SAMPLES


def test_a_run_that_lacks_a_seed_is_shown_and_not_ranked(of_seeds):
    group = of_seeds({"a": [30.0, 31.0, 32.0], "b": [20.0, 21.0, 22.1], "c": [40.0, 41.0]})
    assert marks(group) == {"fp": "", "a": "best", "b": "second", "c": ""}
    assert table(group, ["psnr"]).not_ranked == ["c W4A8 not ranked, 2 of 3 seeds"]


def test_a_collapse_at_one_seed_takes_the_rank_at_all(add_run, results_dir, metric):
    alarm = metric(0.5, better="lower") | {"passport": {"alarms": {"blank": {"share": 0.5}}, "alarmed": ["blank"]}}
    for seed in range(3):
        add_run("a", metrics={"psnr": metric(30.0 + seed)} | ({"collapse": alarm} if seed == 1 else {}), seed=seed)
    (row,) = over_seeds(read_all(results_dir))
    assert compare.alarms(row) == ["blank 50%"]


def test_a_report_without_twins_has_the_same_numbers_with_and_without_merging(add_run, results_dir):
    add_run("fp", "W16A16")
    add_run("rtn")
    assert report(results_dir, format="csv", merge_seeds=True).text == report(results_dir, format="csv").text


def test_seeds_of_other_weights_are_not_averaged(seeded, metric):
    first, second = seeded("rtn", [20.0, 21.0], metric)
    assert len(over_seeds([first, replace(second, env=second.env | {"weights_sha256": "1" * 64})])) == 2


def test_a_run_that_is_far_worse_is_told_apart_though_its_seeds_lie_far_apart():
    """FID of five good runs near 20, and of one at 1,341, 1,415 and 1,154 (q_diffusion on small-dit-outliers)."""
    random = np.random.default_rng(0)

    def of_seeds(values_S):
        return [PerSample(value * (1 + 0.3 * random.normal(size=200)), pseudo=True) for value in values_S]

    good = [of_seeds(20 * np.exp(0.02 * random.normal(size=3))) for _ in range(5)]
    runs = [*good, of_seeds([1341.0, 1415.0, 1154.0])]
    candidates = [list(zip(runs[i], runs[j], strict=True)) for i in range(6) for j in range(i)]
    found = {how: paired._differences(candidates, how) for how in (True, False)}
    of_logarithms, plain = (holm([each.p for each in found[how]]) for how in (True, False))
    assert max(of_logarithms[-5:]) < 0.001 < 0.01 < max(plain[-5:])
    assert min(of_logarithms[:-5]) > 0.05, "the good ones are equally good"
    assert all((low > 0 or high < 0) == (each.p < 0.05) for each in found[True] for low, high in [each.ci95])


def test_a_row_of_seeds_that_lie_far_apart_has_a_positive_interval_where_each_seeds_own_is_of_the_logarithm(
    seeded, metric
):
    runs = seeded("rtn", [20.0, 50.0, 130.0], metric)
    (plain,) = over_seeds(runs)
    of_logs = {"passport": {"ci_method": INFLUENCE_OF_LOG}}
    (row,) = over_seeds([replace(run, metrics={"psnr": run.metrics["psnr"] | of_logs}) for run in runs])
    low, high = row.metrics["psnr"]["ci95"]
    logs = np.log([20.0, 50.0, 130.0])
    assert [low, high] == pytest.approx(np.exp(stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))))
    assert plain.metrics["psnr"]["ci95"][0] < 0 < low < row.metrics["psnr"]["value"] == pytest.approx(200 / 3)
    assert row.metrics["psnr"]["passport"]["ci_method"] == f"{OVER_SEEDS}, of logarithms"


@pytest.mark.parametrize("form", ["text", "md", "csv", "latex", "html"])
def test_a_metric_computed_later_for_some_of_the_seeds_is_named_with_those_that_lack_it(
    add_run, results_dir, metric, form
):
    for seed in range(3):
        record = add_run("a", metrics={"psnr": metric(20.0 + seed, 0.1)}, seed=seed)
        if seed == 1:
            later = metric(0.5, 0.1, paired=False) | {"unit": ""}
            add_metric(experiment_folder(results_dir, "demo") / record.run_id, "later", later)
    made = report(results_dir, None, form, merge_seeds=True)
    text = made.path.read_text() if made.path else made.text
    assert "not computed for seed 0, 2" in text
    (row,) = over_seeds(read_all(results_dir))
    assert row.metrics["later"]["value"] is None and row.metrics["later"]["better"] == "higher"


@pytest.mark.parametrize(
    ("values", "method", "bounds"),
    [
        ([1.0, 1.0, 0.998], WILSON, (None, 1.0)),
        ([0.0, 0.0, 0.002], WILSON, (0.0, None)),
        ([1.0, 2.0, 6.0], INFLUENCE_OF_PAIRS, (0.0, None)),
        ([1.0, 2.0, 6.0], "another", (None, None)),
    ],
)
def test_an_interval_over_seeds_holds_nothing_that_the_number_cannot_be(seeded, metric, values, method, bounds):
    """A share above 1 or below 0, a distance below 0."""
    runs = seeded("rtn", values, metric)
    plain = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    tight = [run.metrics["psnr"]["value"] + np.array([-1e-3, 1e-3]) for run in runs]
    its = [{"ci95": list(ends), "passport": {"ci_method": method}} for ends in tight]
    (row,) = over_seeds(
        [replace(run, metrics={"psnr": run.metrics["psnr"] | own}) for run, own in zip(runs, its, strict=True)]
    )
    expected = [own if bound is None else bound for own, bound in zip(plain, bounds, strict=True)]
    assert row.metrics["psnr"]["ci95"] == pytest.approx(expected)


def test_what_is_said_of_seeds_is_of_those_that_compete_whatever_the_float_row_has(add_run, results_dir, metric):
    for seed in range(3):
        add_run("fp", "W16A16", metrics={"psnr": metric(52.0, 0.1)}, seed=seed)
    for seed in range(2):
        for method, value in (("a", 20.0), ("b", 30.0)):
            add_run(method, metrics={"psnr": metric(value, 0.1)}, seed=seed)
    (group,) = compare.groups(over_seeds(read_all(results_dir)), any_seed=True)
    notes = table(group, ["psnr"]).notes
    assert any(note.startswith("2 seeds") for note in notes) and not any(note.startswith("3 seeds") for note in notes)
    assert "The float row is of 3 seeds, and its interval of these." in notes and "seeds 0, 1 ·" in f"{group.label} ·"
    (tests,) = paired_text.tests(group)
    assert tests.how.startswith("n = 128 pairs of samples of 2 seeds")


def test_how_tests_were_made_is_said_of_each_contest_where_they_differ(add_run, results_dir, metric):
    """Fifteen comparisons are moderated, one is not."""
    for seed in range(3):
        for place in range(6):
            add_run(f"m{place}", "W8A8", metrics={"psnr": metric(20.0 + place + 0.1 * seed * place, 0.1)}, seed=seed)
        for place in range(2):
            add_run(f"m{place}", "W4A8", metrics={"psnr": metric(20.0 + place + 0.1 * seed * place, 0.1)}, seed=seed)
    (group,) = compare.groups(over_seeds(read_all(results_dir)), any_seed=True)
    (tests,) = paired_text.tests(group)
    assert f"p: {MODERATED} (W8A8) or {OVER_SEEDS} (W4A8), Holm over 1–15 comparisons" in tests.how


def test_seeds_of_two_versions_are_not_mixed_into_one_row(add_run, results_dir, metric):
    """The same command in two experiments: the newer one has two of the three seeds, with other numbers for one run."""
    for experiment, seeds, value in (("new", 2, 30.0), ("old", 3, 10.0)):
        for seed in range(seeds):
            add_run("a", metrics={"psnr": metric(value + seed, 0.1)}, experiment=experiment, seed=seed)
            add_run("b", metrics={"psnr": metric(20.0 + seed, 0.1)}, experiment=experiment, seed=seed)
    found = {
        (row.method, row.config["seed"], row.metrics["psnr"]["value"]) for row in over_seeds(read_all(results_dir))
    }
    assert found == {("a", "0, 1", 30.5), ("a", "0, 1, 2", 11.0), ("b", "0, 1, 2", 21.0)}
