"""`ditbench reproduce`: run what a paper's table asks for, and hold the paper's numbers against ours.

A verdict is "within" (the paper's value lies in our 95 % interval, or no further from ours than the table's tolerance),
"outside", or "not comparable" with the reasons. Reasons are found, not written down: the configuration in each record is
compared with the one that the table's section `reproduce` composes to, and each metric's passport with what it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.text_table import table as text_table
from ditbench.harness.papers.reported import EMPTY, Reproduce, Table
from ditbench.harness.papers.reproduce.requirements import notes, plan, reference
from ditbench.harness.papers.reproduce.rows import Line, configurations, parsed, plan_lines, reproducible
from ditbench.harness.papers.reproduce.verdicts import Judged, judged_row
from ditbench.harness.records.record import Record
from ditbench.harness.report.frame import SIMULATED
from ditbench.harness.report.table import interval
from ditbench.harness.run import run
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.loaded import model_of

__all__ = ["Outcome", "plan", "reproduce"]


@dataclass(frozen=True)
class Outcome:
    text: str
    failed: bool


def reproduce(name: str, model: str | None = None, overrides: Sequence[str] = ()) -> Outcome:
    """Run what is missing, print the comparison.

    Raises:
        UserError: no such table, one that cannot be run here, or weights or a reference batch that are not here.
    """
    table, section = reproducible(name)
    lines = plan_lines(table, section, model, overrides)
    configs, refused = parsed(configurations(line.job for line in lines))
    if model in (None, section.model):
        _check_inputs(name, section, next(iter(configs.values())))
    wanted, _ = parsed(configurations(line.expected for line in lines))
    records = {job: run(config) for job, config in configs.items()}
    judged = [
        judged_row(line, section, records.get(line.job), refused.get(line.job), wanted.get(line.expected))
        for line in lines
    ]
    failed = any(record.status == "failed" for record in records.values())
    return Outcome(_printed(table, section, lines, judged, list(records.values())), failed)


def _check_inputs(name: str, section: Reproduce, config: RunConfig) -> None:
    """All that is missing in one message, before hours of running."""
    missing = []
    try:
        model_of(config.model)
    except UserError as error:
        missing.append(str(error))
    if not config.section("metrics")["reference"]:
        missing.append(reference(section, config.raw))
    if missing:
        more = f"`ditbench reproduce {name} --plan` says what it takes; --model tiny-dit tries it on the shipped model"
        raise UserError("\n".join([*missing, more]))


def _printed(
    table: Table,
    section: Reproduce,
    lines: Sequence[Line],
    judged: Sequence[Mapping[str, Judged]],
    records: Sequence[Record],
) -> str:
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
    text = [f"{table.name} · {table.paper} · {records[0].model}"]
    text.append(text_table([*table.keys, "metric", "paper", "ours", "Δ", "interval", "verdict"], rows))
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
    return "\n\n".join([*text, "\n".join([*said, *notes(table, section, (record.config for record in records))])])
