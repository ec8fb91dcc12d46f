"""What commands share in reading their arguments: errors of one line, and flags of ours among Hydra's overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import NoReturn

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import no_folder

MOST = 1_000_000
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


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument as every other mistake is said; --help shows the rest."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('ditbench ')}: {message} ({self.prog} --help)")


def at_least(least: int) -> Callable[[str], int]:
    """A type of argument: a whole number, so large at least and not without measure."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= MOST:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {MOST:,}, got {text}")
        return value

    number.__name__ = "whole number"  # argparse says "invalid whole number value"
    return number


def days(text: str) -> float:
    """A type of argument: a number of days, 0 or more."""
    value = float(text)
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"must be a number of days, 0 or more, got {text}")
    return value


def without_overrides(names: Iterable[str], overrides: list[str]) -> list[str]:
    """The names that an option was given; key=value behind them belong to the overrides, to which they are added."""
    given = list(names)
    overrides += [each for each in given if "=" in each]
    return [each for each in given if "=" not in each]


def folder(text: str) -> Path:
    """A type of argument: a folder that is there, or that could be made there."""
    if why := no_folder(text):
        raise argparse.ArgumentTypeError(f"{text}: {why}; name another folder")
    return Path(text)


def file(text: str) -> Path:
    """A type of argument: a file that is there, or that could be written there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    folder(str(path.parent))
    return path


def flags_to_overrides(arguments: list[str]) -> list[str]:
    """--force, --strict and --debug are ours; everything else is Hydra's."""
    flags = {"--force": "force=true", "--strict": "strict=true", "--debug": "debug=true"}
    return [flags.get(argument, argument) for argument in arguments]
