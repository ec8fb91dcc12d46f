"""How wide what is printed may be."""

from __future__ import annotations

import shutil
import sys

PIPED = 120  # columns: of a file, a log, another program
NARROWEST = 60  # what is narrower wraps anyway


def columns() -> int:
    """Of the terminal that stdout is; PIPED where it is none."""
    if not sys.stdout.isatty():
        return PIPED
    return max(shutil.get_terminal_size((PIPED, 24)).columns, NARROWEST)


def text_columns() -> int:
    """Of sentences: longer lines than PIPED are hard to read."""
    return min(columns(), PIPED)
