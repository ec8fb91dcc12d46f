"""Packages that few users need: extras of ours, imported where they are used."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

from ditbench.harness.common.errors import UserError

# What a package tells its makers of each call without having asked, by a process of its own each time; it goes on without.
TELLS = {"openvino": "openvino_telemetry"}


def needed(package: str, extra: str, by: str) -> Any:
    """The package, imported. by: what asks for it, as a user writes it.

    Raises:
        UserError: it is not installed.
    """
    if package in TELLS:
        sys.modules.setdefault(TELLS[package], None)  # type: ignore[arg-type]  # to whoever imports it, it is not installed
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{by}: {package} is not installed; pip install 'ditbench[{extra}]'") from error


def installed(package: str) -> bool:
    """Whether it can be found; nothing of it is imported."""
    return find_spec(package) is not None
