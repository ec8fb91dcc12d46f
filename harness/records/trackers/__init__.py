"""The trackers: one file each (`base.py` says what is in one), found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import Any

from ditbench.harness.common.errors import UserError

NONE = "none"


def known_trackers() -> tuple[str, ...]:
    return (*(each.name for each in pkgutil.iter_modules(__path__) if each.name != "base"), NONE)


def tracker(settings: dict[str, Any]) -> Any:
    """The module of the tracker that a configuration's `tracker` section names; None if nobody is to hear of the run.

    Raises:
        UserError: its package is not installed, or its settings cannot be used.
    """
    kind = settings["kind"]
    if kind == NONE or settings["mode"] == "disabled":
        return None
    module = importlib.import_module(f"{__name__}.{kind}")
    if find_spec(module.PACKAGE) is None:
        wanted = f"ditbench[{module.EXTRA}]" if module.EXTRA else module.PACKAGE
        raise UserError(f"tracker={kind}: {module.PACKAGE} is not installed; pip install '{wanted}', or tracker=none")
    return module if module.is_on(settings) else None
