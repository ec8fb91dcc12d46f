"""`ditbench cache`: what runs keep so that nothing is made twice."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from pathlib import Path

from ditbench.harness.cli.flags import Parser, days, folder
from ditbench.harness.common.errors import EXIT_FAILED_RUNS
from ditbench.harness.common.text_table import table


def command(arguments: list[str]) -> int:
    where = Parser(add_help=False, argument_default=SUPPRESS)  # before or behind the action
    where.add_argument("--results-dir", type=folder, help="default: ./results")
    where.add_argument("--cache-dir", type=folder, help="default: <results-dir>/cache")
    where.add_argument("--debug", action="store_true")
    parser = Parser(prog="ditbench cache", description="What runs keep so that nothing is made twice.", parents=[where])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("ls", parents=[where], help="every artifact: its kind, size, and what it is")
    actions.add_parser("size", parents=[where], help="bytes by kind")
    actions.add_parser(
        "verify", parents=[where], help="read every file and compare it with the SHA-256 that it was written with"
    )
    prune = actions.add_parser(
        "prune", parents=[where], help="remove what no finished run was made from, and what killed processes left"
    )
    prune.add_argument("--all", action="store_true", help="everything, also the samples of finished runs")
    prune.add_argument("--older-than", type=days, default=1.0, metavar="DAYS", help="keep what is younger (default: 1)")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    options = parser.parse_args(arguments, Namespace(results_dir=Path("results"), cache_dir=None))
    from ditbench.harness.records import cached

    cache = options.cache_dir or options.results_dir / "cache"
    found = cached.artifacts(cache)
    if options.action == "ls":
        rows = [(each.kind, each.key[:12], mebibytes(each.bytes), each.damage or each.title) for each in found]
        print(table(("kind", "key", "MiB", "what"), rows))
    elif options.action == "size":
        kinds = sorted({each.kind for each in found})
        sizes = {kind: [each.bytes for each in found if each.kind == kind] for kind in kinds}
        rows = [(kind, str(len(each)), mebibytes(sum(each))) for kind, each in sizes.items()]
        print(
            table(
                ("kind", "artifacts", "MiB"),
                [*rows, ("in all", str(len(found)), mebibytes(sum(map(sum, sizes.values()))))],
            )
        )
    elif options.action == "verify":
        problems = [problem for each in found for problem in cached.damaged(each)]
        print(
            "\n".join(
                [*problems, f"{len(found)} artifacts, {len(problems)} damaged files; runs that need one make it again"]
            )
        )
        return EXIT_FAILED_RUNS if problems else 0
    else:
        going = found if options.all else cached.unused(found, options.results_dir, options.older_than)
        rest = cached.leftovers(cache)
        if not options.dry_run:
            for path in [*(each.folder for each in going), *rest]:
                cached.remove(path)
        did = "would go" if options.dry_run else "removed"
        print(
            f"{did}: {len(going)} artifacts ({mebibytes(sum(each.bytes for each in going))} MiB), {len(rest)} leftovers"
        )
    return 0


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}"
