"""A reproduced table as text, Markdown or LaTeX: paper | ours | Δ | interval | verdict, and the reasons below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ditbench.harness.common.terminal import wrapped
from ditbench.harness.common.text_table import table as text_table
from ditbench.harness.report.text import latex_escape

HEADER = ("metric", "paper", "ours", "Δ", "interval", "verdict")
NUMERIC = ("paper", "ours", "Δ", "interval")


@dataclass(frozen=True)
class Result:
    """rows: cells under header, as printed. notes: reasons of verdicts, and what else a reader has to know. runs: of each row the run that
    it is of, "experiment/run_id", or None.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    runs: Sequence[str | None] = ()

    @property
    def summary(self) -> str:
        """How many values came out how: 112 values: 3 within, 1 outside, 108 not comparable."""
        counts = Counter(verdict_kind(row[-1]) for row in self.rows)
        said = ", ".join(f"{counts[kind]} {_IN_A_SUM.get(kind, kind)}" for kind in sorted(counts, key=_KINDS.index))
        return f"{len(self.rows)} values: {said}"


WITHIN, OUTSIDE, OTHER = "within", "outside", "without a verdict"
_KINDS = (WITHIN, OUTSIDE, "not comparable", "not here", "not computed", "refused", "the paper prints no value", OTHER)


_IN_A_SUM = {"the paper prints no value": "not printed by the paper"}


def verdict_kind(verdict: str) -> str:
    """Of "not here: method X" and "not comparable [1]" the first words."""
    kind = verdict.partition(":")[0].partition(" [")[0]
    return kind if kind in _KINDS else OTHER


def page_view(result: Result) -> dict[str, Any]:
    """What the page shows of it (report/views/paper.js)."""
    return {
        "title": result.title,
        "summary": result.summary,
        "header": list(result.header),
        "names": len(result.header) - len(HEADER),  # columns that name a row
        "rows": [
            {"cells": list(row), "run": run, "kind": verdict_kind(row[-1])}
            for row, run in zip(result.rows, result.runs, strict=True)
        ],
        "notes": list(result.notes),
    }


def text(result: Result) -> str:
    notes = "\n".join(wrapped(note) for note in result.notes)
    return "\n\n".join([wrapped(result.title), result.summary, text_table(result.header, result.rows), notes])


def markdown(result: Result) -> str:
    lines = [result.header, ["--:" if head in NUMERIC else ":--" for head in result.header]]
    lines += [[_markdown_escape(cell) for cell in row] for row in result.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {_markdown_escape(note)}" for note in result.notes)
    return "\n\n".join([f"### {_markdown_escape(result.title)}", f"{result.summary}.", body, notes]) + "\n"


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
            *(f"% {' '.join(note.split())}" for note in (result.summary, *result.notes)),
        ]
    )


TEXTS: dict[str, Callable[[Result], str]] = {"text": text, "markdown": markdown, "latex": latex}


def _markdown_escape(words: str) -> str:
    for char in "\\|*_<>`":
        words = words.replace(char, f"\\{char}")
    return " ".join(words.split())
