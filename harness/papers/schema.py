"""What a file of reported tables may say (docs/papers.md), checked field by field when it is read.

A file has `paper`, `sources` {alias: what was read}, `tables`, and `missing`: tables that could not be had, why, and how to
add them. A table's `keys` say which fields of a row name it, `columns` which are reported values; every other field of the
table is its protocol, as the paper states it. `source` and `confidence` of a table hold for its rows unless a row has its own.
A table that can be run has a section `reproduce`; one that cannot may say why in `cannot_run`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ditbench.harness.common.errors import UserError, first_words, shortened, unknown_name

CONFIDENCES = {
    "primary": "text of the paper or the README of the method itself",
    "secondary": "not read in the paper itself: another paper, notes or text passed on, a figure read by eye",
    "issue-thread": "reported by a user in an issue",
    "recall": "from memory, not verified: do not cite before checking the paper",
}
PROTOCOL = (
    "paper", "model", "dataset", "benchmark", "sampler", "steps", "cfg_scale", "cfg_scale_source", "num_images",
    "num_images_source", "evaluator", "act_granularity", "wgt_granularity", "metrics", "higher_is_better", "note",
)  # fmt: skip
LARGEST = 1e12  # of a number that a table prints
ROW_FIELDS = ("source", "confidence", "note", "warning")
ROWS_SAY = ("name", "method", "bits")  # what no override of a whole table may set
SETTINGS = ("model", "bits", "steps")  # keys that name no method
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
WORDS = {dict: "a mapping", list: "a list", str: "text", int: "a whole number"}
SHOWN = 100  # characters of a wrong value


@dataclass(frozen=True)
class Reference:
    """The real images that the paper's evaluator used, and where they are."""

    file: str
    address: str


@dataclass(frozen=True)
class Reproduce:
    """What `ditbench reproduce` runs for a table.

    model: ours; or models: {the row's `model`: overrides, the first of them model=…}, where the rows say it. overrides: what
    holds for all rows. steps: where rows do not say it. rows: {row name: overrides}, for rows whose name is not that of a
    method. bits: {as printed: our label}, where the paper writes them otherwise. metrics: {column: our metric}; scale: {column:
    what ours is multiplied by}; tolerance: {column: |Δ| that still counts as reproduced, as printed}. departs: {what: how} it
    cannot be as in the paper; of a column if it has the column's name. lacks: {method, model, format or column: why it is not
    here}. reference: of metrics that need real images.
    """

    overrides: dict[str, Any]
    metrics: dict[str, str]
    tolerance: dict[str, float]
    model: str | None = None
    models: dict[str, list[str]] = field(default_factory=dict)
    reference: Reference | None = None
    steps: int | None = None
    rows: dict[str, list[str]] = field(default_factory=dict)
    bits: dict[str, str] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    departs: dict[str, str] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
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
        named = [value for key, value in self.keys.items() if key not in SETTINGS] or [*self.keys.values()]
        return str(self.keys.get("method", named[-1]))

    @property
    def title(self) -> str:
        return " ".join(str(value) for value in self.keys.values())


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
    cannot_run: str = ""


@dataclass(frozen=True)
class Gap:
    """Tables that could not be had. add: a file of theirs to be filled in, for `--table`."""

    tables: str
    reason: str
    add: str = ""


@dataclass(frozen=True)
class Paper:
    title: str
    sources: dict[str, str]
    tables: tuple[Table, ...]
    missing: tuple[Gap, ...] = ()


def read(path: Path) -> Paper:
    """A file of reported tables.

    Raises:
        UserError: it cannot be read, or a field is wrong: naming file, table and field in one line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no file of tables that can be read: {first_words(error)}") from error
    return parsed(text, str(path))


def parsed(text: str, where: str) -> Paper:
    """As `read`, of a text that is called `where` in errors."""
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise UserError(f"{where}: not readable as YAML: {shortened(' '.join(str(error).split()), 300)}") from error
    _check_fields(values, where, required=("paper", "sources", "tables"), optional=("missing",))
    title, sources = _text(values["paper"], where, "paper"), _texts(values["sources"], where, "sources")
    found: list[Table] = []
    for place, each in enumerate(_typed(values["tables"], list, where, "tables")):
        name = each.get("id", f"number {place + 1}") if isinstance(each, dict) else f"number {place + 1}"
        found.append(_table(each, title, sources, f"{where}: table {_shown(name, quoted=False)}"))
        names = [other for table in found[:-1] for other in (table.id, table.name)]
        if taken := [name for name in (found[-1].id, found[-1].name) if name in names]:
            raise UserError(f"{where}: table {taken[0]}: there are two of this id or name; rename one")
    gaps = []
    for place, gap in enumerate(_typed(values.get("missing", []), list, where, "missing")):
        of_gap = f"{where}: missing number {place + 1}"
        _check_fields(gap, of_gap, required=("tables", "reason"), optional=("add",))
        gaps.append(Gap(**{name: _text(value, of_gap, name) for name, value in gap.items()}))
    return Paper(title, sources, tuple(found), tuple(gaps))


class _Loader(yaml.SafeLoader):
    """As safe_load, and a key that is there twice is an error: the second would silently replace what the first says."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {shortened(key.value, SHOWN)!r} is there twice", key.start_mark
                        )
                    seen.add(key.value)
        return super().construct_mapping(node, deep)


def _table(values: Any, paper: str, sources: Mapping[str, str], where: str) -> Table:
    required = ("id", "name", "confidence", "keys", "columns", "rows")
    _check_fields(values, where, required, optional=("source", "reproduce", "cannot_run", *PROTOCOL))
    for name in ("id", "name"):
        if not NAME.fullmatch(_text(values[name], where, name)):
            raise UserError(f"{where}: {name}: letters, digits, '.', '_', '+' and '-' only, got {_shown(values[name])}")
    keys, columns = (_names(values[part], where, part) for part in ("keys", "columns"))
    if both := [name for name in keys if name in (*columns, *ROW_FIELDS)] + [c for c in columns if c in ROW_FIELDS]:
        raise UserError(f"{where}: {both[0]!r} can only be one of: a key, a column, {', '.join(ROW_FIELDS)}")
    if len(keys) == 0 or len(columns) == 0:
        raise UserError(f"{where}: keys and columns: at least one of each, got {len(keys)} and {len(columns)}")
    usual = {"source": values.get("source"), "confidence": values["confidence"]}
    _check_confidence(values["confidence"], where)
    rows = tuple(
        _row(row, keys, columns, usual, sources, f"{where}: row {place + 1}")
        for place, row in enumerate(_typed(values["rows"], list, where, "rows"))
    )
    if not rows:
        raise UserError(f"{where}: rows: there are none")
    section = None
    if "reproduce" in values:
        section = _reproduce(values["reproduce"], keys, columns, rows, f"{where}: reproduce")
        if "cannot_run" in values:
            raise UserError(f"{where}: it has reproduce and cannot_run; leave one out")
    protocol = {key: values[key] for key in PROTOCOL if key in values}
    if wrong := [key for key, value in protocol.items() if isinstance(value, dict | list)]:
        raise UserError(f"{where}: {wrong[0]}: expected text or a number, got {_shown(protocol[wrong[0]])}")
    return Table(
        id=values["id"],
        name=values["name"],
        paper=paper,
        protocol=protocol,
        keys=keys,
        columns=columns,
        rows=rows,
        confidence=values["confidence"],
        reproduce=section,
        cannot_run=_text(values.get("cannot_run", ""), where, "cannot_run"),
    )


def _row(
    values: Any, keys: list[str], columns: list[str], usual: Mapping[str, Any], sources: Mapping[str, str], where: str
) -> Row:
    _check_fields(values, where, required=(), optional=(*keys, *columns, *ROW_FIELDS))
    merged = {**usual, **values}
    _check_confidence(merged["confidence"], where)
    if not isinstance(merged["source"], str) or merged["source"] not in sources:
        raise UserError(f"{where}: source: {unknown_name('source', _shown(merged['source'], quoted=False), sources)}")
    if not any(key in values for key in keys):
        raise UserError(f"{where}: has none of its keys {', '.join(keys)}")
    named = {key: values[key] for key in keys if key in values}
    if wrong := [key for key, value in named.items() if value is None or isinstance(value, dict | list)]:
        raise UserError(f"{where}: {wrong[0]}: expected text or a number, got {_shown(named[wrong[0]])}")
    for name in ("note", "warning"):
        _text(merged.get(name, ""), where, name)
    return Row(
        keys=named,
        values={column: values[column] for column in columns if column in values},
        **{key: merged[key] for key in ROW_FIELDS if key in merged},
    )


def _reproduce(values: Any, keys: list[str], columns: list[str], rows: Collection[Row], where: str) -> Reproduce:
    known = {each.name: each for each in fields(Reproduce)}
    needed = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    _check_fields(values, where, needed, optional=known)
    for part in ("metrics", "bits", "departs", "lacks"):
        _texts(values.get(part, {}), where, part)
    for part in ("models", "rows"):
        for name, overrides in _typed(values.get(part, {}), dict, where, part).items():
            _overrides(overrides, f"{where}: {part}: {name}", "model=" if part == "models" else "method=")
    if ("model" in values) == ("models" in values):
        raise UserError(f"{where}: it needs one of model and models, and has {'both' if 'model' in values else 'none'}")
    if "models" in values and "model" not in keys:
        raise UserError(
            f"{where}: models: no row says its model, 'model' is none of the table's keys; say model instead"
        )
    if "model" in values:
        _text(values["model"], where, "model")
    _check_settings(_typed(values["overrides"], dict, where, "overrides"), where)
    _check_numbers(values, columns, rows, where)
    named = {
        "models": {str(row.keys.get("model")) for row in rows},
        "rows": {row.name for row in rows},
        "bits": {str(row.keys.get("bits")) for row in rows},
        "lacks": {*columns, *(str(value) for row in rows for value in row.keys.values())},
    }
    for part, there in named.items():
        for name in values.get(part, {}):
            if name not in there:
                raise UserError(f"{where}: {part}: {unknown_name('such name in the table:', str(name), there)}")
    if "steps" in values:
        _typed(values["steps"], int, where, "steps")
    elif "steps" not in keys and "model" in values:
        raise UserError(f"{where}: steps: rows do not say it, so it must be a whole number here")
    reference = values.get("reference")
    if reference is not None:
        _check_fields(reference, f"{where}: reference", required=("file", "address"))
        reference = Reference(**_texts(reference, where, "reference"))
    for note in _typed(values.get("notes", []), list, where, "notes"):
        _text(note, where, "notes")
    return Reproduce(**{**values, "reference": reference})


def _check_settings(overrides: Mapping[Any, Any], where: str) -> None:
    for name, value in overrides.items():
        if not isinstance(name, str) or name in ROWS_SAY or name == "model":
            raise UserError(
                f"{where}: overrides: {_shown(name)} is not one: rows say the method and its bits, model the model"
            )
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) for item in items):
            raise UserError(
                f"{where}: overrides: {name}: expected one value, got {_shown(value)}; write {name}.part: value"
            )


def _check_numbers(values: Mapping[str, Any], columns: list[str], rows: Collection[Row], where: str) -> None:
    """Tolerances, scales, and what the paper prints in columns that are compared."""
    for part in ("metrics", "tolerance", "scale"):
        for column in _typed(values.get(part, {}), dict, where, part):
            if column not in columns:
                raise UserError(f"{where}: {part}: {unknown_name('column', str(column), columns)}")
    if not values["metrics"]:
        raise UserError(f"{where}: metrics: none is given, so there is nothing to compare")
    for column in values["metrics"]:
        if not _number(values["tolerance"].get(column)) or values["tolerance"][column] < 0:
            raise UserError(f"{where}: tolerance: no number of 0 or more for {column}")
        for row in rows:
            value = row.values.get(column)
            if value is not None and not _number(value):
                raise UserError(f"{where}: {column} of {row.title}: expected a number or null, got {_shown(value)}")
    for column, factor in values.get("scale", {}).items():
        if not _number(factor) or factor <= 0:
            raise UserError(f"{where}: scale: {column}: expected a number above 0, got {_shown(factor)}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _overrides(values: Any, where: str, first: str) -> None:
    texts = [_text(value, where, "it") for value in _typed(values, list, where, "it")]
    if not texts or not texts[0].startswith(first) or not all("=" in text for text in texts):
        raise UserError(f"{where}: expected a list of overrides, the first of them {first}…, got {_shown(values)}")


def _check_fields(values: Any, where: str, required: Collection[str], optional: Collection[str] = ()) -> None:
    for name in _typed(values, dict, where, "it"):
        if name not in {*required, *optional}:
            raise UserError(f"{where}: {unknown_name('field', _shown(name, quoted=False), {*required, *optional})}")
    for name in required:
        if name not in values:
            raise UserError(f"{where}: the field {name!r} is missing")


def _check_confidence(value: Any, where: str) -> None:
    if not isinstance(value, str) or value not in CONFIDENCES:
        raise UserError(f"{where}: confidence: {unknown_name('confidence', _shown(value, quoted=False), CONFIDENCES)}")


def _names(values: Any, where: str, part: str) -> list[str]:
    names = [_text(value, where, part) for value in _typed(values, list, where, part)]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: {part}: {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return names


def _texts(values: Any, where: str, part: str) -> dict[str, str]:
    for name, value in _typed(values, dict, where, part).items():
        _text(name, where, f"a key of {part}")
        _text(value, where, f"{part}: {name}")
    return values


def _text(value: Any, where: str, name: str) -> str:
    return _typed(value, str, where, name)


def _typed(value: Any, kind: type, where: str, name: str) -> Any:
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 1)):
        raise UserError(f"{where}: {name}: expected {WORDS[kind]}, got {_shown(value)}")
    return value


def _shown(value: Any, *, quoted: bool = True) -> str:
    """A value in one line of an error, whatever it holds."""
    return shortened(repr(value) if quoted else " ".join(str(value).split()), SHOWN)
