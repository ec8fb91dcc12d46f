"""Reported numbers and their reproduction: the files, the two commands, the plan, a tiny run, and the verdicts."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import yaml

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import PAPERS
from ditbench.harness.fitting import registry
from ditbench.harness.papers import reported, reproduce
from ditbench.harness.papers.reproduce import rows, verdicts
from ditbench.harness.records.record import Record

TINY = (
    "protocol.n=4",
    "protocol.steps=2",
    "calibration.n=2",
    "tracker=none",
    "generate.noise_floor_seeds=0",
    "metrics.resamples=5",
    "measure.repeats=2",
    "measure.warmup=0",
    "measure.samples=1",
    "measure.layer_errors=false",
)
REPRODUCIBLE = [each.name for each in reported.tables().values() if each.reproduce]


# The files


def test_every_table_has_an_id_and_a_name_of_its_own():
    tables = [each for paper in reported.papers().values() for each in paper.tables]
    names = [name for each in tables for name in (each.id, each.name)]
    assert len(tables) == len(reported.tables()) == 28
    assert len(names) == len(set(names))


def test_every_row_has_a_confidence_of_the_closed_set_and_a_source_that_its_file_names():
    for paper in reported.papers().values():
        for each in paper.tables:
            for row in each.rows:
                assert row.confidence in reported.CONFIDENCES, (each.id, row)
                assert paper.sources[row.source], (each.id, row)
                assert row.keys, (each.id, row)


def test_no_two_rows_of_a_table_have_the_same_name():
    for each in reported.tables().values():
        titles = [reported.row_title(row) for row in each.rows]
        assert len(titles) == len(set(titles)), each.id


def test_what_comes_from_memory_says_so_in_its_rows_and_cannot_be_reproduced():
    recalled = [each for each in reported.tables().values() if each.confidence == "recall"]
    assert len(recalled) == 3
    for each in recalled:
        assert {row.source for row in each.rows} == {"recall"}
        assert each.reproduce is None


def test_geneval_totals_are_the_mean_of_their_six_columns():
    rows = [row.values for row in reported.table("clq_table3_geneval").rows if row.values["Total"] is not None]
    assert len(rows) == 13
    for values in rows:
        parts = [value for column, value in values.items() if column != "Total"]
        assert len(parts) == 6
        assert abs(sum(parts) / 6 - values["Total"]) <= 0.003, values


def test_the_ablation_ends_at_the_row_of_the_main_table():
    main, ablation = reported.table("ptq4dit-table1"), reported.table("ptq4dit-table3")
    (row,) = (r for r in main.rows if r.keys == {"steps": 250, "bits": "W4A8", "method": "PTQ4DiT"})
    assert ablation.rows[-1].values == {c: row.values[c] for c in ablation.columns}


def test_the_row_that_another_group_could_not_reproduce_carries_the_warning_and_its_source():
    warned = [row for row in reported.table("ptq4dit-table1").rows if row.warning]
    assert [row.keys for row in warned] == [{"steps": 50, "bits": "W4A8", "method": "PTQ4DiT"}]
    warned_fid = reported.table("ptq4dit-issues").rows[0].values["FID"]
    assert f"FID {warned_fid}" in warned[0].warning and "issue #3" in warned[0].warning


# What is refused: (where in ptq4dit.yaml, the wrong value, what the message must name beside file and table)

WRONG = {
    "a misspelt field of a table": (["tables", 0, "smapler"], "DDPM", ("no field 'smapler'", "'sampler'")),
    "a misspelt column of a row": (["tables", 0, "rows", 3, "FDI"], 4.5, ("row 4", "no field 'FDI'", "'FID'")),
    "a confidence that is none": (["tables", 0, "rows", 3, "confidence"], "sure", ("row 4: confidence", "'sure'")),
    "a table's confidence": (["tables", 0, "confidence"], "prime", ("confidence", "'prime'", "'primary'")),
    "a source that the file lacks": (["tables", 0, "rows", 3, "source"], "p4d", ("row 4: source", "'p4d'")),
    "a tolerance for no column": (
        ["tables", 0, "reproduce", "tolerance", "KID"],
        1,
        ("reproduce: tolerance", "no column 'KID'"),
    ),
    "a metric without tolerance": (["tables", 0, "reproduce", "metrics", "sFID"], "x", ("no number for sFID",)),
    "a misspelt part of reproduce": (["tables", 0, "reproduce", "stepps"], 2, ("no field 'stepps'", "'steps'")),
    "rows that are none": (["tables", 0, "rows"], "none", ("rows: expected a list, got 'none'",)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_field_is_named_with_its_file_and_table(what, tmp_path):
    place, wrong, words = WRONG[what]
    values = yaml.safe_load((PAPERS / "ptq4dit.yaml").read_text())
    node = values
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = wrong
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as refusal:
        reported.papers(tmp_path)
    for word in ("broken.yaml", "ptq4dit_table1_imagenet256", *words):
        assert word in str(refusal.value)


def test_a_missing_field_and_a_file_that_is_no_yaml_are_named(tmp_path):
    values = yaml.safe_load((PAPERS / "dit.yaml").read_text())
    del values["tables"][0]["columns"]
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="dit.yaml.*dit_reference_fid50k.*'columns' is missing"):
        reported.papers(tmp_path)
    (tmp_path / "dit.yaml").write_text("tables: [")
    with pytest.raises(UserError, match="dit.yaml: not readable as YAML"):
        reported.papers(tmp_path)


def test_two_files_with_the_same_table_are_refused(tmp_path):
    for name in ("one", "two"):
        shutil.copy(PAPERS / "dit.yaml", tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match="two.yaml.*taken, by one.yaml"):
        reported.papers(tmp_path)


# ditbench paper


def test_the_list_names_every_table_and_what_could_not_be_had(ditbench):
    outcome = ditbench("paper", "list")
    assert outcome.code == 0 and outcome.err == ""
    for name in reported.tables():
        assert re.search(rf"^{name} ", outcome.out, re.MULTILINE)
    assert "not here: HTG" in outcome.out


@pytest.mark.parametrize("name", reported.tables())
def test_a_table_is_shown_with_every_row_its_protocol_source_and_confidence(ditbench, name):
    outcome = ditbench("paper", "show", name)
    assert outcome.code == 0 and outcome.err == ""
    shown = reported.table(name)
    for row in shown.rows:
        cells = [*row.keys.values(), *(reported.EMPTY if value is None else value for value in row.values.values())]
        line = next(line for line in outcome.out.splitlines() if all(str(cell) in line for cell in cells))
        assert line
        assert f"confidence {row.confidence}: " in outcome.out and f"source {row.source}: " in outcome.out
    for value in shown.protocol.values():
        assert str(value) in outcome.out


def test_a_table_is_found_by_its_id_too(ditbench):
    by_name, by_id = (
        ditbench("paper", "show", "ptq4dit-table1"),
        ditbench("paper", "show", "ptq4dit_table1_imagenet256"),
    )
    assert by_name.out == by_id.out
    assert "12.553" in by_name.out and "WARNING" in by_name.out


@pytest.mark.parametrize("command", [("paper", "show"), ("reproduce",)])
def test_an_unknown_table_is_guessed_at(ditbench, command):
    outcome = ditbench(*command, "ptq4dit-tabel1")
    assert outcome.code == 2
    assert "no paper table 'ptq4dit-tabel1'; did you mean 'ptq4dit-table1'?" in outcome.err


def test_show_without_a_name_says_where_the_names_are(ditbench):
    outcome = ditbench("paper", "show")
    assert outcome.code == 2 and "ditbench paper list" in outcome.err


# ditbench reproduce --plan


@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_a_plan_says_what_the_real_table_needs(ditbench, name, monkeypatch):
    monkeypatch.setattr(reproduce, "model_of", lambda _: pytest.fail("a plan loads nothing"))
    here = {"q_dit": registry.method("rtn")} | registry.known_methods()  # of one table it is the only method
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    outcome = ditbench("reproduce", name, "--plan")
    assert outcome.code == 0 and outcome.err == ""
    section = reported.table(name).reproduce
    for word in (
        "huggingface.co/facebook/DiT-XL-2-",
        section.reference.address,
        "GiB",
        "methods here",
        f"for {name}"[:0],
    ):
        assert word in outcome.out


def test_a_plan_counts_runs_images_and_transformer_calls(ditbench, monkeypatch):
    here = {name: registry.method(name) for name in ("fp", "ptq4dit", "rtn")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    said = ditbench("reproduce", "ptq4dit-table1", "--plan", "generate.noise_floor_seeds=0").out
    # 3 methods at bits (FP, W8A8, W4A8) × 250, 100, 50 steps; per number of steps the float model's images and 32 for
    # calibration; batches of 64 (157 of them) and of 32.
    assert "9, for 9 of 33 rows" in said
    assert f"{(9 + 3) * 10_000 + 3 * 32:,} in 15 sets" in said
    assert f"{157 * (3 + 1) * 400 + 400:,} calls" in said
    assert f"{2 * (10_000 * (3 + 1) * 400 + 32 * 400):,} rows" in said
    assert re.search(r"not in ditbench yet +PTQ4DM, Q-Diffusion, PTQD, RepQ\*", said)
    assert "12.553" in said
    assert "ptq4dit departs from its paper" in said and "not computed here: size_mb, sFID" in said


def test_a_method_is_found_here_as_soon_as_it_is_installed(ditbench, monkeypatch):
    here = {"fp": registry.method("fp"), "ptq4dit": registry.method("ptq4dit"), "ptqd": registry.method("rtn")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    said = ditbench("reproduce", "ptq4dit-table1", "--plan").out
    assert "PTQD (ptqd)" in said and "15, for 15 of 33 rows" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("svdquant-table1",), ("svdquant-table1", "cannot be run", "ptq4dit-table1")),
        (("ptq4dit-table1", "model=tiny-dit"), ("model=", "--model")),
        (("ptq4dit-table1", "bits=w4a4"), ("bits=", "the table says it")),
        (("ptq4dit-table1", "--model", "tinydit"), ("no model 'tinydit'", "did you mean 'tiny-dit'")),
        (("ptq4dit-table1", "protcol.n=4"), ("protcol",)),
        (("ptq4dit-table1", "--model", "tiny-dit", "protocol.n=0"), ("protocol.n must be a whole number",)),
    ],
)
def test_what_cannot_be_reproduced_is_refused_before_anything_runs(ditbench, arguments, words, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda _: pytest.fail("it ran"))
    outcome = ditbench("reproduce", *arguments)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_missing_weights_and_reference_are_one_message_before_anything_runs(ditbench, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda _: pytest.fail("it ran"))
    outcome = ditbench("reproduce", "ptq4dit-table1", f"model.source={tmp_path / 'none'}")
    assert outcome.code == 2
    for word in ("model dit-xl-2-256", "VIRTUAL_imagenet256_labeled.npz", "metrics.reference=", "--plan"):
        assert word in outcome.err


# ditbench reproduce --model tiny-dit


def test_a_reproduction_on_tiny_dit_prints_every_row_and_why_it_is_not_comparable(ditbench, tmp_path, monkeypatch):
    here = {name: registry.method(name) for name in ("fp", "ptq4dit")}
    monkeypatch.setattr(registry, "known_methods", lambda: here)
    outcome = ditbench("reproduce", "ptq4dit-table1", "--model", "tiny-dit", *TINY, f"results_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    lines = [re.split(r"  +", line) for line in outcome.out.splitlines()]
    for row in reported.table("ptq4dit-table1").rows:
        for column in ("FID", "IS", "Precision"):
            wanted = [*map(str, row.keys.values()), column, str(row.values[column])]
            (line,) = (line for line in lines if line[: len(wanted)] == wanted)
            if row.name in ("FP", "PTQ4DiT"):
                assert line[-1].startswith("not comparable: model, steps, n, calibration.n, features"), line
                assert line[5] != reported.EMPTY
            else:
                assert line[-1] == "not in ditbench yet"
    for reason in (
        "model: tiny-dit, not dit-xl-2-256",
        "n: 4, not 10000",
        "steps: 2, not 250; 2, not 100; 2, not 50",
        "calibration.n: 2, not 32",
        "(the zoo judge's), not torch_fidelity/fid (Inception's)",
        "reference: digits-1797, not VIRTUAL_imagenet256_labeled.npz",
        "simulated: 2 of 3 runs",
        "FID 12.553",
    ):
        assert reason in outcome.out
    assert "within\n" not in outcome.out and "outside\n" not in outcome.out
    records = list(tmp_path.glob("runs/reproduce-ptq4dit-table1/*/record.json"))
    assert len(records) == 3, "rows at 250, 100 and 50 steps share one run when the steps are overridden"


def test_without_overrides_another_model_takes_its_usual_n_and_steps():
    table = reported.table("ptq4dit-table1")
    lines = [line for line in rows.plan_lines(table, table.reproduce, "tiny-dit", ()) if line.job]
    for config in rows.configurations(line.job for line in lines).values():
        assert (config["protocol"]["n"], config["protocol"]["steps"]) == (256, 20)
        assert (config["protocol"]["sampler"], config["protocol"]["scope"]) == ("ddpm", "all")


def test_the_ablation_turns_off_what_its_rows_name():
    table = reported.table("ptq4dit-table3")
    lines = rows.plan_lines(table, table.reproduce, None, ())
    assert [line.job is None for line in lines] == [False, True, False], "salience at t = T/2 has no counterpart"
    bare, whole = rows.configurations(line.job for line in lines).values()
    assert (bare["method"]["parts"], whole["method"]["parts"]) == ("none", "csb+ssc")
    assert bare["bits"]["label"] == "w4a8" and bare["protocol"]["steps"] == 250


@pytest.mark.parametrize(("printed", "label"), [("W4A8", "w4a8"), ("FP8", "fp8")])
def test_a_rows_bits_are_those_that_it_runs_with(printed, label):
    table = reported.table("ptq4dit-table1")
    row = next(row for row in table.rows if row.name == "PTQ4DiT")
    row = replace(row, keys=row.keys | {"bits": printed})
    (line, *_) = rows.plan_lines(replace(table, rows=(row,)), table.reproduce, None, ())
    assert f"bits={label}" in line.job


# Verdicts


@pytest.mark.parametrize(
    ("paper", "ours", "ci95", "tolerance", "expected"),
    [
        (7.09, 7.60, (7.05, 8.15), 0.3, "within"),  # in the interval, further than the tolerance
        (7.09, 7.35, (7.30, 7.40), 0.3, "within"),  # outside of the interval, closer than the tolerance
        (7.09, 7.60, (7.30, 7.90), 0.3, "outside"),
        (7.09, 6.60, (6.50, 6.70), 0.3, "outside"),
        (7.09, 7.60, None, 0.3, "outside"),
        (7.09, 7.25, None, 0.25, "within"),
    ],
)
def test_a_verdict_is_within_by_interval_or_by_tolerance(paper, ours, ci95, tolerance, expected):
    assert verdicts.verdict(paper, ours, ci95, tolerance) == expected


def test_a_reason_comes_before_any_number():
    assert verdicts.verdict(7.0, 7.0, (6.9, 7.1), 0.3, ["model", "n"]) == "not comparable: model, n"


def config(**changes):
    made = {
        "model": {"name": "dit-xl-2-256", "source": "hub", "random": None, "stress": None},
        "protocol": {"name": "ptq4dit", "n": 10000, "steps": 250, "sampler": "ddpm", "skip": []},
        "method": {"name": "ptq4dit", "parts": "csb+ssc"},
        "bits": {"label": "w4a8", "weight": {"bits": 4}, "act": {"bits": 8}},
        "calibration": {"n": 32, "batch_size": 32},
        "generate": {"dtype": "float32", "batch_size": 64},
    }
    for name, value in changes.items():
        part, key = name.split("__")
        made[part] = made[part] | {key: value}
    return made


def test_settings_that_differ_are_reasons_and_where_the_weights_lie_is_none():
    assert verdicts.departures(config(), config()) == {}
    same = config(model__source="/here", generate__batch_size=8, calibration__batch_size=4, protocol__name="mine")
    assert verdicts.departures(same, config()) == {}
    assert verdicts.departures(config(protocol__n=5000, method__parts="none", bits__act={"bits": 4}), config()) == {
        "n": "5000, not 10000",
        "method.parts": "none, not csb+ssc",
        "bits.act.bits": "4, not 8",
    }
    assert verdicts.departures(config(protocol__skip=["qkv"]), config()) == {"skip": "['qkv'], not []"}
    assert verdicts.departures(config(model__stress={"seed": 0}), config())


@pytest.mark.parametrize(
    ("metric", "reference", "expected"),
    [
        ("torch_fidelity/fid", "real.npz", set()),
        ("torch_fidelity/is", None, set()),  # IS has no reference
        ("torch_fidelity/fid", "other.npz", {"reference"}),
        ("torch_fidelity/fid_judge", "digits", {"features", "reference"}),
    ],
)
def test_another_evaluator_is_a_reason(metric, reference, expected):
    wanted = metric.removesuffix("_judge")
    assert set(verdicts.evaluator_departures(metric, wanted, {"reference": reference}, "real.npz")) == expected


def a_record(value: float | None, status: str = "ok") -> Record:
    entry = {
        "value": value,
        "ci95": None if value is None else [value - 0.1, value + 0.1],
        "reason": "no weights" if value is None else None,
        "passport": {"reference": "VIRTUAL_imagenet256_labeled.npz"},
    }
    metrics = dict.fromkeys(("torch_fidelity/fid", "torch_fidelity/is", "torch_fidelity/precision"), entry)
    return Record("0" * 12, status, config(), "ptq4dit", "dit-xl-2-256", "x", error="broke", metrics=metrics)


def judged(row: reported.Row, record: Record | None, refusal: str | None = None) -> verdicts.Judged:
    section = reported.table("ptq4dit-table1").reproduce
    expected = type("Expected", (), {"raw": config()})()
    return verdicts.judged_row(rows.Line(row, ("a",), ("a",)), section, record, refusal, expected)["FID"]


def row(fid: float | None = 7.09, confidence: str = "primary") -> reported.Row:
    return reported.Row({"method": "PTQ4DiT"}, {"FID": fid, "IS": 1.0, "Precision": 1.0}, confidence, "s")


def test_a_run_like_the_papers_is_judged_by_its_numbers():
    assert judged(row(), a_record(7.0)).verdict == "within"
    assert judged(row(), a_record(9.17)).verdict == "outside"


def test_what_was_not_computed_says_why():
    assert judged(row(), a_record(None)).verdict == "not computed: no weights"
    assert judged(row(), a_record(7.0, status="failed")).verdict == "failed: broke"
    assert judged(row(), None, "no w4a8").verdict == "refused: no w4a8"
    assert judged(row(), None).verdict == "not in ditbench yet"
    assert judged(row(None), a_record(7.0)).verdict == "the paper prints no value"


def test_a_value_from_memory_is_never_confirmed():
    assert judged(row(confidence="recall"), a_record(7.09)).verdict == "not comparable: confidence"


def test_every_name_of_ours_that_a_reproducible_table_uses_is_mapped_or_known_to_be_unmapped():
    used = {row.name for name in REPRODUCIBLE for row in reported.table(name).rows}
    variants = {name for each in REPRODUCIBLE for name in reported.table(each).reproduce.rows}
    assert used - set(rows.OURS) - variants == {"TFMQ-DM", "G4W+P4A", "CSB (salience at t=T/2)"}
