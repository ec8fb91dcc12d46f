"""A reproduced table as text, Markdown or LaTeX: paper | ours | Δ | interval | verdict, and the reasons below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditbench.harness.common.text_table import table as text_table
from ditbench.harness.report.text import latex_escape

HEADER = ("metric", "paper", "ours", "Δ", "interval", "verdict")
NUMERIC = ("paper", "ours", "Δ", "interval")


@dataclass(frozen=True)
class Result:
    """rows: cells under header, as printed. notes: reasons of verdicts, and what else a reader has to know."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def text(result: Result) -> str:
    return "\n\n".join([result.title, text_table(result.header, result.rows), "\n".join(result.notes)])


def markdown(result: Result) -> str:
    lines = [result.header, ["--:" if head in NUMERIC else ":--" for head in result.header]]
    lines += [[_markdown_escape(cell) for cell in row] for row in result.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {_markdown_escape(note)}" for note in result.notes)
    return "\n\n".join([f"### {_markdown_escape(result.title)}", body, notes]) + "\n"


def latex(result: Result) -> str:
    """A table for booktabs. The notes are comments below it, for whoever writes the caption."""
    heads = " & ".join(r"$\Delta$" if head == "Δ" else latex_escape(head) for head in result.header)
    rows = [" & ".join(map(latex_escape, row)) + r" \\" for row in result.rows]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\caption{{{latex_escape(result.title)}}}",
            rf"\label{{tab:reproduce-{result.name}}}",
            rf"\begin{{tabular}}{{{''.join('r' if head in NUMERIC else 'l' for head in result.header)}}}",
            r"\toprule",
            rf"{heads} \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            *(f"% {' '.join(note.split())}" for note in result.notes),
        ]
    )


FORMATS: dict[str, Callable[[Result], str]] = {"text": text, "markdown": markdown, "latex": latex}


def _markdown_escape(words: str) -> str:
    for char in "\\|*_<>`":
        words = words.replace(char, f"\\{char}")
    return " ".join(words.split())
