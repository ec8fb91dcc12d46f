"""Who is ranked with whom, and what a run is flagged for."""

from __future__ import annotations

import pytest

from ditbench.harness.common.errors import UserError
from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import compare, comparisons, contests, paired_text, report
from ditbench.harness.report.conclusions import conclusions
from ditbench.harness.report.marks import untested, verdicts
from ditbench.harness.report.table import table


def only_group(results_dir):
    (group,) = compare.groups(read_all(results_dir))
    return group


def marks(group, at="bits", metric="psnr"):
    rows = zip(group.records, verdicts(group, metric, at), strict=True)
    return {f"{record.method} {record.bits['label']}": verdict.mark for record, verdict in rows}


@pytest.fixture
def of_sizes(add_run, results_dir, metric):
    """of_sizes([(method, bits, psnr, KiB stored), …]) → the group."""

    def make(runs):
        for method, bits, psnr, size in runs:
            add_run(method, bits, metrics={"psnr": metric(psnr)}, efficiency={"model_bytes": size and size * 2**10})
        return only_group(results_dir)

    return make


def test_at_equal_bytes_the_smallest_run_opens_a_contest_for_ten_percent_more(of_sizes):
    group = of_sizes(
        [("a", "W4A8", 20.0, 500), ("b", "W4A8", 21.0, 550), ("c", "W4A8", 22.0, 551), ("d", "W8A8", 30.0, 600)]
    )
    found = contests.contests(group, contests.BYTES)
    called = contests.names(group, contests.BYTES)
    assert [[called[place] for place in each.places] for each in found] == [["a W4A8", "b W4A8"], ["c W4A8", "d W8A8"]]
    assert found[0].label == "0.49–0.54 MiB"
    assert marks(group) == {"a W4A8": "", "b W4A8": "second", "c W4A8": "best", "d W8A8": ""}
    assert marks(group, "bytes") == {"a W4A8": "second", "b W4A8": "best", "c W4A8": "second", "d W8A8": "best"}


def test_a_run_whose_bytes_are_not_known_has_no_rank_among_equal_bytes(of_sizes):
    group = of_sizes([("a", "W4A8", 20.0, 500), ("b", "W4A8", 21.0, 500), ("c", "W4A8", 30.0, None)])
    assert marks(group, "bytes") == {"a W4A8": "second", "b W4A8": "best", "c W4A8": ""}
    assert [row.cells[0].text for row in table(group, ["psnr"], at="bytes").rows] == ["a", "b", "c"]


@pytest.mark.parametrize("form", ["md", "csv", "latex"])
def test_every_form_of_report_can_rank_at_equal_bytes(of_sizes, results_dir, form):
    of_sizes([("a", "W8A8", 30.0, 600), ("b", "W4A8", 20.0, 590)])
    text = report(results_dir, None, form, equal_bytes=True).text
    assert {"md": "**30.00**", "csv": "0.58–0.59 MiB", "latex": r"\textbf{30.00}"}[form] in text
    assert "b W4A8 − a W8A8" in comparisons(results_dir, equal_bytes=True).text


def test_more_bits_than_the_label_says_are_flagged_above_ten_percent(add_run, results_dir):
    for method, bits, taken in (("plain", "W4A8", 4.25), ("heavy", "W4A8", 4.5), ("eight", "W8A8", 8.7)):
        record = add_run(method, bits)
        record.bits["weight_bits_quantized_layers"] = taken
        assert (contests.above_label(record) is not None) == (method == "heavy")
    record.efficiency["compression_quantized_layers"] = 16 / 8.9  # with tables of biases
    assert contests.above_label(record) == pytest.approx(8.9)
    record.bits["label"] = "mixed"
    assert contests.above_label(record) is None, "a mix of widths says none"


def test_a_formats_scales_are_part_of_what_its_label_says(add_run, results_dir):
    for bits, said, taken in (
        ("NVFP4", 4.5, 4.52),
        ("INT4_G64", 4.25, 4.25),
        ("WMXFP6_AFP8", 6.25, 6.25),
        ("FP8", 8, 8.3),
    ):
        record = add_run("plain", bits)
        record.bits["weight_bits_quantized_layers"] = taken
        assert contests.label_bits(record) == said and contests.above_label(record) is None


def test_rows_come_from_many_bits_to_few_with_scales_of_blocks(add_run, results_dir):
    for bits in ("MXFP4", "W4A4", "NVFP4", "FP8", "WNVFP4_AFP8", "MXFP8", "W8A8"):
        add_run("plain", bits)
    found = [compare.bits_label(record) for record in only_group(results_dir).records]
    assert found == ["MXFP8", "FP8", "W8A8", "WNVFP4_AFP8", "NVFP4", "MXFP4", "W4A4"]


def test_the_flag_is_at_the_bits_and_below_the_table(add_run, results_dir, metric):
    add_run("plain", metrics={"psnr": metric(20.0)})
    add_run("heavy", metrics={"psnr": metric(30.0)}, efficiency={"compression_quantized_layers": 2.0})
    built = table(only_group(results_dir), ["psnr"])
    assert {row.cells[0].text: row.cells[2].text.endswith("▲") for row in built.rows} == {"plain": False, "heavy": True}
    assert any("heavy W4A8 (8.00 bits)" in note and "--equal-bytes" in note for note in built.notes)


def test_balanced_and_random_labels_are_never_ranked_together(add_run, results_dir, metric):
    add_run("a", metrics={"psnr": metric(20.0)}, labels="balanced")
    add_run("b", metrics={"psnr": metric(30.0)}, labels="random")
    groups = compare.groups(read_all(results_dir))
    assert [len(group.records) for group in groups] == [1, 1]
    assert {next(w for w in ("balanced labels", "random labels") if w in g.label) for g in groups} == {
        "balanced labels",
        "random labels",
    }
    assert all(set(marks(group, way).values()) == {""} for group in groups for way in ("bits", "bytes"))


def test_without_what_a_test_needs_nobody_is_marked_and_the_table_says_so(add_run, results_dir, metric):
    add_run("a", metrics={"psnr": metric(20.0)}, tested=False)
    add_run("b", metrics={"psnr": metric(30.0)}, tested=False)
    group = only_group(results_dir)
    assert set(marks(group).values()) == {""} and untested(group, "psnr") == ["W4A8"]
    assert any(note.startswith("No marks on psnr (W4A8)") for note in table(group, ["psnr"]).notes)


def test_one_run_that_cannot_be_tested_leaves_the_whole_contest_unmarked(add_run, results_dir, metric):
    """Or the best of those that can would be called best of all."""
    add_run("a", metrics={"psnr": metric(20.0)})
    add_run("b", metrics={"psnr": metric(30.0)})
    add_run("c", metrics={"psnr": metric(40.0)}, tested=False)
    assert set(marks(only_group(results_dir)).values()) == {""}


def test_quality_stands_before_closeness_and_both_are_named(add_run, results_dir, metric, fid):
    for method, value in (("a", 20.0), ("b", 30.0)):
        add_run(method, metrics={"psnr": metric(value, unit="dB"), "fid": fid(value), "ssim": metric(0.5)})
    built = table(only_group(results_dir), ["psnr", "fid", "ssim"])
    assert [(column.title.split()[0], column.kind) for column in built.columns if column.kind] == [
        ("fid", "quality"),
        ("psnr", "closeness to float"),
        ("ssim", "closeness to float"),
    ]
    assert "psnr ↑ (dB, closeness to float)" in report(results_dir, None, "md").text.replace("\\", "")
    above, heads = report(results_dir, out=results_dir / "x.md").text.splitlines()[2:4]
    assert above.index("closeness") > above.index("quality") and heads.index("psnr") > heads.index("fid")


def test_a_run_without_a_collapse_alarm_is_said(add_run, results_dir, metric):
    add_run("a", metrics={"psnr": metric(20.0)})
    add_run("b", metrics={"psnr": metric(30.0), "collapse": metric(0.0, better="lower", paired=False)})
    assert any(
        "No collapse alarm was computed for a W4A8" in note for note in table(only_group(results_dir), ["psnr"]).notes
    )


def test_tests_and_sentences_rank_nobody_where_the_marks_do_not(add_run, results_dir, metric):
    """The run that cannot be tested has the best number."""
    for method, value, tested in (("a", 20.0, True), ("b", 30.0, True), ("c", 40.0, False)):
        add_run(method, metrics={"psnr": metric(value, unit="dB")}, tested=tested)
    (tests,) = paired_text.tests(only_group(results_dir))
    assert tests.verdicts == ["W4A8: nobody is ranked, since not every two runs could be tested"]
    assert len(tests.rows) == 1 and conclusions(only_group(results_dir)) == []


def test_runs_that_no_setting_tells_apart_are_marked_by_their_own_tests(add_run, results_dir, metric):
    """The same command in two experiments, where another version of a method gave other numbers; the plain run is the same in both."""
    for experiment, value in (("new", 30.0), ("old", 10.0)):
        add_run("a", metrics={"psnr": metric(value)}, experiment=experiment)
        add_run("b", metrics={"psnr": metric(20.0)}, experiment=experiment)
    group = only_group(results_dir)
    found = {
        (name, record.experiment): verdict.mark
        for name, record, verdict in zip(group.run_names, group.records, verdicts(group, "psnr"), strict=True)
    }
    assert found == {
        ("a in new", "new"): "best",
        ("a in old", "old"): "",
        ("b", "new"): "second",
        ("b", "old"): "second",
    }


def test_contests_of_small_models_have_labels_of_their_own(of_sizes):
    group = of_sizes(
        [("a", "W4A8", 20.0, 20.2), ("b", "W4A8", 21.0, 20.3), ("c", "W4A8", 22.0, 22.6), ("d", "W4A8", 23.0, 22.7)]
    )
    assert [each.label for each in contests.contests(group, "bytes")] == ["0.020 MiB", "0.022 MiB"]
    assert marks(group, "bytes") == {"a W4A8": "second", "b W4A8": "best", "c W4A8": "second", "d W4A8": "best"}


def test_bits_that_compare_is_asked_for_change_neither_contest_nor_p(of_sizes, results_dir):
    of_sizes([("a", "W4A8", 20.0, 500), ("b", "W4A4", 21.0, 510), ("c", "W4A8", 22.0, 520), ("d", "W4A4", 22.5, 560)])
    whole = comparisons(results_dir, equal_bytes=True, format="csv").text.splitlines()
    asked = comparisons(results_dir, equal_bytes=True, format="csv", bits=["W4A8"]).text.splitlines()
    assert len(whole) == 4 and asked == [whole[0], *(line for line in whole if ",a W4A8,c W4A8," in line)]
    shown = comparisons(results_dir, equal_bytes=True, bits=["W4A8"]).text
    assert "Holm over 3 comparisons" in shown and "best c W4A8; second b W4A4; behind a W4A8" in shown
    assert "a W4A8 − b W4A4" not in shown


def test_bits_that_compare_is_asked_for_give_no_rank_to_a_run_that_lacks_seeds(add_run, results_dir, metric):
    for seed in range(3):
        add_run("a", "W8A8", metrics={"psnr": metric(30.0)}, seed=seed)
        add_run("b", "W8A8", metrics={"psnr": metric(31.0)}, seed=seed)
    for seed in range(2):
        add_run("a", "W4A4", metrics={"psnr": metric(20.0)}, seed=seed)
        add_run("b", "W4A4", metrics={"psnr": metric(21.0)}, seed=seed)
    with pytest.raises(UserError, match="nothing to compare"):
        comparisons(results_dir, bits=["W4A4"], merge_seeds=True)
