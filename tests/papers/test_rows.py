"""A table's rows become configurations of runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ditbench.harness.papers import reported
from ditbench.harness.papers.reproduce import rows

REPRODUCIBLE = [each.name for each in reported.tables().values() if each.reproduce]


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


def test_every_name_of_ours_that_a_reproducible_table_uses_is_mapped_or_known_to_be_unmapped():
    used = {row.name for name in REPRODUCIBLE for row in reported.table(name).rows}
    variants = {name for each in REPRODUCIBLE for name in reported.table(each).reproduce.rows}
    assert used - set(rows.OURS) - variants == {"TFMQ-DM", "G4W+P4A", "CSB (salience at t=T/2)"}
