"""A group's table for the terminal: as wide as that is, the columns that are needed least left out first."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ditbench.harness.common.terminal import PIPED, columns, wrapped
from ditbench.harness.report import compare, paired_text
from ditbench.harness.report.compare import Group
from ditbench.harness.report.contests import BITS
from ditbench.harness.report.table import (
    BEHIND_MARKS,
    EFFECTIVE,
    EFFECTIVE_NOTE,
    RANKED,
    Table,
    only,
    plain,
    table,
    without_empty,
)

SIGNS = {"best": " ●", "second": " ○", "": "  "}
GAP = "  "
# After method and bits; two metrics stand before these, the others behind the effective bits.
FIRST = ("speed-up", "compiled", "compr.", "seeds", "experiment", "device", EFFECTIVE)
LAST = ("stored", "latency", "fit", "fit peak", "status")


def terminal(
    groups: Sequence[Group], metrics: Sequence[str], width: int | None = None, at: str = BITS, asked: bool = False
) -> str:
    """One block per group, no line wider than width (default: the terminal's).

    asked: the user named the metrics; then all of them are shown, in further tables where one has no room.
    """
    width = width or columns()
    return "\n\n".join(_block(group, metrics, width, at, asked) for group in groups)


def _block(group: Group, metrics: Sequence[str], width: int, at: str, asked: bool) -> str:
    whole = table(group, metrics, at=at)
    built = without_empty(whole, metrics if asked else ())
    parts = _parts(built, width, asked)
    tables = ["\n".join(_rows(only(built, places), width)) for places in parts]
    shown = {place for places in parts for place in places}
    titles = [column.title.split()[0] if column.metric else column.title for column in built.columns]
    left_out = [title for place, title in enumerate(titles) if place not in shown and title != "status"]
    absent = [name for name in metrics if asked and name not in group.metrics]
    notes = [f"● best, ○ second {RANKED[at]}: {BEHIND_MARKS}", *built.notes]
    notes += [EFFECTIVE_NOTE] if EFFECTIVE in titles and EFFECTIVE not in left_out else []
    notes += [f"no run here computed {', '.join(absent)}"] if absent else []
    notes += [f"no room for {', '.join(left_out)}; --metrics NAME … chooses, --format html|csv have all"] * bool(
        left_out
    )
    notes += _paired_notes(group, metrics, at)
    lines = [f"  {note}" for note in notes] + [f"  ✗ {line}" for line in built.problems]
    head = wrapped(f"{built.label} · {built.devices}", width)
    return "\n".join([head, "\n\n".join(tables), *(wrapped(line, min(width, PIPED)) for line in lines)])


def _parts(built: Table, width: int, asked: bool) -> list[list[int]]:
    """Which columns stand in which table, in their order: one table, or as many as it takes to show all metrics asked for."""
    sizes = _widths(built, width)
    titles = [column.title for column in built.columns]
    always = [titles.index(title) for title in ("method", "bits") if title in titles]
    if any(row.status != "ok" for row in built.rows):
        always.append(titles.index("status"))
    metrics = [place for place, column in enumerate(built.columns) if column.metric]
    if not asked:  # one of quality and one of closeness in front
        kinds = [built.columns[place].kind for place in metrics]
        metrics = sorted(metrics, key=lambda place: metrics.index(place) > kinds.index(built.columns[place].kind))

    def filled(base: list[int], more: Sequence[int], all_fit: bool = False) -> list[int]:
        taken = list(base)
        for place in more:
            if sum(sizes[each] + len(GAP) for each in (*taken, place)) - len(GAP) <= width:
                taken.append(place)
            elif all_fit:
                break
        return taken

    def named(names: Sequence[str]) -> list[int]:
        return [titles.index(name) for name in names if name in titles]

    rest = [*named(FIRST), *([] if asked else metrics[2:]), *named(LAST)]
    parts, waiting = [], metrics if asked else metrics[:2]
    while waiting:
        taken = filled(always, waiting, all_fit=True)
        taken = taken if len(taken) > len(always) else [*always, waiting[0]]  # one at least, whatever it takes
        parts.append(taken)
        waiting = [place for place in waiting if place not in taken]
    parts = parts or [list(always)]
    parts[-1] = filled(parts[-1], [place for place in rest if place not in parts[-1]])
    return [sorted(set(places)) for places in parts]


def _grid(built: Table, width: int) -> tuple[list[list[list[str]]], list[list[list[str]]]]:
    """Heads and rows as lists of lines for each cell. Names take a third of the width at most, and more lines instead."""
    marked = [any(row.cells[place].mark for row in built.rows) for place in range(len(built.columns))]
    rows = []
    for row in built.rows:
        cells = []
        for cell, column, has_marks in zip(row.cells, built.columns, marked, strict=True):
            text = plain(cell)
            lines = [text] if column.numeric else textwrap.wrap(text, max(width // 3, 16)) or [""]
            cells.append([line + (SIGNS[cell.mark] if has_marks else "") for line in lines])
        rows.append(cells)
    heads = []
    for place, (column, has_marks) in enumerate(zip(built.columns, marked, strict=True)):
        wide = max([len(column.title), *(len(line) for row in rows for line in row[place])])
        words = textwrap.wrap(column.subtitle, wide, break_long_words=False) if column.subtitle else []
        heads.append([line + (SIGNS[""] if has_marks else "") for line in (column.title, *words)])
    return [heads], rows


def _widths(built: Table, width: int) -> list[int]:
    heads, rows = _grid(built, width)
    return [max(len(line) for row in heads + rows for line in row[place]) for place in range(len(built.columns))]


def _rows(built: Table, width: int) -> list[str]:
    """Heads and rows, columns aligned on what is in them; a rule where the bits change."""
    heads, rows = _grid(built, width)
    widths = _widths(built, width)
    wide = sum(widths) + len(GAP) * (len(widths) - 1)

    def aligned(cells: list[list[str]]) -> list[str]:
        lines = []
        for count in range(max(map(len, cells))):
            padded = [
                f"{text:>{size}}" if column.numeric else f"{text:<{size}}"
                for lines_of, size, column in zip(cells, widths, built.columns, strict=True)
                for text in [lines_of[count] if count < len(lines_of) else ""]
            ]
            lines.append(GAP.join(padded).rstrip())
        return lines

    rule = "─" * wide
    lines = [rule, *filter(None, [_kinds_line(built, widths)]), *aligned(heads[0]), rule]
    for place, (row, cells) in enumerate(zip(built.rows, rows, strict=True)):
        if place and row.contest != built.rows[place - 1].contest:
            lines.append("┄" * wide)
        lines += aligned(cells)
    return [*lines, rule]


def _kinds_line(built: Table, widths: Sequence[int]) -> str:
    """Above the heads, what kind of metric the columns below are: ╴quality╶ and ╴closeness to float╶."""
    line, place = "", 0
    while place < len(widths):
        kind = built.columns[place].kind
        same = [place]
        while kind and same[-1] + 1 < len(widths) and built.columns[same[-1] + 1].kind == kind:
            same.append(same[-1] + 1)
        wide = sum(widths[one] for one in same) + len(GAP) * (len(same) - 1)
        words = next((words for words in (kind, kind.partition(" ")[0]) if len(words) <= wide), "")
        line += (f" {words} ".center(wide, "╌") if words and len(words) + 2 <= wide else words.ljust(wide)) + GAP
        place = same[-1] + 1
    return line.rstrip()


def _paired_notes(group: Group, metrics: Sequence[str], at: str) -> list[str]:
    """Of the first metric of quality, and the first of closeness, that can be tested: a line per contest."""
    found = []
    for closeness in (False, True):
        for metric in metrics:
            if metric not in group.metrics or compare.is_closeness(group, metric) != closeness:
                continue
            if tests := paired_text.tests(group, [metric], at):
                found += [f"paired tests on {tests[0].title}:", *(f"  {line}" for line in tests[0].verdicts)]
                break
    return [*found, "`ditbench compare` shows all paired tests"] if found else []
