"""Every table of the docs is read: its marks are those that its paired tests give, worked out here from their p values alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source checkout")
TABLE = re.compile(r"<!-- table: (?P<name>\S+) -->\n(?P<rows>(?:\|.*\n)+)")


def tables():
    return [
        (f"{page.name}: {found['name']}", found["name"], found["rows"])
        for page in sorted((ROOT / "docs").glob("*.md"))
        for found in TABLE.finditer(page.read_text())
    ]


def shown(rows: str) -> dict[tuple[str, str, str], str]:
    """{(column, bits, run): "best" | "second" | ""} of a table in Markdown; a run is called as its first cell says."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in rows.strip().splitlines()]
    return {
        (head, line[1], line[0]): "best" if cell.startswith("**") else "second" if cell.startswith("<ins>") else ""
        for line in lines[2:]
        for head, cell in zip(lines[0], line, strict=True)
    }


def like_float(rows: str) -> set[tuple[str, str, str]]:
    """The (column, bits, run) whose cells have a ~."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in rows.strip().splitlines()]
    return {
        (head, line[1], line[0]) for line in lines[2:] for head, cell in zip(lines[0], line, strict=True) if "~" in cell
    }


def not_told_from_float(tests: pd.DataFrame, contest: str, run: str) -> bool:
    own = tests[(tests.ranked_in == contest) & (tests["first"] == run) & (tests.second == "float model")]
    return bool((own.p_holm >= 0.05).any())


def expected(tests: pd.DataFrame, contest: str, run: str) -> str:
    """By the tests of one metric: best is nobody's loser; second loses to the one best only."""
    own = tests[(tests.ranked_in == contest) & (tests.second != "float model")]
    if own.empty or own.better.iloc[0] == "none":
        return ""
    lost = {name: set() for name in {*own["first"], *own.second}}
    for _, each in own[own.p_holm < 0.05].iterrows():
        first_wins = (each.difference > 0) == (each.better == "higher")
        winner, loser = (each["first"], each.second) if first_wins else (each.second, each["first"])
        lost[loser].add(winner)
    best = {name for name, by in lost.items() if not by}
    if run not in lost or len(best) == len(lost):
        return ""
    return "best" if run in best else "second" if len(best) == 1 and lost[run] == best else ""


def problems(name: str, rows: str, tests: pd.DataFrame | None) -> list[str]:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from docs_tables import COLUMNS
    finally:
        sys.path.pop(0)
    metric_of = {heading: metric for metric, (heading, _) in COLUMNS.items()}
    found = []
    for (head, bits, run), mark in shown(rows).items():
        metric = metric_of.get(head)
        its = None if tests is None or metric is None else tests[tests.metric == metric]
        wanted = "" if its is None or its.empty else expected(its, bits, run)
        if mark != wanted:
            found.append(
                f"{name}: {run} {bits}, {head}: shown as {mark or 'nothing'}, the tests say {wanted or 'nothing'}"
            )
        if its is not None and ((head, bits, run) in like_float(rows)) != not_told_from_float(its, bits, run):
            found.append(f"{name}: {run} {bits}, {head}: the sign ~ and the test against the float model disagree")
    return found


@pytest.mark.parametrize(
    ("name", "rows"), [(name, rows) for _, name, rows in tables()], ids=[id for id, _, _ in tables()]
)
def test_marks_and_tests_agree(name, rows):
    path = ROOT / "results" / f"{name}.tests.csv"
    assert problems(name, rows, pd.read_csv(path) if path.is_file() else None) == []


ROWS = """| method | bits | PSNR dB ↑ |
| --- | --- | ---: |
| fp | W16A16 | 52.00 ± 0.10 |
| a | W4A8 | {a} |
| b | W4A8 | {b} |
| c | W4A8 | 20.00 ± 0.10 |
"""
TESTS = pd.DataFrame(
    [("a", "b", 1.0, 0.3), ("a", "c", 11.0, 0.001), ("b", "c", 10.0, 0.001)],
    columns=["first", "second", "difference", "p_holm"],
).assign(metric="psnr", better="higher", ranked_in="W4A8")


def test_a_mark_that_no_test_gives_is_noticed():
    tied = ROWS.format(a="**31.00 ± 0.10**", b="**30.00 ± 0.10**")
    assert problems("x", tied, TESTS) == []
    for wrong in (
        {"a": "**31.00 ± 0.10**", "b": "<ins>30.00 ± 0.10</ins>"},
        {"a": "31.00 ± 0.10", "b": "30.00 ± 0.10"},
    ):
        assert problems("x", ROWS.format(**wrong), TESTS) != []
    assert len(problems("x", tied, None)) == 2, "without tests nobody is marked"
    beside_float = pd.DataFrame([("a", "float model", -0.1, 0.4)], columns=TESTS.columns[:4])
    beside_float = pd.concat([TESTS, beside_float.assign(metric="psnr", better="higher", ranked_in="W4A8")])
    assert problems("x", tied, beside_float) != [], "a cell like the float model's has its sign"
    assert problems("x", ROWS.format(a="**31.00 ± 0.10 ~**", b="**30.00 ± 0.10**"), beside_float) == []
    apart = TESTS.assign(p_holm=0.01)
    assert problems("x", ROWS.format(a="**31.00 ± 0.10**", b="<ins>30.00 ± 0.10</ins>"), apart) == []


def test_no_caption_speaks_of_resamples_that_were_not_drawn_or_of_signs_that_its_rows_cannot_have():
    """Rows of other libraries: intervals are Student's, in the middle of which the value lies."""
    found = re.compile(r"<!-- external: \S+ -->\n(?:\|.*\n)+\n(?P<caption>.*)\n")
    (caption,) = found.findall((ROOT / "docs" / "external.md").read_text())
    assert "95 % intervals over the samples; " in caption
    assert not any(word in caption for word in ("bootstrap", "~", "marks"))
