"""`ditbench reproduce`: a paper's table, run here and held against it."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.cli.flags import Parser, file, flags_to_overrides
from ditbench.harness.common.errors import EXIT_FAILED_RUNS

FORMATS = ("text", "markdown", "latex", "html")


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench reproduce", description="A paper's table, run here and held against it.")
    parser.add_argument("name", nargs="?", help="of a table: ptq4dit-table1 (ditbench paper list)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, as in ditbench run")
    parser.add_argument(
        "--model", help="another model than the paper's, such as tiny-dit: n and steps as it usually has"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="a .yaml with tables of your own (docs/papers.md)")
    parser.add_argument("--plan", action="store_true", help="only say what it needs; nothing is run")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the table that is printed")
    parser.add_argument("--out", type=file, help="file to write; html default: <results_dir>/reproduce-NAME.html")
    options = parser.parse_intermixed_args(flags_to_overrides(arguments))
    name, overrides = options.name, options.overrides
    if name is not None and "=" in name:  # of a file with one table, which need not be named
        name, overrides = None, [name, *overrides]
    from ditbench.harness.papers import reproduce

    if options.plan:
        print(reproduce.plan(name, options.model, overrides, options.table))
        return 0
    outcome = reproduce.reproduce(name, options.model, overrides, options.table, options.format, options.out)
    print(outcome.text)
    if outcome.path is not None:
        print(outcome.path)
    return EXIT_FAILED_RUNS if outcome.failed else 0
