"""The table of a terminal: which columns it has room for."""

from __future__ import annotations

from dataclasses import replace

from ditbench.harness.records.attempts import read_all
from ditbench.harness.report import comparison_table, report


def lines_of(text):
    return [line.rstrip() for line in text.splitlines()]


def test_the_table_of_a_terminal_fits_120_columns_and_names_what_it_leaves_out(sweep):
    text = report(sweep).text
    assert max(map(len, lines_of(text))) <= 120
    heads = [line for line in lines_of(text) if line.startswith("method ")]
    assert heads and all("fid_judge ↓" in head and "psnr ↑" in head and "speed-up" in head for head in heads)
    assert "latency" not in heads[0] and "latency" in text.partition("no room for ")[2]


def test_a_narrow_terminal_gets_fewer_columns_and_a_wide_one_all_of_them(sweep):
    records = read_all(sweep)
    narrow, wide = (comparison_table(records, width=width) for width in (60, 300))
    assert max(map(len, lines_of(narrow))) <= 60 and "psnr ↑" in narrow
    assert "latency" in wide and "no room for" not in wide


def test_columns_without_a_value_give_way_before_any_other(add_run, results_dir, metric):
    add_run("a", metrics={"psnr": metric(20.0, 0.5)})
    for format in ("text", "md", "latex"):
        assert "latency" not in head_of(report(results_dir, None, format).text), "simulated: no clock"
    add_run("b", measured=True)
    for format in ("text", "md", "latex"):
        assert "latency" in head_of(report(results_dir, None, format).text)


def head_of(text):
    return next(line for line in text.splitlines() if "method" in line and "psnr" in line)


def test_every_metric_asked_for_is_shown_in_as_many_tables_as_it_takes(add_run, results_dir, metric):
    names = [f"metric_number_{number:02d}" for number in range(14)]
    for method in ("a", "b"):
        add_run(method, metrics={name: metric(20.0 + len(method), 0.5) for name in names})
    text = comparison_table(read_all(results_dir), metrics=names, width=120)
    assert max(map(len, lines_of(text))) <= 120
    heads = [line for line in lines_of(text) if line.startswith("method")]
    assert len(heads) > 1 and [name for head in heads for name in head.split() if name in names] == names
    assert comparison_table([]) == "no runs to compare"


def test_a_metric_asked_for_is_shown_even_where_it_has_no_value(add_run, results_dir, metric, fid):
    add_run("a", metrics={"psnr": metric(20.0), "clean_fid/fid": fid(None, reason="no weights")})
    for format in ("text", "md", "latex"):
        assert "fid" in report(results_dir, None, format, metrics=["clean_fid/fid"]).text
        assert "fid ↓" not in report(results_dir, None, format).text.replace("fid$", "fid ↓")


def test_the_metrics_that_a_run_was_told_to_compute_are_the_table_s(add_run, results_dir, metric):
    """`ditbench run metrics.names=[sqnr,contrast]`: neither is a headline metric, both were asked for."""
    record = add_run("a", metrics={name: metric(20.0, 0.5) for name in ("psnr", "ssim", "sqnr", "contrast")})
    assert "contrast" not in comparison_table([record])
    told = replace(record, config=record.config | {"metrics": {"names": ["sqnr", "contrast"]}})
    assert "contrast" in comparison_table([told]) and "sqnr" in comparison_table([told])
    judge = ["psnr", "ssim", "sqnr", "collapse"]  # conf/metrics/fidelity.yaml: a set, not a list of the user's own
    shipped = replace(record, config=record.config | {"metrics": {"names": judge}})
    assert "sqnr" not in comparison_table([shipped])


def test_long_names_of_runs_take_more_lines_and_not_more_width(add_run, results_dir, metric):
    for strength in ("a_long_word_of_a_setting", "another_long_word"):
        add_run("balance", strength=strength, other_setting=strength * 2, metrics={"psnr": metric(20.0, 0.5)})
    text = comparison_table(read_all(results_dir), width=80)
    assert max(map(len, lines_of(text))) <= 80
    words = text.split()
    assert "strength=another_long_word" in words and "strength=a_long_word_of_a_setting" in words


def test_what_would_help_a_skipped_metric_is_wrapped_and_never_cut(add_run, results_dir, metric):
    why = "x " * 90 + "`ditbench data fetch inception-fid`"
    add_run("a", metrics={"psnr": metric(20.0), "fid": metric(None, reason=why)})
    text = comparison_table(read_all(results_dir), width=120)
    assert "`ditbench data fetch inception-fid`" in " ".join(text.split()) and "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 120
