"""`ditbench run`: one run or a sweep."""

from __future__ import annotations

from ditbench.harness.cli.flags import flags_to_overrides
from ditbench.harness.common.imports import importing


def command(arguments: list[str]) -> int:
    """`ditbench run`: compose with Hydra, run every job, print the comparison."""
    if any(argument in ("-h", "--help") for argument in arguments):
        from ditbench.harness.cli.command_line import HELP

        print(HELP)
        return 0
    if "--plan" in arguments:
        from ditbench.harness.sweep.plan import plan

        print(plan(flags_to_overrides([argument for argument in arguments if argument != "--plan"])))
        return 0
    with importing():
        from ditbench.harness.sweep.launch import launch

    return launch(flags_to_overrides(arguments))
