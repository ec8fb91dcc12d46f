"""Flags of ours among Hydra's overrides."""

from __future__ import annotations

from ditbench.harness.common.errors import UserError

CONFIG_DIR = ("--config-dir", "-cd")  # as Hydra calls it


def own_folders(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is left of the arguments, and the folders that --config-dir names.

    Raises:
        UserError: --config-dir without a folder.
    """
    left, folders = [], []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in CONFIG_DIR:
            left.append(argument)
            continue
        folder = value if equals else next(waiting, "")
        if not folder:
            raise UserError("--config-dir: of which folder?")
        folders.append(folder)
    return left, folders


def flags_to_overrides(arguments: list[str]) -> list[str]:
    """--force, --strict and --debug are ours; everything else is Hydra's."""
    flags = {"--force": "force=true", "--strict": "strict=true", "--debug": "debug=true"}
    return [flags.get(argument, argument) for argument in arguments]
