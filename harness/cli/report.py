"""`ditbench report`: tables and plots of what was recorded."""

from __future__ import annotations

import sys
from pathlib import Path

from ditbench.harness.cli.flags import Parser, file, folder

OF_FILE = {".txt": "text", ".md": "md", ".csv": "csv", ".tex": "latex", ".html": "html"}


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench report", description="Tables and plots of what was recorded.")
    parser.add_argument("--format", choices=list(OF_FILE.values()), help="default: by the name of --out, else text")
    parser.add_argument("--experiment", help="one experiment; default: all")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--out", type=file, help="file to write; html default: <results-dir>/report[-EXPERIMENT].html")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="metrics to show, in this order, all of them")
    parser.add_argument("--over-seeds", action="store_true", help="one row for runs that differ in their seed only")
    parser.add_argument("--equal-bytes", action="store_true", help="rank runs of nearly equal bytes, not of one label")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_args(arguments)
    from ditbench.harness.report import report

    made = report(
        options.results_dir,
        options.experiment,
        options.format or OF_FILE.get(options.out.suffix if options.out else "", "text"),
        options.out,
        options.metrics,
        options.over_seeds,
        options.equal_bytes,
    )
    print(made.text)
    for line in made.damaged:
        print(f"ditbench: {line}", file=sys.stderr)
    if made.path is not None:
        print(made.path)
    return 0
