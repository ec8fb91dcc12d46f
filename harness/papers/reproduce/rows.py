"""The rows of a paper's table and the runs that they ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import PUBLISHED
from ditbench.harness.papers import reported
from ditbench.harness.papers.reported import Reproduce, Row, Table
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.sweep.compose import composed

# What papers call a method → what it is called here; a name that is not installed is "not in ditbench yet".
OURS = {
    "FP": "fp",
    "RTN": "rtn",
    "SmoothQuant": "smoothquant",
    "QuaRot": "quarot",
    "GPTQ": "gptq",
    "PTQ4DM": "ptq4dm",
    "Q-Diffusion": "q_diffusion",
    "PTQD": "ptqd",
    "RepQ*": "repq",
    "RepQ-ViT": "repq",
    "PTQ4DiT": "ptq4dit",
    "ViDiT-Q": "vidit_q",
    "Q-DiT": "q_dit",
    "HTG": "htg",
    "CLQ": "clq",
    "LRQ-DiT": "lrq_dit",
    "SVDQuant": "svdquant",
    "DuQuant": "duquant",
}
NOT_YET = "not in ditbench yet"


@dataclass(frozen=True)
class Line:
    """One row of the paper. job: the overrides of the run that it asks for; None: no such method here."""

    row: Row
    job: tuple[str, ...] | None
    expected: tuple[str, ...] | None  # the same at the paper's model and protocol


def reproducible(name: str) -> tuple[Table, Reproduce]:
    table = reported.table(name)
    if table.reproduce is None:
        able = [each.name for each in reported.tables().values() if each.reproduce]
        raise UserError(
            f"{table.name}: its model or metrics are not in ditbench, so it cannot be run; these can: {', '.join(able)}"
        )
    return table, table.reproduce


def plan_lines(table: Table, section: Reproduce, model: str | None, overrides: Sequence[str]) -> list[Line]:
    """Every row with the run it asks for: the paper's settings, then the model's usual n and steps if it is another
    model than the paper's, then the user's overrides."""
    taken = [
        override.split("=")[0]
        for override in overrides
        if override.split("=")[0] in ("model", "method", "bits", "protocol")
    ]
    if taken:
        instead = "--model NAME" if taken[0] == "model" else "the table says it; ditbench run takes any"
        raise UserError(f"reproduce: {taken[0]}= cannot be overridden: {instead}")
    scaled = []
    if model not in (None, section.model):
        scaled = [f"model={model}", "protocol.n=${model.usual.n}", "protocol.steps=${model.usual.steps}"]
    lines = []
    for row in table.rows:
        expected = _expected(table, section, row)
        job = None if expected is None else _merged(expected, scaled, overrides)
        lines.append(Line(row, job, expected))
    if not any(line.job for line in lines):
        raise UserError(
            f"{table.name}: none of its methods is in ditbench yet: {', '.join(sorted({line.row.name for line in lines}))}"
        )
    return lines


def _expected(table: Table, section: Reproduce, row: Row) -> tuple[str, ...] | None:
    """The paper's own settings of this row as overrides, the method in its published form; None if it is not here."""
    chosen = section.rows.get(row.name) or ([f"method={OURS[row.name]}"] if row.name in OURS else [])
    if not chosen or chosen[0].split("=")[1] not in registry.known_methods():
        return None
    if PUBLISHED in registry.forms_of(chosen[0].split("=")[1]):
        chosen = [chosen[0], f"method.form={PUBLISHED}", *chosen[1:]]
    label = re.fullmatch(r"W\d+A\d+|FP8", str(row.keys.get("bits")))
    if label and chosen[0] != f"method={registry.FLOAT}":
        chosen = [*chosen, f"bits={label[0].lower()}"]
    usual = [
        f"name=reproduce-{table.name}",
        f"model={section.model}",
        *(f"{k}={_written(v)}" for k, v in section.overrides.items()),
    ]
    return _merged([*usual, f"protocol.steps={row.keys.get('steps', section.steps)}", *chosen])


def configurations(jobs: Iterable[tuple[str, ...] | None]) -> dict[tuple[str, ...], dict[str, Any]]:
    distinct = list(dict.fromkeys(job for job in jobs if job is not None))
    return dict(zip(distinct, composed(distinct), strict=True))


def parsed(
    configs: Mapping[tuple[str, ...], dict[str, Any]],
) -> tuple[dict[tuple[str, ...], RunConfig], dict[tuple[str, ...], str]]:
    """What can be run, and why the rest cannot: a method need not define every format of a table."""
    parsed: dict[tuple[str, ...], RunConfig] = {}
    refused: dict[tuple[str, ...], UserError] = {}
    for job, config in configs.items():
        try:
            parsed[job] = parse(config)
        except UserError as error:
            refused[job] = error
    if not parsed:
        raise next(iter(refused.values()))
    return parsed, {job: str(error) for job, error in refused.items()}


def config_method(lines: Sequence[Line], configs: Mapping[tuple[str, ...], Mapping[str, Any]], paper_name: str) -> str:
    return next(configs[line.job]["method"]["name"] for line in lines if line.row.name == paper_name and line.job)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _merged(*parts: Iterable[str]) -> tuple[str, ...]:
    """Overrides by what they set; the last one wins."""
    return tuple({override.split("=")[0].lstrip("+"): override for part in parts for override in part}.values())
