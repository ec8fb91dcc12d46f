"""Flags of ours among Hydra's overrides."""

from __future__ import annotations


def flags_to_overrides(arguments: list[str]) -> list[str]:
    """--force, --strict and --debug are ours; everything else is Hydra's."""
    flags = {"--force": "force=true", "--strict": "strict=true", "--debug": "debug=true"}
    return [flags.get(argument, argument) for argument in arguments]
