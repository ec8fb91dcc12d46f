"""Paired tests in reports: who is compared with whom, and what each format says about it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ditbench.eval.base import PerSample
from ditbench.harness.common.errors import UserError
from ditbench.harness.records import sample_values
from ditbench.harness.records.attempts import experiment_folder, read_all
from ditbench.harness.records.record import write
from ditbench.harness.report import compare, comparisons, marks, paired, paired_text, report
from ditbench.harness.report.table import table

N = 64
NOISE_N = np.random.default_rng(0).normal(0, 1, N)
RIGHT_N = np.arange(N) < 40


@pytest.fixture
def add(add_run, results_dir, metric):
    """add("a", psnr shift, right answers lost, bits=…): a run whose values per sample lie beside its record."""

    def make(method, shift=0.0, lost=0, bits="W4A8", drawn="same", passport=None, alarmed=(), **more):
        psnr_N = 25 + shift + 5 * np.sin(np.arange(N)) + 0.1 * np.roll(NOISE_N, len(method) + int(10 * shift))
        right_N = RIGHT_N & (np.arange(N) >= lost)
        entries = {
            "psnr": metric(float(psnr_N.mean()), 0.5),
            "accuracy": metric(float(right_N.mean()), 0.1, paired=False),
            "flow_score": metric(float(psnr_N.mean()), 0.5, paired=False) | {"better": "none"},
        }
        entries["psnr"]["passport"] |= passport or {}
        if alarmed:
            alarms = {name: {"share": 0.5} for name in alarmed}
            entries["collapse"] = metric(0.5, better="lower", paired=False)
            entries["collapse"]["passport"] |= {"alarms": alarms, "alarmed": list(alarmed)}
        record = add_run(method, bits, metrics=entries, tested=False, **more)
        folder = experiment_folder(results_dir, "demo") / record.run_id
        run = {"psnr": PerSample(psnr_N), "accuracy": PerSample(right_N.astype(float), True)}
        run["flow_score"] = PerSample(psnr_N)
        of_float = {"accuracy": PerSample(RIGHT_N.astype(float), True)}
        sample_values.save(sample_values.Values(run, of_float, drawn), folder / sample_values.FILE)
        record.artifacts["per_sample"] = sample_values.FILE
        write(record, folder)

    return make


def pairs(results_dir, name):
    (group,) = compare.groups(read_all(results_dir))
    return {(each.contest, each.first, each.second): each for each in paired.comparisons(group, name)}


def test_every_two_runs_of_the_same_bits_are_compared_and_each_with_the_float_model(add, results_dir):
    add("fp", bits="W16A16")
    for method in ("a", "bb"):
        for bits in ("W8A8", "W4A8"):
            add(method, bits=bits)
    among = [("W8A8", "a", "bb"), ("W4A8", "a", "bb")]
    assert list(pairs(results_dir, "psnr")) == among  # a distance to the float model has no value of its own
    to_float = [(bits, method, paired.FLOAT) for bits in ("W8A8", "W4A8") for method in ("a", "bb")]
    assert set(pairs(results_dir, "accuracy")) == {*among, *to_float}


def test_p_values_are_those_of_the_tests_and_holm_counts_all_comparisons_of_the_metric(add, results_dir):
    add("a", lost=9)
    add("bb")
    found = pairs(results_dir, "accuracy")
    mcnemar = stats.binomtest(0, 9).pvalue
    assert found["W4A8", "a", "bb"].difference.p == pytest.approx(mcnemar)
    assert found["W4A8", "a", "bb"].difference.value == pytest.approx(-9 / N)
    assert found["W4A8", "a", "bb"].p_holm == pytest.approx(3 * mcnemar)  # two of three are equally small, one is 1
    assert found["W4A8", "bb", paired.FLOAT].p_holm == 1.0


def test_what_does_not_pair_is_not_compared(add, add_run, results_dir, metric):
    add("a")
    add("bb", drawn="other prompts")
    add("ccc", passport={"weights_sha256": "another judge"})
    add("dddd", alarmed=("blank",))
    add("eeeee", error="boom")
    add_run("old", metrics={"psnr": metric(20.0)}, tested=False)
    assert pairs(results_dir, "psnr") == {}
    add("ffffff")
    assert set(pairs(results_dir, "psnr")) == {("W4A8", "a", "ffffff")}


def test_the_verdict_names_whom_the_best_is_told_apart_from(add, results_dir):
    add("a", 1.0, lost=12)
    add("bb", 1.0)
    add("ccc", 0.0)
    (group,) = compare.groups(read_all(results_dir))
    said = {tests.metric: tests.verdicts for tests in paired_text.tests(group)}
    assert said["psnr"] == ["W4A8: best a, bb (tied); behind ccc"]
    assert said["accuracy"] == [
        "W4A8: best bb, ccc (tied); behind a; worse than the float model: a; not told apart from the float model: bb, ccc"
    ]
    assert said["flow_score"] == []  # compared, but nobody is better


def test_text_markdown_and_html_show_the_same_comparisons(add, results_dir):
    add("a", 1.0)
    add("bb")
    shown = comparisons(results_dir, "demo", ["psnr"]).text
    assert (
        f"psnr (closeness to float): n = {N} pairs of samples; p: sign-flip permutation, Holm over 1 comparisons"
        in shown
    )
    (line,) = [line for line in shown.splitlines() if "a − bb" in line]
    delta = line.split("a − bb")[1].split("<")[0].strip()
    assert delta.startswith("+1.") and "accuracy" not in shown
    markdown = report(results_dir, format="md").text
    assert f"| W4A8 | a − bb | {delta} | \\< 0.001 | \\< 0.001 |" in markdown and "best a; second bb" in markdown
    made = report(results_dir, format="html")
    assert f'"a − bb","{delta}"' in made.path.read_text()
    assert "paired tests on psnr (closeness to float)" in made.text and "W4A8: best a; second bb" in made.text
    assert "→ W4A8: best a; second bb" in shown


def test_a_metric_that_only_describes_marks_nobody_and_has_no_arrow(add, results_dir):
    add("a", 1.0)
    add("bb")
    (group,) = compare.groups(read_all(results_dir))
    assert {verdict.mark for verdict in marks.verdicts(group, "flow_score")} == {""}
    markdown = report(results_dir, None, "md", metrics=["flow_score", "psnr"]).text
    assert "| flow\\_score (n=64) |" in markdown and "psnr ↑" in markdown


def test_compare_says_what_it_takes_where_there_is_nothing(add, results_dir):
    add("a")
    with pytest.raises(UserError, match="nothing to compare sample by sample"):
        comparisons(results_dir, metrics=["psnr"])
    with pytest.raises(UserError, match="no recorded bits 'W4A9'; did you mean 'W4A8'"):
        comparisons(results_dir, bits=["w4a9"])


def test_the_sign_of_a_cell_says_what_the_sentence_below_says(add, results_dir):
    """Six right answers lost have p = 0.03 alone, and over 0.05 among the comparisons of the contest (Holm)."""
    for method, lost in (("fp", 0), ("a", 6), ("bb", 40), ("ccc", 0)):
        add(method, bits="W16A16" if method == "fp" else "W4A8", lost=lost)
    (group,) = compare.groups(read_all(results_dir))
    inside = {r.method: v.inside for r, v in zip(group.records, marks.verdicts(group, "accuracy"), strict=True)}
    assert inside == {"fp": None, "a": True, "bb": False, "ccc": True}
    assert pairs(results_dir, "accuracy")["W4A8", "a", paired.FLOAT].difference.p < paired.ALPHA
    (tests,) = paired_text.tests(group, ["accuracy"])
    assert any("not told apart from the float model: a, ccc" in line for line in tests.verdicts)


def test_what_a_tilde_rests_on_is_said_of_the_runs_where_it_stands(add_run, results_dir, fid):
    """Of one contest nothing was kept to test, of the other values per sample beside both models."""
    add_run("fp", "W16A16", metrics={"fid": fid(20.0)})
    add_run("old", "W8A8", metrics={"fid": fid(20.5)}, tested=False)
    for method, apart in (("a", 0.0), ("b", 9.0)):
        record = add_run(method, "W4A8", metrics={"fid": fid(20.0 + apart)})
        values_N = np.sin(np.arange(64))
        values = sample_values.Values(
            {"fid": PerSample(20.0 + apart + values_N)}, {"fid": PerSample(20.0 + values_N[::-1])}, "seed 0"
        )
        sample_values.save(values, experiment_folder(results_dir, "demo") / record.run_id / "per_sample.npz")
    (group,) = compare.groups(read_all(results_dir))
    built = table(group, ["fid"])
    cells = {row.cells[0].text: row.cells[3] for row in built.rows}
    assert {name: cell.inside for name, cell in cells.items()} == {"fp": False, "old": True, "a": True, "b": False}
    assert "noise floor" in cells["old"].tip and "not told apart" in cells["a"].tip
    (note,) = [note for note in built.notes if note.startswith("~")]
    assert "paired tests" in note and "fid ±4 at most" in note
