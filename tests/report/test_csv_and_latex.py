"""What is pasted elsewhere: a csv in a spreadsheet, a table in a paper."""

from __future__ import annotations

import csv
import io
import re

from ditbench.harness.report import report


def test_no_cell_of_a_csv_is_a_formula(add_run, results_dir, metric):
    for start in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1"):
        add_run("a", metrics={"psnr": metric(20.0)}, experiment="x", error=f"{start} of a run", note=start)
    rows = list(csv.reader(io.StringIO(report(results_dir, None, "csv").text)))
    assert len(rows) == 8 and len({len(row) for row in rows}) == 1
    errors = [row[rows[0].index("error")] for row in rows[1:]]
    assert all(error.startswith("'") for error in errors), errors
    for row in rows:
        for cell in row:
            assert not cell.lstrip().startswith(("=", "+", "@")) and not re.match(r"-[^\d]", cell)


def test_a_wide_latex_table_is_drawn_as_wide_as_the_text(add_run, results_dir, metric):
    add_run("a", metrics={"psnr": metric(20.0)})
    lines = report(results_dir, None, "latex").text.splitlines()
    places = [
        lines.index(line) for line in (r"\begin{adjustbox}{max width=\linewidth}", r"\end{tabular}", r"\end{adjustbox}")
    ]
    assert places == sorted(places) and "adjustbox" in lines[0]
