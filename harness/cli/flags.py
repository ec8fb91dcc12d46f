"""What commands share in reading their arguments: errors of one line, and flags of ours among Hydra's overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import NoReturn

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import checked, no_folder

MOST = 1_000_000
CONFIG_DIR = ("--config-dir", "-cd")  # as Hydra calls it
SEARCH_PATH = "hydra.searchpath"
BITS = "bits="


def own_folders(arguments: list[str]) -> tuple[list[str], list[str | Path]]:
    """What is left of the arguments, and the folders that --config-dir and hydra.searchpath name.

    Raises:
        UserError: --config-dir without a folder; a folder or package of hydra.searchpath that is none.
    """
    left: list[str] = []
    folders: list[str | Path] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name == SEARCH_PATH and equals:
            folders += _searched(argument)
            continue
        if name not in CONFIG_DIR:
            left.append(argument)
            continue
        folder = value if equals else next(waiting, "")
        if not folder:
            raise UserError("--config-dir: of which folder?")
        folders.append(folder)
    return left, folders


def _searched(argument: str) -> list[Path]:
    """The folders of hydra.searchpath=[file://FOLDER,pkg://PACKAGE]."""
    from ditbench.harness.sweep.overrides import parsed  # here: it takes Hydra, which few commands need

    value = parsed([argument])[0].value()
    found = []
    for each in map(str, value if isinstance(value, list) else [value]):
        kind, colon, place = each.partition("://")
        if not colon or kind not in ("file", "pkg"):
            raise UserError(f"{SEARCH_PATH} {each}: write file://FOLDER or pkg://PACKAGE")
        found.append(checked(_folder_of_package(place) if kind == "pkg" else place, SEARCH_PATH))
    return found


def _folder_of_package(name: str) -> Path:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{SEARCH_PATH} pkg://{name}: there is no such package")
    return Path(spec.submodule_search_locations[0])


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
    """--force, --strict and --debug are ours; everything else is Hydra's. Formats may be written as tables print them: bits=NVFP4."""
    flags = {"--force": "force=true", "--strict": "strict=true", "--debug": "debug=true"}
    return [flags.get(each, each.lower() if each.startswith(BITS) else each) for each in arguments]
