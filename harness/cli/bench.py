"""`ditbench bench`: latency and memory of a denoising step."""

from __future__ import annotations

from ditbench.harness.cli.flags import Parser, at_least, flags_to_overrides, without_overrides
from ditbench.harness.common.errors import unknown_name


def command(arguments: list[str]) -> int:
    from ditbench.harness.bench import Options, bench, plot, shown
    from ditbench.harness.bench.candidates import MODES
    from ditbench.harness.bench.engines.base import known_engines

    usual = Options()
    parser = Parser(
        prog="ditbench bench", description="Latency and memory of a denoising step against bf16, taking turns."
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration: model=… method=…")
    parser.add_argument("--formats", nargs="+", default=usual.formats, metavar="BITS", help="w8a8 w4a8 …")
    parser.add_argument("--modes", nargs="+", default=usual.modes, choices=MODES)
    parser.add_argument("--batches", nargs="+", type=at_least(1), default=usual.batches, help="rows of one call")
    parser.add_argument(
        "--others",
        nargs="+",
        default=[],
        metavar="ENGINE",
        help=f"other libraries beside ours, each in a process of its own: {', '.join(known_engines())}",
    )
    parser.add_argument("--repeats", type=at_least(1), default=usual.repeats)
    options = parser.parse_intermixed_args(flags_to_overrides(arguments))
    options.formats = without_overrides(options.formats, options.overrides)
    named = ",".join(without_overrides(options.others, options.overrides)).split(",")
    options.others = list(dict.fromkeys(name for name in named if name))
    for name in options.others:
        if name not in known_engines():
            raise unknown_name("engine", name, known_engines())
    chosen = Options(
        *(tuple(getattr(options, name)) for name in ("formats", "modes", "batches", "others")), repeats=options.repeats
    )
    record, path = bench(chosen, options.overrides)
    plot(record, path.with_suffix(".html"))
    print(f"{shown(record)}\n{path}")
    return 0
