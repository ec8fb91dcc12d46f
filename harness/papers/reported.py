"""Numbers as papers report them: `results/papers/*.yaml`, one file per paper, checked when read, never recomputed.

A file has `paper`, `sources` {alias: what was read}, `tables`, and `missing`: tables that could not be had, and why. A
table's `keys` say which fields of a row name it, `columns` which are reported values; every other field of the table is
its protocol, as the paper states it. `source` and `confidence` of a table hold for its rows unless a row has its own.
A table that can be reproduced has a section `reproduce`, read here and used by `harness/papers/reproduce`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.paths import PAPERS
from ditbench.harness.common.text_table import table as text_table

CONFIDENCES = {
    "primary": "text of the paper or the README of the method itself",
    "secondary": "transcribed by a third party: another paper, notes, a figure read by eye",
    "issue-thread": "reported by a user in an issue",
    "recall": "from memory, not verified: do not cite before checking the paper",
}
PROTOCOL = (
    "paper", "model", "dataset", "benchmark", "sampler", "steps", "cfg_scale", "cfg_scale_source", "num_images",
    "num_images_source", "evaluator", "act_granularity", "wgt_granularity", "metrics", "higher_is_better", "note",
)  # fmt: skip
ROW_FIELDS = ("source", "confidence", "note", "warning")
EMPTY = "–"


@dataclass(frozen=True)
class Reference:
    """The reference batch that the paper's evaluator used, and where it is."""

    file: str
    address: str


@dataclass(frozen=True)
class Reproduce:
    """What `ditbench reproduce` runs for a table.

    overrides: what holds for all rows. steps: where rows do not say it. rows: {row name: overrides}, for rows whose name
    is not that of a method. metrics: {column: our metric}; tolerance: {column: |Δ| that still counts as reproduced}.
    """

    model: str
    image_size: int
    reference: Reference
    overrides: dict[str, Any]
    metrics: dict[str, str]
    tolerance: dict[str, float]
    steps: int | None = None
    rows: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """keys: what names the row. values: {column: as reported}; None: the paper prints no value."""

    keys: dict[str, Any]
    values: dict[str, Any]
    confidence: str
    source: str
    note: str = ""
    warning: str = ""  # why the row should not be relied on

    @property
    def name(self) -> str:
        """The method, or what stands in its place."""
        return str(self.keys.get("method") or self.keys.get("variant") or next(iter(self.keys.values())))


@dataclass(frozen=True)
class Table:
    id: str
    name: str
    paper: str  # the file's
    protocol: dict[str, Any]
    keys: list[str]
    columns: list[str]
    rows: tuple[Row, ...]
    confidence: str
    reproduce: Reproduce | None = None


@dataclass(frozen=True)
class Paper:
    title: str
    sources: dict[str, str]
    tables: tuple[Table, ...]
    missing: tuple[dict[str, str], ...] = ()


@cache
def papers(folder: Path = PAPERS) -> dict[str, Paper]:
    """{file name without ending: paper}, all checked.

    Raises:
        UserError: naming file, table and field.
    """
    found = {path.stem: _paper(path) for path in sorted(folder.glob("*.yaml"))}
    seen: dict[str, str] = {}
    for stem, paper in found.items():
        for each in paper.tables:
            for name in {each.id, each.name}:
                if name in seen:
                    raise UserError(f"{folder / stem}.yaml: table {name}: the name is taken, by {seen[name]}.yaml")
                seen[name] = stem
    return found


def tables() -> dict[str, Table]:
    """{short name: table}."""
    return {each.name: each for paper in papers().values() for each in paper.tables}


def table(name: str) -> Table:
    """The table with this short name (ptq4dit-table1) or id (ptq4dit_table1_imagenet256)."""
    known = tables()
    by_id = {each.id: each for each in known.values()}
    if name not in known and name not in by_id:
        raise unknown_name("paper table", name, known)
    return known.get(name) or by_id[name]


def listed() -> str:
    """`ditbench paper list`."""
    rows = []
    for each in tables().values():
        what = each.protocol.get("paper") or each.paper
        model = "; ".join(str(each.protocol[key]) for key in ("model", "dataset") if key in each.protocol)
        rows.append(
            (each.name, str(len(each.rows)), each.confidence, "yes" if each.reproduce else EMPTY, what, model or EMPTY)
        )
    lines = [text_table(("table", "rows", "confidence", "reproduce", "paper", "model; data"), rows), ""]
    for paper in papers().values():
        lines += [f"not here: {paper.title}: {gap['tables']} ({gap['reason']})" for gap in paper.missing]
    return "\n".join(lines)


def shown(name: str) -> str:
    """`ditbench paper show NAME`: the numbers with protocol, sources and confidence."""
    each = table(name)
    sources = next(paper.sources for paper in papers().values() if each in paper.tables)
    parts = [f"{each.name} · {each.paper} · id {each.id}"]
    parts += ["\n".join(f"  {key.replace('_', ' ')}: {value}" for key, value in each.protocol.items())]
    header, mixed = [*each.keys, *each.columns], len({(row.source, row.confidence) for row in each.rows}) > 1
    rows = []
    for row in each.rows:
        cells = [_cell(row.keys.get(key)) for key in each.keys] + [_cell(row.values.get(c)) for c in each.columns]
        rows.append([*cells, *([f"{row.source} ({row.confidence})"] if mixed else [])])
    parts.append(text_table([*header, *(["source"] if mixed else [])], rows))
    notes = [
        f"{row_title(row)}: {text}"
        for row in each.rows
        for text in (row.note, row.warning and f"WARNING: {row.warning}")
        if text
    ]
    parts += ["\n".join(notes)] if notes else []
    kinds = dict.fromkeys(row.confidence for row in each.rows)
    said = [f"confidence {kind}: {CONFIDENCES[kind]}" for kind in kinds]
    said += [f"source {alias}: {sources[alias]}" for alias in dict.fromkeys(row.source for row in each.rows)]
    if each.reproduce:
        said.append(f"ditbench reproduce {each.name} --plan says what running it here needs")
    return "\n\n".join([*parts, "\n".join(said)])


def row_title(row: Row) -> str:
    return " ".join(str(value) for value in row.keys.values())


def _cell(value: Any) -> str:
    return EMPTY if value is None else str(value)


def _paper(path: Path) -> Paper:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    where = str(path)
    _check_fields(values, where, required=("paper", "sources", "tables"), optional=("missing",))
    sources = _typed(values["sources"], dict, where, "sources")
    read = []
    for place, each in enumerate(_typed(values["tables"], list, where, "tables")):
        name = each.get("id", f"number {place + 1}") if isinstance(each, dict) else f"number {place + 1}"
        read.append(_table(each, values["paper"], sources, f"{path}: table {name}"))
    gaps = _typed(values.get("missing", []), list, where, "missing")
    for gap in gaps:
        _check_fields(gap, f"{path}: missing", required=("tables", "reason"))
    return Paper(values["paper"], sources, tuple(read), tuple(gaps))


def _table(values: Any, paper: str, sources: Mapping[str, str], where: str) -> Table:
    required = ("id", "name", "confidence", "keys", "columns", "rows")
    _check_fields(values, where, required, optional=("source", "reproduce", *PROTOCOL))
    keys, columns = (_typed(values[part], list, where, part) for part in ("keys", "columns"))
    usual = {"source": values.get("source"), "confidence": values["confidence"]}
    _check_confidence(values["confidence"], where)
    rows = tuple(
        _row(row, keys, columns, usual, sources, f"{where}: row {place + 1}")
        for place, row in enumerate(_typed(values["rows"], list, where, "rows"))
    )
    return Table(
        id=values["id"],
        name=values["name"],
        paper=paper,
        protocol={key: values[key] for key in PROTOCOL if key in values},
        keys=keys,
        columns=columns,
        rows=rows,
        confidence=values["confidence"],
        reproduce=_reproduce(values["reproduce"], keys, columns, f"{where}: reproduce")
        if "reproduce" in values
        else None,
    )


def _row(
    values: Any, keys: list[str], columns: list[str], usual: Mapping[str, Any], sources: Mapping[str, str], where: str
) -> Row:
    _check_fields(values, where, required=(), optional=(*keys, *columns, *ROW_FIELDS))
    merged = {**usual, **values}
    _check_confidence(merged["confidence"], where)
    if merged["source"] not in sources:
        raise UserError(f"{where}: source: {unknown_name('source', str(merged['source']), sources)}")
    if not any(key in values for key in keys):
        raise UserError(f"{where}: has none of its keys {', '.join(keys)}")
    return Row(
        keys={key: values[key] for key in keys if key in values},
        values={column: values[column] for column in columns if column in values},
        **{key: merged[key] for key in ROW_FIELDS if key in merged},
    )


def _reproduce(values: Any, keys: list[str], columns: list[str], where: str) -> Reproduce:
    known = {each.name: each for each in fields(Reproduce)}
    needed = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    _check_fields(values, where, needed, optional=known)
    kinds = {"overrides": dict, "metrics": dict, "tolerance": dict, "rows": dict, "notes": list, "image_size": int}
    for name, kind in kinds.items():
        _typed(values.get(name, kind()), kind, where, name)
    _check_fields(values["reference"], f"{where}: reference", required=("file", "address"))
    for part in ("metrics", "tolerance"):
        for column in values[part]:
            if column not in columns:
                raise UserError(f"{where}: {part}: {unknown_name('column', column, columns)}")
    for column in values["metrics"]:
        if not isinstance(values["tolerance"].get(column), (int, float)):
            raise UserError(f"{where}: tolerance: no number for {column}")
    if "steps" not in keys and not isinstance(values.get("steps"), int):
        raise UserError(f"{where}: steps: rows do not say it, so it must be a whole number here")
    return Reproduce(**{**values, "reference": Reference(**values["reference"])})


def _check_fields(values: Any, where: str, required: Any, optional: Any = ()) -> None:
    _typed(values, dict, where, "it")
    for name in values:
        if name not in {*required, *optional}:
            raise UserError(f"{where}: {unknown_name('field', str(name), {*required, *optional})}")
    for name in required:
        if name not in values:
            raise UserError(f"{where}: the field {name!r} is missing")


def _check_confidence(value: Any, where: str) -> None:
    if value not in CONFIDENCES:
        raise UserError(f"{where}: confidence: {unknown_name('confidence', str(value), CONFIDENCES)}")


def _typed(value: Any, kind: type, where: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{where}: {name}: expected a {kind.__name__}, got {value!r}")
    return value
