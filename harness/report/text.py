"""Tables as text: for the terminal, as Markdown and as LaTeX."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ditbench.harness.report import paired
from ditbench.harness.report.compare import Group
from ditbench.harness.report.table import Cell, Column, Table, table

WIDTH = 160
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
}


def terminal(groups: Sequence[Group], metrics: Sequence[str], width: int = WIDTH) -> str:
    """One block per group, no line of the table wider than width: metrics that do not fit are named below instead."""
    return "\n\n".join(_terminal_block(group, metrics, width) for group in groups)


def markdown(groups: Sequence[Group], metrics: Sequence[str], damaged: Sequence[str] = ()) -> str:
    blocks = [
        "\n\n".join([_markdown_block(table(group, metrics)), *_markdown_paired(group, metrics)]) for group in groups
    ]
    if damaged:
        blocks.append("\n".join(["### Damaged", "", *(f"- {_markdown_escape(line)}" for line in damaged)]))
    return "\n\n".join(blocks) + "\n"


def latex(groups: Sequence[Group], metrics: Sequence[str], damaged: Sequence[str] = ()) -> str:
    blocks = [_latex_block(table(group, metrics), place) for place, group in enumerate(groups, start=1)]
    blocks += ["\n".join(f"% damaged: {' '.join(line.split())}" for line in damaged)] if damaged else []
    return "\n\n".join(["% needs \\usepackage{booktabs} and \\usepackage{xcolor}", *blocks]) + "\n"


def latex_escape(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)


def _terminal_block(group: Group, metrics: Sequence[str], width: int) -> str:
    shown = [name for name in metrics if name in group.metrics]
    while True:
        built = table(group, shown)
        lines = _terminal_rows(built)
        if len(lines[0]) <= width or not shown:
            break
        shown = shown[:-1]
    left_out = [name for name in metrics if name in group.metrics and name not in shown]
    notes = ["● best, ○ second of its bits", *built.notes]
    notes += ["not shown for lack of room: " + ", ".join(left_out)] if left_out else []
    notes += _paired_notes(group, metrics)
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

    lines = [rule, *(aligned(head) for head in heads), rule]
    for place, (row, line) in enumerate(zip(built.rows, grid, strict=True)):
        if place and row.bits != built.rows[place - 1].bits:
            lines.append("┄" * len(rule))
        lines.append(aligned(line))
    return [*lines, rule]


def _paired_notes(group: Group, metrics: Sequence[str]) -> list[str]:
    """Of the first metric that can be tested: a line per bits."""
    for metric in metrics:
        for tests in paired.tests(group, [metric]):
            return [f"paired tests on {tests.title} (ditbench compare shows all):", *(f"  {v}" for v in tests.verdicts)]
    return []


def comparisons(group: Group, tests: Sequence[paired.PairedTests]) -> str:
    """Every comparison of the tests, as aligned text."""
    blocks = [group.label]
    for of_metric in tests:
        lines = [paired.COLUMNS, *of_metric.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[text.ljust(size) for text, size in zip(line, widths, strict=True)] for line in lines]
        body = [f"  {'  '.join(line)}".rstrip() for line in padded]
        blocks.append("\n".join([f"{of_metric.metric}: {of_metric.how}", *body]))
    return "\n\n".join(blocks)


def _markdown_paired(group: Group, metrics: Sequence[str]) -> list[str]:
    """Folded away under each table: its metrics' comparisons."""
    parts = []
    for tests in paired.tests(group, metrics):
        lines = [paired.COLUMNS, (":--",) * len(paired.COLUMNS)]
        lines += [tuple(map(_markdown_escape, row)) for row in tests.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        said = "\n".join(f"- {_markdown_escape(line)}" for line in [tests.how, *tests.verdicts])
        parts.append(f"<details><summary>Paired tests on {tests.title}</summary>\n\n{said}\n\n{body}\n\n</details>")
    return parts


def _markdown_block(built: Table) -> str:
    def styled(cell: Cell) -> str:
        text = _markdown_escape(plain(cell))
        return {"best": f"**{text}**", "second": f"<ins>{text}</ins>", "": text}[cell.mark]

    heads = [_markdown_escape(f"{c.title} ({c.subtitle})" if c.subtitle else c.title) for c in built.columns]
    lines = [heads, ["--:" if column.numeric else ":--" for column in built.columns]]
    lines += [[styled(cell) for cell in row.cells] for row in built.rows]
    notes = ["- **Best** and <ins>second best</ins> of the same bits."]
    notes += [f"- {_markdown_escape(note)}" for note in built.notes + built.problems]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [f"### {_markdown_escape(built.label)}", body, _markdown_escape(built.caption), "\n".join(notes)]
    return "\n\n".join(parts)


def _latex_block(built: Table, place: int) -> str:
    def styled(cell: Cell) -> str:
        text = latex_escape(plain(cell))
        text = {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}", "": text}[cell.mark]
        return rf"\textcolor{{gray}}{{{text}}}" if cell.inside else text

    def head(column: Column) -> str:
        title, subtitle = latex_escape(column.title), latex_escape(column.subtitle)
        return rf"\shortstack{{{title}\\{{\scriptsize {subtitle}}}}}" if subtitle else title

    lines = [" & ".join(map(head, built.columns)) + r" \\", r"\midrule"]
    for index, row in enumerate(built.rows):
        if index and row.bits != built.rows[index - 1].bits:
            lines.append(r"\midrule")
        lines.append(" & ".join(styled(cell) for cell in row.cells) + r" \\")
    notes = ["Bold: best, underlined: second best of the same bits.", *built.notes, *built.problems]
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
