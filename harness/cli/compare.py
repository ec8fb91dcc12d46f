"""`ditbench compare`: paired tests between methods, sample by sample."""

from __future__ import annotations

import sys
from pathlib import Path

from ditbench.harness.cli.flags import Parser, folder


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench compare",
        description="Paired tests between methods of the same bits, and against the float model, sample by sample.",
    )
    parser.add_argument("experiment", nargs="?", help="default: all")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="default: every metric with a value per sample")
    parser.add_argument("--bits", nargs="+", metavar="LABEL", help="only these, such as W4A8")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_args(arguments)
    from ditbench.harness.report import comparisons

    made = comparisons(options.results_dir, options.experiment, options.metric, options.bits)
    print(made.text)
    for line in made.damaged:
        print(f"ditbench: {line}", file=sys.stderr)
    return 0
