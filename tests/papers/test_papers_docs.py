"""What docs/papers.md and the files under results/papers tell a user to write is what can be read and run."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from ditbench.harness.papers import reported, schema
from ditbench.harness.papers.reproduce import rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "papers.md"
GAPS = {stem: gap.add for stem, paper in reported.papers().items() for gap in paper.missing if gap.add}


@pytest.mark.skipif(not PAGE.is_file(), reason="not a source checkout")
def test_the_pages_example_is_a_table_that_lacks_what_it_says():
    (example,) = re.findall(r"```yaml\n(.+?)```", PAGE.read_text(), re.DOTALL)
    (table,) = schema.parsed(example, "the page").tables
    lines = rows.plan_lines(table, rows.reproducible(table), None, ())
    assert [line.lacks for line in lines] == [(), ("method Ours",), ("method TFMQ-DM",)]
    assert set(rows.configurations(line.job for line in lines)) == {lines[0].job}


@pytest.mark.skipif(not PAGE.is_file(), reason="not a source checkout")
def test_the_page_explains_every_field_of_reproduce_and_no_other():
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| `\w+`(, or `\w+`)? \|", line)]
    explained = {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert explained == {each.name for each in fields(schema.Reproduce)}


def test_htg_and_lrq_dit_have_files_to_fill_in():
    assert set(GAPS) == {"htg", "lrq_dit"}


@pytest.mark.parametrize("stem", GAPS)
def test_a_file_to_fill_in_runs_as_it_is_and_claims_no_number(stem):
    (table,) = schema.parsed(GAPS[stem], stem).tables
    assert {value for row in table.rows for value in row.values.values()} == {None}
    lines = rows.plan_lines(table, rows.reproducible(table), None, ())
    assert all(line.job for line in lines)
    assert len(rows.configurations(line.job for line in lines)) == len(table.rows)
    assert table.name not in reported.tables()
