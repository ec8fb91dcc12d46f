"""Rows of text as aligned columns, for the terminal: what does not fit goes on in the next line of its cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ditbench.harness.common.terminal import columns

GAP = 2
LEAST = 12  # of a column that is wrapped


def table(header: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None, indent: int = 0) -> str:
    """Columns padded to their widest cell. Where they do not fit, cells of several words are wrapped; names and numbers stay whole.

    width: of all together, default the terminal's; indent: blanks in front of every line, within width.
    """
    width = (width or columns()) - indent
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    whole = _whole(lines, width)
    made = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_edge=False, header_style="")
    for place, title in enumerate(lines[0]):
        made.add_column(Text(title), no_wrap=place in whole, overflow="fold")
    for line in lines[1:]:
        made.add_row(*map(Text, line))
    written = StringIO()
    console = Console(
        file=written, width=width, color_system=None, highlight=False, emoji=False, markup=False, legacy_windows=False
    )
    console.print(made)
    return "\n".join(f"{' ' * indent}{line}".rstrip() for line in written.getvalue().splitlines())


def _whole(lines: Sequence[Sequence[str]], width: int) -> set[int]:
    """The columns that are not wrapped: the first, and those of single words, if that leaves a little room for the others. What is
    not wrapped and does not fit would be cut off, so then all are.
    """
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    single = {
        place for place, column in enumerate(zip(*lines, strict=True)) if not any(" " in cell for cell in column[1:])
    }
    for whole in (single | {0}, {0}):
        needed = sum(sizes[place] if place in whole else min(sizes[place], LEAST) for place in range(len(sizes)))
        if needed + GAP * (len(sizes) - 1) <= width:
            return whole
    return set()
