"""`ditbench reproduce`: a paper's table, run here and held against it."""

from __future__ import annotations

from ditbench.harness.cli.flags import Parser, flags_to_overrides
from ditbench.harness.common.errors import EXIT_FAILED_RUNS


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench reproduce", description="A paper's table, run here and held against it.")
    parser.add_argument("name", help="of a table: ptq4dit-table1 (ditbench paper list)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, as in ditbench run")
    parser.add_argument(
        "--model", help="another model than the paper's, such as tiny-dit: n and steps as it usually has"
    )
    parser.add_argument("--plan", action="store_true", help="only say what it needs; nothing is loaded or run")
    options = parser.parse_intermixed_args(flags_to_overrides(arguments))
    from ditbench.harness.papers import reproduce

    if options.plan:
        print(reproduce.plan(options.name, options.model, options.overrides))
        return 0
    outcome = reproduce.reproduce(options.name, options.model, options.overrides)
    print(outcome.text)
    return EXIT_FAILED_RUNS if outcome.failed else 0
