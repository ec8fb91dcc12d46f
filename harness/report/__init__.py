"""Records → tables and one HTML page, holding nothing that is not in a record (plus the images beside it)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.files import atomic_path, disk_errors_explained
from ditbench.harness.records.record import Record
from ditbench.harness.report import compare, conclusions, paired_text, text
from ditbench.harness.report.contests import BITS, BYTES
from ditbench.harness.report.frame import frame, inert, tests_frame
from ditbench.harness.report.over_seeds import over_seeds
from ditbench.harness.report.terminal import terminal
from ditbench.harness.report.whole import OF_A_PAGE, PER_SAMPLE, whole_records

FORMATS = ("text", "md", "csv", "latex", "html")
OF_COMPARE = ("text", "csv")


@dataclass(frozen=True)
class Report:
    """text: what to print, the short terminal table if the report went to a file; path: that file.

    damaged: a line for each record, or file beside one, that could not be used; Markdown, LaTeX and the page list them too.
    """

    text: str
    path: Path | None = None
    damaged: tuple[str, ...] = ()


def report(
    results_dir: Path,
    experiment: str | None = None,
    format: str = "text",
    out: Path | None = None,
    metrics: Sequence[str] | None = None,
    merge_seeds: bool = False,
    equal_bytes: bool = False,
) -> Report:
    """The newest attempt of every run of one experiment (or of all) as a table or a page.

    html goes to `out` or to `<results_dir>/report[-<experiment>].html`, with a folder of that stem and `_files` beside it where there is
    much to show; the others go to `out` only if it is given.
    text is a table as wide as the terminal, or 120 columns where the output is piped.
    `metrics` chooses the columns of text, md and latex; csv and html always hold every metric. merge_seeds: runs that differ in
    their seed only become one row. equal_bytes: runs of nearly equal bytes are ranked together, not those of one label.

    Raises:
        UserError: unknown format, experiment or metric; no record that can be read.
    """
    if format not in FORMATS:
        raise unknown_name("report format", format, FORMATS)
    used = {"csv": (), "html": OF_A_PAGE}.get(format, PER_SAMPLE)
    records, damaged = whole_records(Path(results_dir), experiment, used)
    records = over_seeds(records) if merge_seeds else records
    at = BYTES if equal_bytes else BITS
    groups = compare.groups(records, merge_seeds)
    asked = metrics or compare.asked_for(groups)
    headline = compare.headline(groups, asked)

    def shown() -> str:
        return _in_a_terminal(groups, headline, None, bool(asked), at)

    if format == "html":
        from ditbench.harness.report.html import write_page  # here, since only a page needs plotly and jinja2

        out = out or Path(results_dir) / (
            f"report-{experiment.replace('/', '-')}.html" if experiment else "report.html"
        )
        write_page(out, groups, experiment, damaged, at)
        return Report(shown(), out, damaged)
    rendered = {
        "text": shown,
        "md": lambda: text.markdown(groups, headline, damaged, at, bool(asked)),
        "csv": lambda: inert(frame(groups, at)).to_csv(index=False),
        "latex": lambda: text.latex(groups, headline, damaged, at, bool(asked)),
    }[format]()
    if out is None:
        return Report(rendered, None, damaged)
    _write(out, rendered)
    return Report(shown(), out, damaged)


def page(results_dir: Path, experiment: str, out: Path | None, runs: Collection[str], paper: Mapping[str, Any]) -> Path:
    """The page of these runs ("experiment/run_id") of an experiment, with a table of a paper in front (views/paper.js) → its path.

    Raises:
        UserError: no such experiment; no record that can be read.
    """
    from ditbench.harness.report.html import write_page

    records, damaged = whole_records(Path(results_dir), experiment, OF_A_PAGE)
    groups = compare.groups(record for record in records if f"{record.experiment}/{record.run_id}" in runs)
    out = out or Path(results_dir) / f"{experiment}.html"
    write_page(out, groups, experiment, damaged, paper=paper)
    return out


def comparisons(
    results_dir: Path,
    experiment: str | None = None,
    metrics: Sequence[str] | None = None,
    bits: Sequence[str] | None = None,
    merge_seeds: bool = False,
    equal_bytes: bool = False,
    format: str = "text",
    out: Path | None = None,
) -> Report:
    """Paired tests of every two runs that are ranked together, and of each against the float model: what the marks of a report rest on.

    metrics: default all that can be tested. bits: only of runs of these labels, which changes no p. merge_seeds, equal_bytes: as of
    `report`.

    Raises:
        UserError: unknown format, experiment, metric or bits; nothing to compare.
    """
    if format not in OF_COMPARE:
        raise unknown_name("format of comparisons", format, OF_COMPARE)
    at = BYTES if equal_bytes else BITS
    records, damaged = whole_records(Path(results_dir), experiment, PER_SAMPLE)
    known = sorted({compare.bits_label(record) for record in records})
    for label in bits or ():
        if label.upper() not in known:
            raise unknown_name("recorded bits", label.upper(), known)
    groups = compare.groups(over_seeds(records) if merge_seeds else records, merge_seeds)
    wanted = compare.headline(groups, metrics) if metrics else None
    only = [label.upper() for label in bits or known]
    shown = [(group, tests) for group in groups if (tests := paired_text.tests(group, wanted, at, only))]
    if not shown:
        if damaged:
            raise UserError(damaged[0])
        raise UserError(
            f"{results_dir}/runs: nothing to compare sample by sample; it takes a metric that can be tested, two "
            "runs of the same bits (or one and the float model), and records that hold its values per sample"
        )
    if format == "csv":
        rendered = inert(tests_frame([group for group, _ in shown], wanted, at, only)).to_csv(index=False)
    else:
        rendered = "\n\n".join(text.comparisons(group, tests) for group, tests in shown)
    if out is None:
        return Report(rendered, damaged=damaged)
    _write(out, rendered)
    return Report(f"{sum(len(tests.rows) for _, each in shown for tests in each)} comparisons", out, damaged)


def comparison_table(records: Iterable[Record], metrics: Sequence[str] | None = None, width: int | None = None) -> str:
    """The short table for the end of a sweep, one block per group of comparable runs, and what follows from it in words.

    width: default the terminal's.
    """
    groups = compare.groups(records)
    asked = metrics or compare.asked_for(groups)
    if not groups:
        return "no runs to compare"
    return _in_a_terminal(groups, compare.headline(groups, asked), width, bool(asked), BITS)


def _in_a_terminal(groups: list[compare.Group], headline: list[str], width: int | None, asked: bool, at: str) -> str:
    """The table, and what follows from it in words where runs are ranked by their label."""
    table = terminal(groups, headline, width, at=at, asked=asked)
    words = conclusions.printed(groups, width) if at == BITS else ""
    return "\n\n".join(filter(None, (table, words)))


def _write(path: Path, content: str) -> None:
    with disk_errors_explained(path.parent), atomic_path(path) as part:
        part.write_text(content, encoding="utf-8")
