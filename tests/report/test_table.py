"""Who competes, what is marked, what is inside the noise floor, and what each text format says about it."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pandas as pd
import pytest

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import OUTLIERS, RESCALED, TRAINED
from ditbench.harness.records.attempts import read_all
from ditbench.harness.records.record import write
from ditbench.harness.report import compare, comparison_table, report
from ditbench.harness.report.frame import frame
from ditbench.harness.report.marks import verdicts
from ditbench.harness.report.table import interval, table


def only_group(results_dir):
    (group,) = compare.groups(read_all(results_dir))
    return group


def marks(group, name, at="bits"):
    return {r.method: v.mark for r, v in zip(group.records, verdicts(group, name, at), strict=True)}


def insides(group, name):
    return {r.method: v.inside for r, v in zip(group.records, verdicts(group, name), strict=True)}


def cell(group, method, title):
    built = table(group, group.metrics)
    place = next(i for i, column in enumerate(built.columns) if column.title.startswith(title))
    return next(row.cells[place] for row in built.rows if row.cells[0].text == method)


def test_best_and_second_follow_the_direction_of_the_metric(add_run, results_dir, metric, fid):
    for method, psnr, score in (("a", 20.0, 50.0), ("b", 30.0, 60.0), ("c", 25.0, 40.0)):
        add_run(method, metrics={"psnr": metric(psnr), "fid": fid(score, floor=None)})
    group = only_group(results_dir)
    assert marks(group, "psnr") == {"a": "", "b": "best", "c": "second"}
    assert marks(group, "fid") == {"a": "second", "b": "", "c": "best"}


def test_the_float_row_and_failed_runs_never_compete(add_run, results_dir, metric):
    add_run("fp", "W4A8", metrics={"psnr": metric(99.0)})  # even under a label of the others
    add_run("a", metrics={"psnr": metric(20.0)})
    add_run("b", metrics={"psnr": metric(30.0)})
    add_run("c", error="boom")
    assert marks(only_group(results_dir), "psnr") == {"fp": "", "a": "second", "b": "best", "c": ""}
    records = [replace(r, status="failed") if r.method == "b" else r for r in read_all(results_dir)]
    assert set(marks(compare.groups(records)[0], "psnr").values()) == {""}  # also when it failed after being scored


def test_runs_compete_per_bits_and_a_lone_run_or_a_draw_wins_nothing(add_run, results_dir, metric):
    add_run("a", "W8A8", metrics={"psnr": metric(40.0)})
    add_run("a", "W4A8", metrics={"psnr": metric(20.0)})
    add_run("b", "W4A8", metrics={"psnr": metric(20.0)})
    assert [verdict.mark for verdict in verdicts(only_group(results_dir), "psnr")] == ["", "", ""]


def test_a_cell_is_inside_when_no_further_from_float_than_the_floor(add_run, results_dir, metric, fid):
    add_run("fp", "W16A16", metrics={"fid": fid(30.0), "psnr": metric(25.0)})
    for method, score in (("at_floor", 34.0), ("below", 26.5), ("beyond", 34.5)):
        add_run(method, metrics={"fid": fid(score), "psnr": metric(25.0, floor=4.0)})
    group = only_group(results_dir)
    assert insides(group, "fid") == {"fp": None, "at_floor": True, "below": True, "beyond": False}
    assert set(insides(group, "psnr").values()) == {None}  # paired metrics have no floor
    assert cell(group, "at_floor", "fid").inside and not cell(group, "beyond", "fid").inside


def test_a_mark_of_the_noise_floor_ranks_nobody(add_run, results_dir, fid):
    """Runs inside the floor are told apart where a test tells them apart; the sign is the cell's, not the row's."""
    add_run("fp", "W16A16", metrics={"fid": fid(30.0)})
    for method, score in (("a", 29.0), ("b", 31.0), ("c", 45.0)):
        add_run(method, metrics={"fid": fid(score), "kid": fid(score, floor=0.1)})
    group = only_group(results_dir)
    assert insides(group, "fid") == {"fp": None, "a": True, "b": True, "c": False}
    assert marks(group, "fid") == {"fp": "", "a": "best", "b": "second", "c": ""}
    built = table(group, ["fid", "kid"])
    assert any("noise floor" in note and "±4" in note for note in built.notes)
    row = next(row for row in built.rows if row.cells[0].text == "a")
    assert [cell.inside for cell in row.cells if cell.text == "29.0"] == [True, False]


def test_without_a_float_row_nothing_is_called_noise(add_run, results_dir, fid):
    add_run("a", metrics={"fid": fid(30.0)})
    group = only_group(results_dir)
    assert insides(group, "fid") == {"a": None}
    assert any("The float model is no row here" in note for note in table(group, ["fid"]).notes)


def test_rows_are_fp_then_more_bits_then_method(sweep):
    stressed = compare.groups(read_all(sweep))[1]
    names = [(compare.bits_label(record), record.method) for record in stressed.records]
    assert names[0] == ("W16A16", "fp")
    assert [bits for bits, _ in names[1:]] == ["W8A8"] * 3 + ["W4A8"] * 3 + ["W4A4"] * 3
    assert [method for _, method in names[1:4]] == ["balance", "hadamard", "rtn"]


def test_only_runs_under_one_model_protocol_and_seed_share_a_group(add_run, results_dir):
    add_run("a")
    add_run("a", stress="outliers x32")
    record = add_run("b")
    other_steps = replace(record, config=record.config | {"protocol": record.config["protocol"] | {"steps": 50}})
    other_seed = replace(record, config=record.config | {"seed": 1})
    hidden = replace(record, config=record.config | {"protocol": record.config["protocol"] | {"skip": ["x"]}})
    labels = [group.label for group in compare.groups([*read_all(results_dir), other_steps, other_seed, hidden])]
    assert len(labels) == len(set(labels)) == 5
    assert sum("(stress: outliers x32)" in label for label in labels) == 1


def test_a_model_with_outliers_says_in_every_table_how_they_came_and_which_model_has_none(add_run):
    record = add_run("a", stress={"channels": 6})
    labels = [
        compare.model_label(of_model(record, outliers=outliers, stress=stress))
        for outliers, stress in (
            ({"kind": RESCALED, "unstressed": "tiny-dit"}, {"channels": 6}),
            ({"kind": TRAINED, "unstressed": "small-dit"}, None),
            (None, {"channels": 6}),
            (None, None),
        )
    ]
    assert labels == [
        "tiny-dit (stress: channels 6; undone by a scale per channel; without: tiny-dit)",
        "tiny-dit (outliers from training; without: small-dit)",
        "tiny-dit (stress: channels 6)",
        "tiny-dit",
    ]
    assert set(OUTLIERS) == set(compare.HOW_OUTLIERS_CAME)


def of_model(record, weights=None, **settings):
    """The record as if its model had these settings and weights."""
    config = record.config | {"model": record.config["model"] | settings}
    return replace(record, config=config, env=record.env | ({"weights_sha256": weights} if weights else {}))


def test_groups_of_one_model_are_told_apart_by_the_settings_that_differ(add_run):
    run = add_run("a")
    lora = [{"path": "a.safetensors", "scale": 0.5}]
    models = [
        {"source": "./one"},
        {"source": "./two"},
        {"source": "./one", "fuse_qkv": True},
        {"source": "./one", "lora": lora},
    ]
    labels = [group.label for group in compare.groups([of_model(run, **model) for model in models])]
    assert len(set(labels)) == 4 and not any("variant" in label for label in labels)
    for words in ("source=./two", "fuse_qkv=True", "lora=[{'path': 'a.safe"):
        assert sum(words in label for label in labels) == 1, words


def test_groups_that_differ_in_a_note_alone_have_labels_of_their_own(add_run):
    run = add_run("a")
    labels = [group.label for group in compare.groups([of_model(run, note=note) for note in ("x", "y", "z")])]
    assert len(set(labels)) == 3


def test_other_weights_under_the_same_settings_are_another_group(add_run, metric):
    good, bad = add_run("a", metrics={"psnr": metric(30.0)}), add_run("b", metrics={"psnr": metric(20.0)})
    found = compare.groups([of_model(good, "1" * 64), of_model(bad, "2" * 64), of_model(bad, "1" * 64)])
    assert sorted(len(group.records) for group in found) == [1, 2]
    assert sorted(group.label[-17:] for group in found) == [" weights 11111111", " weights 22222222"]


def test_the_same_weights_are_one_group_however_their_place_is_spelled(add_run):
    run, other = add_run("a"), add_run("b")
    (group,) = compare.groups([of_model(run, "1" * 64, source="./x"), of_model(other, "1" * 64, source="x")])
    assert len(group.records) == 2 and "source" not in group.label


def test_runs_of_one_method_are_told_apart_by_the_setting_that_differs(add_run, results_dir):
    add_run("balance", strength=0.5, eps=1e-5)
    add_run("balance", strength=0.7, eps=1e-5)
    add_run("rtn")
    assert sorted(only_group(results_dir).run_names) == ["balance strength=0.5", "balance strength=0.7", "rtn"]


def test_a_simulated_run_never_shows_a_number_from_a_clock(add_run, results_dir):
    claims = {"speedup": 3.25, "latency_ms": {"median": 7.77, "p10": 7.0, "p90": 8.0}, "peak_memory_bytes": 5 * 2**20}
    add_run("liar", efficiency=claims)
    group = only_group(results_dir)
    assert cell(group, "liar", "speed-up").text == "simulated"
    assert cell(group, "liar", "speed-up").sort is None and cell(group, "liar", "latency").text == "–"
    row = frame([group]).iloc[0]
    assert row["kind"] == "simulated" and row[["speedup", "latency_ms", "peak_memory_mib"]].isna().all()
    for format in ("md", "csv", "latex"):
        text = report(results_dir, None, format).text
        assert "simulated" in text and "3.25" not in text and "7.8" not in text and "7.77" not in text


def test_a_measured_run_shows_its_clock(add_run, results_dir):
    add_run("rtn", "W8A8", measured=True)
    group = only_group(results_dir)
    assert cell(group, "rtn", "speed-up").text == "1.36" and cell(group, "rtn", "latency").text == "44.0"
    assert cell(group, "rtn", "fit").text == "2.2"


def test_metrics_that_lack_the_same_thing_share_a_line(add_run, results_dir, metric, fid):
    lacking = {name: fid(None, reason="no weights") for name in ("clean_fid/fid", "adm/sfid")}
    add_run("a", metrics={"psnr": metric(20.0), **lacking})
    notes = table(only_group(results_dir), ["psnr"]).notes
    assert [note for note in notes if "skipped" in note] == ["skipped: no weights: clean_fid/fid, adm/sfid"]


def test_size_and_speed_stand_before_the_metrics_that_are_no_headline(add_run, results_dir, metric):
    add_run("a", metrics={"psnr": metric(20.0), "sqnr": metric(9.0)})
    titles = [column.title for column in table(only_group(results_dir), ["psnr"], ["psnr", "sqnr"]).columns]
    places = [next(i for i, title in enumerate(titles) if title.startswith(n)) for n in ("psnr", "speed-up", "sqnr")]
    assert places == sorted(places) and sum(title.startswith("psnr") for title in titles) == 1


@pytest.mark.parametrize("format", ["md", "csv", "latex"])
def test_a_failed_run_is_a_row_with_its_one_line_reason(add_run, results_dir, format):
    add_run("a")
    add_run("b", "W4A4", error="Traceback (most recent call last):\n  File x\nRuntimeError: attn saw no batch\n")
    text = report(results_dir, None, format).text
    assert "RuntimeError: attn saw no batch" in text and "Traceback" not in text
    assert cell(only_group(results_dir), "b", "status").text == "failed"
    assert "b W4A4 failed: RuntimeError: attn saw no batch" in comparison_table(read_all(results_dir))


def test_a_skipped_metric_is_a_dash_with_its_reason(add_run, results_dir, metric, fid):
    add_run("a", metrics={"psnr": metric(20.0), "clean_fid/fid": fid(None, reason="pip install clean-fid")})
    skipped = cell(only_group(results_dir), "a", "fid")
    assert (skipped.text, skipped.tip) == ("–", "pip install clean-fid")
    assert "skipped: pip install clean-fid" in report(results_dir, None, "md", metrics=["clean_fid/fid"]).text


def test_a_metric_that_broke_is_said_beside_the_table(add_run, results_dir, metric):
    broke = metric(None, reason="OutOfMemoryError in lpips.py:75: CUDA out of memory") | {"status": "failed"}
    add_run("a", metrics={"psnr": metric(20.0), "ssim": broke})
    text = report(results_dir, None, "md", metrics=["ssim"]).text
    assert "failed: OutOfMemoryError in lpips.py:75: CUDA out of memory: ssim" in text


def test_set_metrics_carry_their_n_in_the_header(sweep):
    built = table(compare.groups(read_all(sweep))[0], ["torchmetrics/fid_judge", "psnr"])
    heads = {column.title: column.subtitle for column in built.columns}
    assert heads["fid_judge ↓"] == "torchmetrics n=64" and heads["psnr ↑"] == "dB"
    for fact in (
        "n = 64",
        "10 steps",
        "guidance 1.5",
        "digits-fast",
        "cpu (2 cores)",
        "toy model",
        "simulated",
        "bf16",
    ):
        assert fact in built.caption


@pytest.mark.parametrize(
    ("ci95", "text"), [([26.1, 28.5], "±1.2"), ([26.9, 29.0], "[26.9, 29.0]"), (None, ""), ([27.3, 27.3], "±0.0")]
)
def test_an_interval_is_a_half_width_only_when_it_is_symmetric(ci95, text):
    assert interval(27.3, ci95, 1) == text


def test_csv_comes_back_as_the_recorded_numbers(sweep):
    read = pd.read_csv(io.StringIO(report(sweep, None, "csv").text), float_precision="round_trip")
    records = {record.run_id: record for record in read_all(sweep)}
    assert len(read) == len(records) == 20
    for row in read.to_dict("records"):
        record = records[row["run_id"]]
        if record.status == "failed":
            assert row["status"] == "failed" and "no calibration batch" in row["error"]
            continue
        entry = record.metrics["torchmetrics/fid_judge"]
        assert row["torchmetrics/fid_judge"] == entry["value"]
        assert [row[f"torchmetrics/fid_judge.ci95_{end}"] for end in ("low", "high")] == entry["ci95"]
        assert row["weight_bits_effective"] == record.bits["weight_bits_effective"]
        assert row["model_mib"] * 2**20 == pytest.approx(record.efficiency["model_bytes"])
    assert pd.api.types.is_float_dtype(read["speedup"]) and pd.api.types.is_float_dtype(read["psnr"])
    assert set(read["torchmetrics/fid_judge.inside_noise_floor"].dropna()) == {True, False}


def test_markdown_tables_have_as_many_cells_as_headers(sweep):
    text = report(sweep, None, "md").text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| method")]
    assert len(tables) == 2
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "**41.40 ±0.60**" in text and "<ins>39.70 ±0.60</ins>" in text and "~29.6 ±1.5" in text


def test_latex_is_balanced_and_escaped(add_run, sweep):
    add_run("a_b", error="ValueError: 50% of {x} & y_1 #2 $3 ~^\\ fails")
    text = report(sweep, None, "latex").text
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = body.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
    depth = 0
    for char in bare:
        depth += {"{": 1, "}": -1}.get(char, 0)
        assert depth >= 0
    assert depth == 0
    assert body.count(r"\begin{") == body.count(r"\end{")
    assert not re.search(r"(?<!\\)[_%#]", body), "unescaped special character"
    assert len(re.findall(r"(?<!\\)\$", body)) % 2 == 0
    columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", body)[1])
    rows = [line for line in body.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
    kinds = next(line for line in body.splitlines() if "multicolumn" in line)
    wide = sum(int(count) - 1 for count in re.findall(r"multicolumn\{(\d+)\}", kinds))
    assert kinds.count("&") + wide == columns - 1 and "closeness to float" in kinds
    assert rows and all(len(re.findall(r"(?<!\\)&", row)) == columns - 1 for row in rows)


def test_what_the_effective_bits_are_is_said_where_they_stand(add_run, results_dir, metric):
    add_run("a")
    for format in ("text", "md", "latex"):
        assert "bits per weight of the whole transformer" in " ".join(report(results_dir, None, format).text.split())


def test_latex_has_no_sign_that_its_usual_fonts_lack(add_run, results_dir):
    add_run("a", error="ValueError: Δ ≥ 3 → ∞, 漢字 \U0001f600 é")
    text = report(results_dir, None, "latex").text
    assert r"$\Delta$ $\geq$ 3 $\rightarrow$ $\infty$, ?? ? é" in text
    assert all(ord(char) < 0x180 for char in text)


def test_chosen_metrics_are_shown_and_unknown_ones_are_named(sweep):
    header = report(sweep, "demo", "md", metrics=["sqnr"]).text.split("\n")[2]
    assert "sqnr" in header and "psnr" not in header
    with pytest.raises(UserError, match="no recorded metric 'snqr'; did you mean 'sqnr'"):
        report(sweep, "demo", "md", metrics=["snqr"])


def test_text_reports_are_written_where_asked(sweep, tmp_path):
    """And the short table is printed, as for html."""
    printed = report(sweep, "demo", "csv")
    written = report(sweep, "demo", "csv", out=tmp_path / "new" / "table.csv")
    assert printed.path is None and written.path == tmp_path / "new" / "table.csv"
    assert written.path.read_text() == printed.text
    assert written.text == report(sweep, "demo", "html", out=tmp_path / "page.html").text != printed.text


def test_mistakes_are_user_errors(sweep, tmp_path):
    with pytest.raises(UserError, match="no report format 'pdf'"):
        report(sweep, None, "pdf")
    with pytest.raises(UserError, match="'dem'; did you mean 'demo'"):
        report(sweep, "dem", "md")
    with pytest.raises(UserError, match="no record to report"):
        report(tmp_path / "empty", None, "md")


@pytest.mark.parametrize(("content", "message"), [("{oops", "not a readable record"), ('{"schema": 99}', "newer")])
@pytest.mark.parametrize("format", ["md", "csv", "latex", "html"])
def test_a_record_that_cannot_be_read_is_listed_beside_the_others(sweep, content, message, format):
    odd, *others = (sweep / "runs" / "demo").glob("*/record.json")
    odd.write_text(content)
    made = report(sweep, None, format)
    (line,) = made.damaged
    assert message in line and str(odd) in line
    shown = made.path.read_text() if made.path else made.text
    assert (str(odd) in shown or "\\_" in shown) == (format != "csv"), "a csv holds rows only"
    for other in others:
        other.write_text(content)
    with pytest.raises(UserError, match=message):
        report(sweep, None, format)


def test_what_was_timed_beside_other_workers_is_said(add_run, results_dir):
    add_run("alone", measured=True)
    assert not any("timed while" in note for note in table(only_group(results_dir), ["psnr"]).notes)
    add_run("beside", measured=True, efficiency={"timed_beside": 1})
    (said,) = [note for note in table(only_group(results_dir), ["psnr"]).notes if "timed while" in note]
    assert "beside W4A8" in said and "alone" not in said.replace("run alone", "")


def test_few_samples_are_said(add_run, results_dir):
    add_run("a")
    (record,) = read_all(results_dir)
    assert not any("were checked from" in note for note in table(only_group(results_dir), ["psnr"]).notes)
    few = record.config | {"protocol": record.config["protocol"] | {"n": 32}}
    write(replace(record, config=few), record.folder)
    assert any("n = 32: " in note and "n = 64" in note for note in table(only_group(results_dir), ["psnr"]).notes)
