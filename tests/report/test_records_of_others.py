"""Records of others: nothing is written outside, no spreadsheet runs a cell, no name stretches the page or drives the terminal."""

from __future__ import annotations

import csv
import io

import pytest

from ditbench.harness.common.files import file_name
from ditbench.harness.report import compare, report
from ditbench.harness.report.compare import short_names

LONG = "x" * 10_000


@pytest.mark.parametrize("start", ["=cmd|' /C calc'!A0", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_of_a_csv_starts_a_formula(add_run, results_dir, metric, start):
    add_run(start, metrics={start: metric(-1.5, 0.5)}, error=None)
    add_run("rtn", error=f"{start} broke")
    (head, *rows) = list(csv.reader(io.StringIO(report(results_dir, None, "csv").text, newline="")))
    texts = [cell for row in rows for cell in row]
    assert not [cell for cell in head if cell[:1] in "=+-@\t\r"]
    numbers = [cell for cell in texts if cell[:1] == "-"]
    assert numbers and all(float(cell) < 0 for cell in numbers), "numbers stay numbers"
    assert not [cell for cell in texts if cell[:1] and cell[:1] in "=+@\t\r"]
    assert f"'{start.strip()}" in head and f"'{start.strip()} broke" in texts


def test_long_names_are_cut_and_still_told_apart():
    one, other = compare.printable(LONG + "a"), compare.printable(LONG + "b")
    assert one != other and len(one) <= 60 and one[:40] == "x" * 40
    assert compare.printable("smoothquant strength=0.6") == "smoothquant strength=0.6"
    assert len(set(short_names([f"{LONG}/a", f"{LONG}/b", LONG]).values())) == 3


def test_names_do_not_drive_the_terminal(add_run, results_dir):
    add_run("rtn\x1b[2J", error="\x1b]0;owned\x07")
    assert "\x1b" not in report(results_dir, None, "md").text


@pytest.mark.parametrize("where", ["method", "metric", "setting", "experiment_label", "stress", "error"])
def test_a_name_of_10_kb_does_not_stretch_the_page(add_run, results_dir, metric, browser, where):
    add_run("rtn")
    more = {
        "method": {"method": LONG},
        "metric": {"metrics": {LONG: metric(1.0, 0.1), f"lib/{LONG}b": metric(1.0, 0.1, unit=LONG)}},
        "setting": {"strength": LONG},
        "experiment_label": {"efficiency": {"device": LONG, "backend": LONG}},
        "stress": {"stress": LONG},
        "error": {"error": LONG},
    }[where]
    add_run(**{"method": "rtn", "bits": "W4A4"} | more)
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(report(results_dir, None, "html").path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    widest = page.evaluate("Math.max(...[...document.querySelectorAll('table')].map(t => t.scrollWidth))")
    assert widest < 4000
    page.close()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../x", "_.._x"),
        ("/etc/passwd", "_etc_passwd"),
        ("..", "_"),
        ("", "_"),
        ("a\\b\0c", "a_b_c"),
        ("né-1.5", "né-1.5"),
    ],
)
def test_the_name_of_a_file_leads_nowhere_else(text, name):
    assert file_name(text) == name
    assert len(file_name(LONG)) == 100
