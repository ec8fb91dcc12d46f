"""`ditbench paper`: numbers as papers report them."""

from __future__ import annotations

from ditbench.harness.cli.flags import Parser
from ditbench.harness.common.errors import UserError


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench paper", description="Numbers as papers report them.")
    parser.add_argument("action", choices=["list", "show"])
    parser.add_argument("name", nargs="?", help="of a table, to show: ptq4dit-table1")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    if options.action == "list" and options.name is not None:
        raise UserError(f"paper list: it lists all and takes no name, got {options.name!r}")
    from ditbench.harness.papers import reported

    if options.action == "show" and options.name is None:
        raise UserError("paper show: which table? `ditbench paper list` names them")
    print(reported.listed() if options.action == "list" else reported.shown(options.name))
    return 0
