"""`ditbench zoo`: the embedded models."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.cli.flags import Parser, folder


def command(arguments: list[str]) -> int:
    from ditbench.harness.zoo import trainable

    parser = Parser(prog="ditbench zoo", description="The embedded models.")
    parser.add_argument("action", choices=["train"])
    parser.add_argument("name", choices=sorted(trainable()))
    parser.add_argument("--out", type=folder, help="folder to write; default: where the shipped weights are")
    parser.add_argument(
        "--checkpoints", type=folder, default=Path(".zoo-checkpoints"), help="an interrupted training resumes"
    )
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    made, numbers = trainable()[options.name](options.out, options.checkpoints / options.name)
    for name, value in numbers.items():
        print(f"{name}: {value}")
    print(made)
    return 0
