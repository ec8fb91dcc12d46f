"""`ditbench retry`: the runs of a sweep again that failed or never came."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.cli.flags import Parser, folder


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench retry",
        description="Run again what failed in a sweep, and what never came; overrides behind it (name=value) count for all.",
    )
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="such as launcher=joblib or memory=offload")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--failed", action="store_true", help="only what failed")
    which.add_argument("--missing", action="store_true", help="only what left no record")
    parser.add_argument("--sweep", metavar="STAMP", help="one of its sweeps; default: the newest")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_intermixed_args(arguments)
    from ditbench.harness.records.sweeps import FAILED, MISSING
    from ditbench.harness.sweep.retry import retry

    states = [FAILED] * (not options.missing) + [MISSING] * (not options.failed)
    return retry(options.results_dir, options.experiment, states, options.overrides, options.sweep, options.debug)
