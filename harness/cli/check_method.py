"""`ditbench check-method`: the conformance suite on one method."""

from __future__ import annotations

from ditbench.harness.cli.flags import Parser


def command(arguments: list[str]) -> int:
    parser = Parser(prog="ditbench check-method", description="The conformance suite on one method.")
    parser.add_argument("name", help="a method's name, or all")
    parser.add_argument("--debug", action="store_true")
    from ditbench.harness.fitting.conformance import check_methods

    return check_methods(parser.parse_args(arguments).name)
