"""`ditbench compare`: paired tests between methods, sample by sample."""

from __future__ import annotations

import sys
from pathlib import Path

from ditbench.harness.cli.flags import Parser, file, folder


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench compare",
        description="Paired tests between methods of the same bits, and against the float model: what marks in a report rest on.",
    )
    parser.add_argument("experiment", nargs="?", help="default: all")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="default: every metric that can be tested")
    parser.add_argument("--bits", nargs="+", metavar="LABEL", help="only these, such as W4A8")
    parser.add_argument("--over-seeds", action="store_true", help="over runs that differ in their seed only")
    parser.add_argument("--equal-bytes", action="store_true", help="runs of nearly equal bytes, not of one label")
    parser.add_argument("--format", choices=["text", "csv"], default="text")
    parser.add_argument("--out", type=file, help="file to write")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_args(arguments)
    from ditbench.harness.report import comparisons

    made = comparisons(
        options.results_dir,
        options.experiment,
        options.metric,
        options.bits,
        options.over_seeds,
        options.equal_bytes,
        options.format,
        options.out,
    )
    print(made.text)
    for line in made.damaged:
        print(f"ditbench: {line}", file=sys.stderr)
    if made.path is not None:
        print(made.path)
    return 0
