"""Reported numbers: what the files under results/papers hold, and what is refused in them."""

from __future__ import annotations

import shutil

import pytest
import yaml

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import PAPERS
from ditbench.harness.papers import reported


def test_every_table_has_an_id_and_a_name_of_its_own():
    tables = [each for paper in reported.papers().values() for each in paper.tables]
    names = [name for each in tables for name in (each.id, each.name)]
    assert len(tables) == len(reported.tables()) == 39
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
