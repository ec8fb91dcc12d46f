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
from ditbench.harness.common.watch import watching
from ditbench.harness.papers import reported
from ditbench.harness.papers.reported import EMPTY
from ditbench.harness.papers.reproduce.printed import FORMATS, HEADER, Result
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
from ditbench.harness.report.frame import SIMULATED
from ditbench.harness.report.table import interval
from ditbench.harness.run import run
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.sweep.live import Live

__all__ = ["FORMATS", "Outcome", "plan", "reproduce"]


@dataclass(frozen=True)
class Outcome:
    text: str
    failed: bool


def reproduce(
    name: str | None,
    model: str | None = None,
    overrides: Sequence[str] = (),
    file: Path | None = None,
    form: str = "text",
) -> Outcome:
    """Run what is missing, print the comparison. file: of a user's table. form: one of FORMATS.

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
    return Outcome(FORMATS[form](_result(table, section, lines, judged, list(records.values()))), failed)


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


def _result(
    table: Table,
    section: Reproduce,
    lines: Sequence[Line],
    judged: Sequence[Mapping[str, Judged]],
    records: Sequence[Record],
) -> Result:
    rows = []
    for line, cells in zip(lines, judged, strict=True):
        for column, cell in cells.items():
            paper = line.row.values.get(column)
            decimals = 4 if section.tolerance[column] < 0.1 else 2
            delta = EMPTY if cell.ours is None or paper is None else f"{cell.ours - paper:+.{decimals}f}"
            ours = EMPTY if cell.ours is None else f"{cell.ours:.{decimals}f}"
            band = EMPTY if cell.ours is None else interval(cell.ours, cell.ci95, decimals) or EMPTY
            named = [str(line.row.keys.get(key, EMPTY)) for key in table.keys]
            rows.append([*named, column, EMPTY if paper is None else str(paper), ours, delta, band, cell.verdict])
    found: dict[str, dict[str, None]] = {}
    for cells in judged:
        for cell in cells.values():
            for what, how in cell.reasons.items():
                found.setdefault(what, {})[how] = None
    said = [f"{what}: {'; '.join(how)}" for what, how in found.items()]
    simulated = sum(record.efficiency.get("kind") == SIMULATED for record in records)
    if simulated:
        said.append(
            f"simulated: {simulated} of {len(records)} runs, quantized in floating point; nothing here is a speed"
        )
    models = ", ".join(dict.fromkeys(record.model for record in records))
    said += notes(table, section, lines, (record.config for record in records))
    return Result(table.name, f"{table.name} · {table.paper} · {models}", [*table.keys, *HEADER], rows, said)
