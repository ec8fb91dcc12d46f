"""Reported numbers: what the files under results/papers hold, and what is refused in them."""

from __future__ import annotations

import copy
import shutil

import pytest
import yaml

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import PAPERS
from ditbench.harness.papers import reported, schema
from ditbench.harness.papers.reproduce import rows as rows_of


def test_every_table_has_an_id_and_a_name_of_its_own():
    tables = [each for paper in reported.papers().values() for each in paper.tables]
    names = [name for each in tables for name in (each.id, each.name)]
    assert len(tables) == len(reported.tables()) == 39
    assert len(names) == len(set(names))


def test_every_row_has_a_confidence_of_the_closed_set_and_a_source_that_its_file_names():
    for paper in reported.papers().values():
        for each in paper.tables:
            for row in each.rows:
                assert row.confidence in schema.CONFIDENCES, (each.id, row)
                assert paper.sources[row.source], (each.id, row)
                assert row.keys, (each.id, row)


def test_no_two_rows_of_a_table_have_the_same_name():
    for each in reported.tables().values():
        titles = [row.title for row in each.rows]
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
    "rows of no method": (["tables", 0, "reproduce", "rows"], {"PTQ4DIT": ["method=htg"]}, ("'PTQ4DIT'", "'PTQ4DiT'")),
    "rows that choose no method": (["tables", 0, "reproduce", "rows"], {"FP": ["fp"]}, ("first of them method=",)),
    "a model and models": (["tables", 0, "reproduce", "models"], {}, ("one of model and models, and has both",)),
    "a reason for nothing": (["tables", 0, "reproduce", "lacks"], {"PTQ": "no"}, ("lacks: no such name in the table",)),
    "a method for all rows": (["tables", 0, "reproduce", "overrides", "method"], "fp", ("'method' is not one",)),
    "a section as a setting": (["tables", 0, "reproduce", "overrides", "model"], {"size": 3}, ("'model' is not one",)),
    "a nested setting": (["tables", 0, "reproduce", "overrides", "bits.act"], {"bits": 3}, ("bits.act.part: value",)),
    "a scale of zero": (["tables", 0, "reproduce", "scale"], {"FID": 0}, ("scale: FID: expected a number above 0",)),
    "a negative tolerance": (["tables", 0, "reproduce", "tolerance", "FID"], -1, ("no number of 0 or more for FID",)),
    "no metric": (["tables", 0, "reproduce", "metrics"], {}, ("nothing to compare",)),
    "text where a number is compared": (["tables", 0, "rows", 3, "FID"], "5.69x", ("FID of 250 W8A8 PTQD", "'5.69x'")),
    "a number that is none": (["tables", 0, "rows", 3, "FID"], float("nan"), ("expected a number or null, got nan",)),
    "steps that are none": (["tables", 0, "reproduce", "steps"], 0, ("steps: expected a whole number, got 0",)),
    "a key twice": (["tables", 0, "keys"], ["steps", "bits", "bits"], ("'bits' is there twice",)),
    "a key that is a column": (["tables", 0, "keys"], ["FID", "method"], ("'FID' can only be one of",)),
    "no rows": (["tables", 0, "rows"], [], ("rows: there are none",)),
    "a name that is no folder": (["tables", 0, "name"], "../x", ("letters, digits",)),
    "run and not run": (["tables", 0, "cannot_run"], "never", ("reproduce and cannot_run",)),
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
    "a metric without tolerance": (
        ["tables", 0, "reproduce", "metrics", "size_mb"],
        "x",
        ("no number of 0 or more for size_mb",),
    ),
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a mapping, got None"),
        ("[1, 2]", "expected a mapping, got"),
        ("paper: a\npaper: b", "'paper' is there twice"),
        ("a: 2001-99-99", "not readable as YAML"),
        ("? [1]\n: 2", "not readable as YAML|no field"),
        ("a: &x [*x]", "no field 'a'"),
        ("[" * 5000, "not readable as YAML"),
        ("a: !!python/object:os.system x", "not readable as YAML"),
        ("\x00", "not readable as YAML"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_in_a_line(text, words):
    with pytest.raises(UserError, match=words) as refusal:
        schema.parsed(text, "mine.yaml")
    assert str(refusal.value).startswith("mine.yaml") and "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_or_is_a_folder_or_no_text_is_refused_in_a_line(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "binary.yaml"):
        with pytest.raises(UserError, match="no file of tables that can be read"):
            schema.read(path)


def places(node, place=()):
    yield place
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*place, key))


ODD = (None, True, -1, 1.5, float("inf"), "", "x y", "a=b", [], [[]], ["x"], {}, {"x": {}}, {1: 2}, {None: None})


def test_whatever_stands_in_a_files_place_is_a_table_or_an_error_of_a_line_or_two():
    """Every place of a file with a section `reproduce`, with fifteen values in turn, up to the overrides of its runs."""
    whole = (PAPERS / "svdquant.yaml").read_text()
    values = yaml.safe_load(whole)
    values["tables"] = values["tables"][:1]
    values["tables"][0]["rows"] = values["tables"][0]["rows"][:2]
    values["tables"][0]["reproduce"]["lacks"] = {}
    values["tables"][0]["reproduce"]["models"] = {"FLUX.1-dev": ["model=flux.1-dev", "protocol.steps=50"]}
    refused = 0
    for place in places(values):
        for odd in ODD:
            changed = copy.deepcopy({"root": values})
            where, last = changed, "root"
            for key in place:
                where, last = where[last], key
            where[last] = odd
            try:
                for each in schema.parsed(yaml.safe_dump(changed["root"]), "mine.yaml").tables:
                    if each.reproduce:
                        rows_of.plan_lines(each, rows_of.reproducible(each), None, ())
            except UserError as error:
                refused += 1
                assert len(str(error).splitlines()) <= 2 and len(str(error)) < 1000, error
    assert refused > 500


def test_two_files_with_the_same_table_are_refused(tmp_path):
    for name in ("one", "two"):
        shutil.copy(PAPERS / "dit.yaml", tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match="two.yaml.*taken, by one.yaml"):
        reported.papers(tmp_path)


def test_what_was_read_second_hand_is_called_so():
    for paper in reported.papers().values():
        for table in paper.tables:
            for row in table.rows:
                if "second-hand" in paper.sources[row.source]:
                    assert row.confidence != "primary", f"{table.name}: {row.title}"
