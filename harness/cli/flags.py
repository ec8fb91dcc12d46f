"""What commands share in reading their arguments: errors of one line, and flags of ours among Hydra's overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from ditbench.harness.common.errors import UserError

MOST = 1_000_000


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


def flags_to_overrides(arguments: list[str]) -> list[str]:
    """--force, --strict and --debug are ours; everything else is Hydra's."""
    flags = {"--force": "force=true", "--strict": "strict=true", "--debug": "debug=true"}
    return [flags.get(argument, argument) for argument in arguments]
