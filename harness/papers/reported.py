"""Numbers as papers report them: `results/papers/*.yaml`, one file per paper, and files of the same kind that a user has.

They are checked when they are read (`schema.py`) and never recomputed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.paths import PAPERS
from ditbench.harness.common.terminal import wrapped
from ditbench.harness.common.text_table import table as text_table
from ditbench.harness.papers.schema import CONFIDENCES, Paper, Table, read

EMPTY = "–"


@cache
def papers(folder: Path = PAPERS) -> dict[str, Paper]:
    """{file name without ending: paper}, all checked.

    Raises:
        UserError: naming file, table and field.
    """
    found = {path.stem: read(path) for path in sorted(folder.glob("*.yaml"))}
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


def table(name: str | None, file: Path | None = None) -> Table:
    """The table with this short name (ptq4dit-table1) or id (ptq4dit_table1_imagenet256); of a user's file, if one is given,
    which need not be named where the file has only one.

    Raises:
        UserError: no such table, or a file that is wrong.
    """
    known = tables() if file is None else {each.name: each for each in read(file).tables}
    if name is None:
        if file is None:
            raise UserError("which table? `ditbench paper list` names them; --table FILE takes one of yours")
        if len(known) != 1:
            raise UserError(f"{file}: it has {len(known)} tables; name one: {', '.join(known) or 'there is none'}")
        return next(iter(known.values()))
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
    for stem, paper in papers().items():
        for gap in paper.missing:
            how = f"; `ditbench paper show {stem}` has a file to fill in" if gap.add else ""
            lines.append(wrapped(f"not here: {paper.title}: {gap.tables} ({gap.reason}){how}"))
    return "\n".join(lines)


def shown(name: str | None, file: Path | None = None) -> str:
    """`ditbench paper show NAME`: a table's numbers with protocol, sources and confidence; or what is missing of a paper."""
    if file is None and name in papers() and any(gap.add for gap in papers()[name].missing):
        return _gaps_shown(papers()[name])
    each = table(name, file)
    known = [read(file)] if file else papers().values()
    sources = next(paper.sources for paper in known if each in paper.tables)
    parts = [f"{each.name} · {each.paper} · id {each.id}"]
    parts += ["\n".join(wrapped(f"  {key.replace('_', ' ')}: {value}") for key, value in each.protocol.items())]
    header, mixed = [*each.keys, *each.columns], len({(row.source, row.confidence) for row in each.rows}) > 1
    rows = []
    for row in each.rows:
        cells = [_cell(row.keys.get(key)) for key in each.keys] + [_cell(row.values.get(c)) for c in each.columns]
        rows.append([*cells, *([f"{row.source} ({row.confidence})"] if mixed else [])])
    parts.append(text_table([*header, *(["source"] if mixed else [])], rows))
    notes = [
        f"{row.title}: {text}"
        for row in each.rows
        for text in (row.note, row.warning and f"WARNING: {row.warning}")
        if text
    ]
    parts += ["\n".join(map(wrapped, notes))] if notes else []
    kinds = dict.fromkeys(row.confidence for row in each.rows)
    said = [f"confidence {kind}: {CONFIDENCES[kind]}" for kind in kinds]
    said += [f"source {alias}: {sources[alias]}" for alias in dict.fromkeys(row.source for row in each.rows)]
    if each.reproduce:
        of_file = f" --table {file}" if file else ""
        said.append(f"ditbench reproduce {each.name}{of_file} --plan says what running it here needs")
    elif each.cannot_run:
        said.append(f"it cannot be run here: {each.cannot_run}")
    return "\n\n".join([wrapped(parts[0]), *parts[1:], "\n".join(_unless_command(line) for line in said)])


def _unless_command(line: str) -> str:
    """Wrapped, but for a command, which is copied from there."""
    return line if line.startswith("ditbench ") else wrapped(line)


def _gaps_shown(paper: Paper) -> str:
    parts = [paper.title]
    if paper.tables:
        parts.append(f"here: {', '.join(each.name for each in paper.tables)}")
    for gap in paper.missing:
        parts.append(f"not here: {gap.tables} ({gap.reason})")
        if gap.add:
            parts.append(
                "to add them, fill this in from the paper, as docs/papers.md says, and run\n"
                "ditbench reproduce --table FILE --plan; null is a value that the paper does not print"
            )
            parts.append(gap.add.rstrip())
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    return EMPTY if value is None else str(value)
