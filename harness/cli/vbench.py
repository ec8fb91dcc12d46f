"""`ditbench vbench`: official VBench on recorded videos."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.cli.flags import Parser, folder
from ditbench.harness.common.errors import EXIT_FAILED_RUNS


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench vbench", description="Official VBench, in an environment of its own, on recorded videos."
    )
    parser.add_argument("target", help="a run's folder, or an experiment")
    parser.add_argument("--dimension", nargs="+", metavar="NAME", help="default: those that the prompts are for")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    from ditbench.harness.scoring import official_vbench

    outcome = official_vbench.score(options.target, options.dimension, options.results_dir)
    print(outcome.text)
    return EXIT_FAILED_RUNS if outcome.failed else 0
