"""Tables as Markdown and as LaTeX; comparisons as text."""

from __future__ import annotations

from collections.abc import Sequence

from ditbench.harness.report import paired_text
from ditbench.harness.report.compare import Group
from ditbench.harness.report.contests import BITS
from ditbench.harness.report.table import (
    BEHIND_MARKS,
    CLOSENESS,
    QUALITY,
    RANKED,
    Cell,
    Column,
    Table,
    plain,
    table,
    without_empty,
)

LATIN_ENDS = 0x180  # what pdflatex sets from UTF-8 by itself, but for a few signs in it
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
    "≥": r"$\geq$",
    "−": r"$-$",
    "→": r"$\rightarrow$",
    "∞": r"$\infty$",
    "Δ": r"$\Delta$",
    "²": r"$^2$",
    "³": r"$^3$",
    "°": r"$^\circ$",
    "α": r"$\alpha$",
    "σ": r"$\sigma$",
    "µ": r"$\mu$",
    "‘": "`",
    "’": "'",
}


def markdown(
    groups: Sequence[Group], metrics: Sequence[str], damaged: Sequence[str] = (), at: str = BITS, asked: bool = False
) -> str:
    """asked: the user named the metrics; their columns stay where they hold nothing, other empty ones go."""
    blocks = []
    for group in groups:
        built = without_empty(table(group, metrics, at=at), metrics if asked else ())
        blocks.append("\n\n".join([_markdown_block(built, at), *_markdown_paired(group, metrics, at)]))
    if damaged:
        blocks.append("\n".join(["### Damaged", "", *(f"- {_markdown_escape(line)}" for line in damaged)]))
    return "\n\n".join(blocks) + "\n"


def latex(
    groups: Sequence[Group], metrics: Sequence[str], damaged: Sequence[str] = (), at: str = BITS, asked: bool = False
) -> str:
    """asked: as of `markdown`."""
    blocks = []
    for place, group in enumerate(groups, start=1):
        built = without_empty(table(group, metrics, at=at), metrics if asked else ())
        blocks.append(_latex_block(built, place, at))
    blocks += ["\n".join(f"% damaged: {' '.join(line.split())}" for line in damaged)] if damaged else []
    return "\n\n".join(["% needs \\usepackage{adjustbox,amssymb,booktabs,xcolor}", *blocks]) + "\n"


def latex_escape(text: str) -> str:
    """Text of a record as LaTeX takes it; a sign that its usual fonts lack becomes "?"."""
    return "".join(_LATEX.get(char, char if ord(char) < LATIN_ENDS else "?") for char in text)


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
            r"\begin{adjustbox}{max width=\linewidth}",
            rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in built.columns)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{adjustbox}",
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


def _markdown_escape(text: str) -> str:
    for char in "\\|*_<>`":
        text = text.replace(char, f"\\{char}")
    return text.replace("\n", " ")
