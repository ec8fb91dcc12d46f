"""How wide what is printed may be."""

from __future__ import annotations

import shutil
import sys
import textwrap

PIPED = 120  # columns: of a file, a log, another program
NARROWEST = 60  # what is narrower wraps anyway


def columns() -> int:
    """Of the terminal that stdout is; PIPED where it is none."""
    if not sys.stdout.isatty():
        return PIPED
    return max(shutil.get_terminal_size((PIPED, 24)).columns, NARROWEST)


def wrapped(text: str, width: int | None = None) -> str:
    """A sentence, or a line that may be long, on as many lines as it takes: what helps is often said last.

    Further lines stand two blanks deeper than the first. Commands and paths stay in one piece where they fit. width: default the
    terminal's, PIPED at most, since longer lines are hard to read.
    """
    width = width or min(columns(), PIPED)
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, replace_whitespace=False)
