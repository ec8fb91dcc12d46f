"""`ditbench evaluate`: other metrics of finished runs, without drawing again."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.cli.flags import Parser, folder, without_overrides
from ditbench.harness.common.errors import EXIT_FAILED_RUNS


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench evaluate",
        description="Score the samples of finished runs with other metrics; nothing is drawn again.",
    )
    parser.add_argument("target", help="a run's folder, or an experiment")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="device=… or metrics.…, such as metrics.reference=…"
    )
    parser.add_argument(
        "--metrics", nargs="+", required=True, metavar="NAME", help="as `ditbench list metrics` names them"
    )
    parser.add_argument("--again", action="store_true", help="also what is recorded already, after a metric was mended")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    from ditbench.harness.scoring import later_metrics

    named = without_overrides(options.metrics, options.overrides)
    metrics = [name for each in named for name in each.split(",")]
    outcome = later_metrics.evaluate(options.target, metrics, options.results_dir, options.overrides, options.again)
    print(outcome.text)
    return EXIT_FAILED_RUNS if outcome.failed else 0
