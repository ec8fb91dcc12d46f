"""`ditbench data`: prompt sets, reference batches and judges of others."""

from __future__ import annotations

from ditbench.harness.cli.flags import Parser
from ditbench.harness.common.errors import EXIT_USER, UserError


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench data", description="What others publish: prompt sets, reference batches, judges' weights."
    )
    parser.add_argument("action", choices=["list", "fetch", "verify"])
    parser.add_argument("name", nargs="?", help="of an entry (ditbench data list); verify without one takes all")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    if options.action == "list" and options.name is not None:
        raise UserError(f"data list: it lists all and takes no name, got {options.name!r}")
    from ditbench.eval import data, fetch

    if options.action == "list":
        print(data.listed())
        return 0
    if options.action == "fetch":
        if options.name is None:
            raise UserError("data fetch: what? `ditbench data list` names what there is")
        print(fetch.fetch(data.find_data(options.name)))
        return 0
    text, good = data.verified([options.name] if options.name else data.known_data())
    print(text)
    return 0 if good else EXIT_USER
