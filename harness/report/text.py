"""Tables as text: for the terminal, as Markdown and as LaTeX."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ditbench.harness.report import compare, paired_text
from ditbench.harness.report.compare import Group
from ditbench.harness.report.contests import BITS, BYTES
from ditbench.harness.report.table import CLOSENESS, QUALITY, Cell, Column, Table, table

WIDTH = 160
RANKED = {BITS: "of the same bits", BYTES: "of nearly equal bytes"}
BEHIND_MARKS = "what paired tests separate; several bests are tied, no mark: nobody told apart, or not tested"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"$\sim$",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "≤": r"$\leq$",
    "·": r"$\cdot$",
    "–": "--",
    "—": "---",
    "“": "``",
    "”": "''",
    "…": r"\dots{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "▲": r"$\blacktriangle$",
}


def terminal(groups: Sequence[Group], metrics: Sequence[str], width: int = WIDTH, at: str = BITS) -> str:
    """One block per group, no line of the table wider than width: metrics that do not fit are named below instead."""
    return "\n\n".join(_terminal_block(group, metrics, width, at) for group in groups)


def markdown(groups: Sequence[Group], metrics: Sequence[str], damaged: Sequence[str] = (), at: str = BITS) -> str:
    blocks = [
        "\n\n".join([_markdown_block(table(group, metrics, at=at), at), *_markdown_paired(group, metrics, at)])
        for group in groups
    ]
    if damaged:
        blocks.append("\n".join(["### Damaged", "", *(f"- {_markdown_escape(line)}" for line in damaged)]))
    return "\n\n".join(blocks) + "\n"


def latex(groups: Sequence[Group], metrics: Sequence[str], damaged: Sequence[str] = (), at: str = BITS) -> str:
    blocks = [_latex_block(table(group, metrics, at=at), place, at) for place, group in enumerate(groups, start=1)]
    blocks += ["\n".join(f"% damaged: {' '.join(line.split())}" for line in damaged)] if damaged else []
    return "\n\n".join(["% needs \\usepackage{amssymb,booktabs,xcolor}", *blocks]) + "\n"


def latex_escape(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)


def _terminal_block(group: Group, metrics: Sequence[str], width: int, at: str) -> str:
    shown = [name for name in metrics if name in group.metrics]
    while True:
        built = table(group, shown, at=at)
        lines = _terminal_rows(built)
        if len(lines[0]) <= width or not shown:
            break
        shown = shown[:-1]
    left_out = [name for name in metrics if name in group.metrics and name not in shown]
    notes = [f"● best, ○ second {RANKED[at]}: {BEHIND_MARKS}", *built.notes]
    notes += ["not shown for lack of room: " + ", ".join(left_out)] if left_out else []
    notes += _paired_notes(group, metrics, at)
    footer = [_wrapped(f"  {note}", width) for note in notes] + [
        _wrapped(f"  ✗ {line}", width) for line in built.problems
    ]
    return "\n".join([_cut(f"{built.label} · {built.devices}", width), *lines, *footer])


def _terminal_rows(built: Table) -> list[str]:
    """Header, subtitles and rows, columns aligned on what is in them; a rule where the bits change."""
    signs = {"best": " ●", "second": " ○", "": "  "}
    marked = [any(row.cells[place].mark for row in built.rows) for place in range(len(built.columns))]
    grid = [
        [
            plain(cell) + (signs[cell.mark] if has_marks else "")
            for cell, has_marks in zip(row.cells, marked, strict=True)
        ]
        for row in built.rows
    ]
    heads = [
        [head + (signs[""] if has_marks else "") for head, has_marks in zip(line, marked, strict=True)]
        for line in ([column.title for column in built.columns], [column.subtitle for column in built.columns])
    ]
    widths = [max(len(line[place]) for line in heads + grid) for place in range(len(built.columns))]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))

    def aligned(line: list[str]) -> str:
        padded = [
            text.rjust(size) if column.numeric else text.ljust(size)
            for text, size, column in zip(line, widths, built.columns, strict=True)
        ]
        return "  ".join(padded).rstrip()

    kinds = [line for line in [_kinds_line(built, widths)] if line]
    lines = [rule, *kinds, *(aligned(head) for head in heads), rule]
    for place, (row, line) in enumerate(zip(built.rows, grid, strict=True)):
        if place and row.contest != built.rows[place - 1].contest:
            lines.append("┄" * len(rule))
        lines.append(aligned(line))
    return [*lines, rule]


def _kinds_line(built: Table, widths: Sequence[int]) -> str:
    """Above the heads, what kind of metric the columns below are: ╴quality╶ and ╴closeness to float╶."""
    line, place = "", 0
    while place < len(widths):
        kind = built.columns[place].kind
        same = [place]
        while kind and same[-1] + 1 < len(widths) and built.columns[same[-1] + 1].kind == kind:
            same.append(same[-1] + 1)
        wide = sum(widths[one] for one in same) + 2 * (len(same) - 1)
        words = next((words for words in (kind, kind.partition(" ")[0]) if len(words) <= wide), "")
        line += (f" {words} ".center(wide, "╌") if words and len(words) + 2 <= wide else words.ljust(wide)) + "  "
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


def comparisons(group: Group, tests: Sequence[paired_text.PairedTests]) -> str:
    """Every comparison of the tests, as aligned text, and what follows for the marks."""
    blocks = [group.label]
    for of_metric in tests:
        lines = [paired_text.COLUMNS, *of_metric.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[text.ljust(size) for text, size in zip(line, widths, strict=True)] for line in lines]
        body = [f"  {'  '.join(line)}".rstrip() for line in padded]
        kind = of_metric.title.partition(" ")[2]
        said = [f"  → {line}" for line in of_metric.verdicts]
        blocks.append("\n".join([f"{' '.join(filter(None, [of_metric.metric, kind]))}: {of_metric.how}", *body, *said]))
    return "\n\n".join(blocks)


def _markdown_paired(group: Group, metrics: Sequence[str], at: str) -> list[str]:
    """Folded away under each table: its metrics' comparisons."""
    parts = []
    for tests in paired_text.tests(group, metrics, at):
        lines = [paired_text.COLUMNS, (":--",) * len(paired_text.COLUMNS)]
        lines += [tuple(map(_markdown_escape, row)) for row in tests.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        said = "\n".join(f"- {_markdown_escape(line)}" for line in [tests.how, *tests.verdicts])
        parts.append(f"<details><summary>Paired tests on {tests.title}</summary>\n\n{said}\n\n{body}\n\n</details>")
    return parts


def _markdown_block(built: Table, at: str) -> str:
    def styled(cell: Cell) -> str:
        text = _markdown_escape(plain(cell))
        return {"best": f"**{text}**", "second": f"<ins>{text}</ins>", "": text}[cell.mark]

    def head(column: Column) -> str:
        words = [word for word in (column.subtitle, column.kind if column.kind == CLOSENESS else "") if word]
        return _markdown_escape(f"{column.title} ({', '.join(words)})" if words else column.title)

    heads = [head(column) for column in built.columns]
    lines = [heads, ["--:" if column.numeric else ":--" for column in built.columns]]
    lines += [[styled(cell) for cell in row.cells] for row in built.rows]
    notes = [f"- **Best** and <ins>second</ins> {RANKED[at]}: {BEHIND_MARKS}."]
    notes += [f"- {_markdown_escape(note)}" for note in built.notes + built.problems]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [f"### {_markdown_escape(built.label)}", body, _markdown_escape(built.caption), "\n".join(notes)]
    return "\n\n".join(parts)


def _latex_block(built: Table, place: int, at: str) -> str:
    def styled(cell: Cell) -> str:
        text = latex_escape(plain(cell))
        text = {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}", "": text}[cell.mark]
        return rf"\textcolor{{gray}}{{{text}}}" if cell.inside else text

    def head(column: Column) -> str:
        title, subtitle = latex_escape(column.title), latex_escape(column.subtitle)
        return rf"\shortstack{{{title}\\{{\scriptsize {subtitle}}}}}" if subtitle else title

    lines = [*_latex_kinds(built), " & ".join(map(head, built.columns)) + r" \\", r"\midrule"]
    for index, row in enumerate(built.rows):
        if index and row.contest != built.rows[index - 1].contest:
            lines.append(r"\midrule")
        lines.append(" & ".join(styled(cell) for cell in row.cells) + r" \\")
    notes = [f"Bold: best, underlined: second {RANKED[at]}: {BEHIND_MARKS}.", *built.notes, *built.problems]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\caption{{{latex_escape(built.caption)}}}",
            rf"\label{{tab:ditbench-{place}}}",
            rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in built.columns)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\footnotesize " + " ".join(latex_escape(f"{note.rstrip('.')}.") for note in notes),
            r"\end{table}",
        ]
    )


def _latex_kinds(built: Table) -> list[str]:
    """A row over the heads that says which metrics are of quality and which of closeness."""
    kinds = [column.kind for column in built.columns]
    present = [kind for kind in (QUALITY, CLOSENESS) if kind in kinds]
    if not present:
        return []
    cells, rules, place = [], [], 0
    while place < len(kinds):
        wide = 1
        while kinds[place] and place + wide < len(kinds) and kinds[place + wide] == kinds[place]:
            wide += 1
        cells.append(rf"\multicolumn{{{wide}}}{{c}}{{{kinds[place]}}}" if kinds[place] else "")
        rules += [rf"\cmidrule(lr){{{place + 1}-{place + wide}}}"] if kinds[place] else []
        place += wide
    return [" & ".join(cells) + r" \\", "".join(rules)]


def plain(cell: Cell) -> str:
    return ("~" if cell.inside else "") + cell.text + (f" {cell.interval}" if cell.interval else "")


def _markdown_escape(text: str) -> str:
    for char in "\\|*_<>`":
        text = text.replace(char, f"\\{char}")
    return text.replace("\n", " ")


def _wrapped(text: str, width: int) -> str:
    """On as many lines as it takes: what helps is often said last. Commands and paths stay in one piece where they fit."""
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, replace_whitespace=False)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
