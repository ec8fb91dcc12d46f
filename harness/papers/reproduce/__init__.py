"""`ditbench reproduce`: run what a paper's table asks for, and hold the paper's numbers against ours.

A verdict is "within" (the paper's value lies in our 95 % interval, or no further from ours than the table's tolerance),
"outside", or "not comparable" with the reasons. Reasons are found where they can be: the configuration in each record is
compared with the one that the table's section `reproduce` composes to, and each metric's passport with what it asks for. What
no configuration shows (a paper's prompts that nobody has) the section says in `departs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path, disk_errors_explained
from ditbench.harness.common.watch import watching
from ditbench.harness.papers import reported
from ditbench.harness.papers.reported import EMPTY
from ditbench.harness.papers.reproduce.printed import HEADER, TEXTS, Result, page_view
from ditbench.harness.papers.reproduce.requirements import absent_prompts, notes, plan, reference
from ditbench.harness.papers.reproduce.rows import (
    Line,
    configurations,
    is_another,
    parsed,
    plan_lines,
    prompts_here,
    reproducible,
    settings_of,
)
from ditbench.harness.papers.reproduce.verdicts import Judged, judged_row
from ditbench.harness.papers.schema import Reproduce, Table
from ditbench.harness.records.record import Record
from ditbench.harness.report import page as report_page
from ditbench.harness.report.frame import SIMULATED
from ditbench.harness.report.table import interval
from ditbench.harness.run import run
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.sweep.live import Live

__all__ = ["FORMATS", "Outcome", "plan", "reproduce"]

FORMATS = (*TEXTS, "html")


@dataclass(frozen=True)
class Outcome:
    """path: of the file that was written."""

    text: str
    failed: bool
    path: Path | None = None


def reproduce(
    name: str | None,
    model: str | None = None,
    overrides: Sequence[str] = (),
    file: Path | None = None,
    form: str = "text",
    out: Path | None = None,
) -> Outcome:
    """Run what is missing, print the comparison. file: of a user's table.

    form: one of FORMATS. html is the page of a report with the table in front, in `out` or `<results_dir>/reproduce-<table>.html`; the others
    go to `out` if it is given. What is printed then is the text.

    Raises:
        UserError: no such table, one that cannot be run here, or weights, prompts or reference images that are not here.
    """
    table = reported.table(name, file)
    section = reproducible(table)
    lines = plan_lines(table, section, model, overrides)
    composed = configurations(line.job for line in lines)
    if not is_another(section, model):
        _check_inputs(table, section, list(composed.values()))
    configs, refused = parsed(composed)
    expected = {job: settings_of(raw) for job, raw in configurations(line.expected for line in lines).items()}
    with Live(len(configs)) as live, watching(live):
        records = {job: run(config) for job, config in configs.items()}
    judged = [
        judged_row(line, section, records.get(line.job), refused.get(line.job), expected.get(line.expected))
        for line in lines
    ]
    failed = any(record.status == "failed" for record in records.values())
    result = _result(table, section, lines, judged, records)
    if form == "html":
        page = report_page(_results_dir(configs), f"reproduce-{table.name}", out, _runs(records), page_view(result))
        return Outcome(TEXTS["text"](result), failed, page)
    rendered = TEXTS[form](result)
    if out is None:
        return Outcome(rendered, failed)
    with disk_errors_explained(out.parent), atomic_path(out) as part:
        part.write_text(rendered + "\n", encoding="utf-8")
    return Outcome(TEXTS["text"](result), failed, out)


def _results_dir(configs: Mapping[Any, RunConfig]) -> Path:
    return next(iter(configs.values())).results_dir


def _runs(records: Mapping[Any, Record]) -> list[str]:
    return list(dict.fromkeys(f"{record.experiment}/{record.run_id}" for record in records.values()))


def _check_inputs(table: Table, section: Reproduce, configs: Sequence[Mapping[str, Any]]) -> None:
    """All that is missing in one message, before hours of running."""
    missing: list[str] = []
    for config in {raw["model"]["name"]: raw for raw in configs}.values():
        try:
            model_of(parse(dict(config) | prompts_here(config)).model)
        except UserError as error:
            missing.append(str(error))
        missing += absent_prompts(config)
        if section.reference and not config["metrics"]["reference"]:
            missing.append(f"reference images: {reference(section, config)}")
    if missing:
        more = f"`ditbench reproduce {table.name} --plan` says what it takes; --model tiny-dit, or another embedded model, tries it here"
        raise UserError("\n".join([*dict.fromkeys(missing), more]))


def _short(verdict: str, numbers: dict[str, int]) -> str:
    """not comparable [1], where a line below the table says what [1] is; other verdicts as they are."""
    kind, colon, reasons = verdict.partition(": ")
    if kind != "not comparable" or not colon:
        return verdict
    return f"{kind} [{numbers.setdefault(reasons, len(numbers) + 1)}]"


def _result(
    table: Table,
    section: Reproduce,
    lines: Sequence[Line],
    judged: Sequence[Mapping[str, Judged]],
    by_job: Mapping[Any, Record],
) -> Result:
    rows, runs, records = [], [], list(by_job.values())
    numbers: dict[str, int] = {}  # of what makes values not comparable, which is often the same in many
    for line, cells in zip(lines, judged, strict=True):
        for column, cell in cells.items():
            paper = line.row.values.get(column)
            decimals = 4 if section.tolerance[column] < 0.1 else 2
            delta = EMPTY if cell.ours is None or paper is None else f"{cell.ours - paper:+.{decimals}f}"
            ours = EMPTY if cell.ours is None else f"{cell.ours:.{decimals}f}"
            band = EMPTY if cell.ours is None else interval(cell.ours, cell.ci95, decimals) or EMPTY
            named = [str(line.row.keys.get(key, EMPTY)) for key in table.keys]
            of_row = by_job.get(line.job)
            runs.append(None if of_row is None else f"{of_row.experiment}/{of_row.run_id}")
            rows.append(
                [
                    *named,
                    column,
                    EMPTY if paper is None else str(paper),
                    ours,
                    delta,
                    band,
                    _short(cell.verdict, numbers),
                ]
            )
    found: dict[str, dict[str, None]] = {}
    for cells in judged:
        for cell in cells.values():
            for what, how in cell.reasons.items():
                found.setdefault(what, {})[how] = None
    said = [f"[{number}] {reasons}" for reasons, number in numbers.items()]
    said += [f"{what}: {'; '.join(how)}" for what, how in found.items()]
    simulated = sum(record.efficiency.get("kind") == SIMULATED for record in records)
    if simulated:
        said.append(
            f"simulated: {simulated} of {len(records)} runs, quantized in floating point; nothing here is a speed"
        )
    models = ", ".join(dict.fromkeys(record.model for record in records))
    said += notes(table, section, lines, (record.config for record in records))
    return Result(table.name, f"{table.name} · {table.paper} · {models}", [*table.keys, *HEADER], rows, said, runs)
