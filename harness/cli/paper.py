"""`ditbench paper`: numbers as papers report them."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.cli.flags import Parser
from ditbench.harness.common.errors import UserError


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench paper", description="Numbers as papers report them.")
    parser.add_argument("action", choices=["list", "show"])
    parser.add_argument(
        "name", nargs="?", help="of a table, to show (ptq4dit-table1), or of a paper whose tables are not here (htg)"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="a .yaml with tables of your own (docs/papers.md)")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    if options.action == "list" and (given := options.name or options.table):
        raise UserError(f"paper list: it lists all of ditbench's and takes neither name nor file, got {str(given)!r}")
    from ditbench.harness.papers import reported

    print(reported.listed() if options.action == "list" else reported.shown(options.name, options.table))
    return 0
