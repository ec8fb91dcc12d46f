"""Rows of text as aligned columns, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the last as long as it is."""
    lines = [header, *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(str(cell).ljust(w) for cell, w in zip(line, widths, strict=False)), str(line[-1])]).rstrip()
        for line in lines
    )
