"""`ditbench status`: how the runs of an experiment stand, from any machine that sees its folder."""

from __future__ import annotations

import json
from pathlib import Path

from ditbench.harness.cli.flags import Parser, folder


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench status", description="What of an experiment runs, is done, failed, refused or not there."
    )
    parser.add_argument("experiment")
    parser.add_argument("--sweep", metavar="STAMP", help="one of its sweeps; default: the newest")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_args(arguments)
    from ditbench.harness.sweep.overview import as_json, as_text, overview

    found = overview(options.results_dir, options.experiment, options.sweep)
    print(json.dumps(as_json(found), indent=2) if options.format == "json" else as_text(found))
    return 0
