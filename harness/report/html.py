"""One self-contained page: plotly.js, styles, data and images inside, nothing fetched."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from ditbench.harness.common.artifacts import check_bytes
from ditbench.harness.records.record import Record
from ditbench.harness.report import compare, paired_text
from ditbench.harness.report.compare import FLOAT_METHOD, Group, short_names, value
from ditbench.harness.report.contests import BITS, BYTES, in_order
from ditbench.harness.report.figures import figures
from ditbench.harness.report.frame import reason
from ditbench.harness.report.table import Column, Row, Table, decimals_for, interval, number, table

HERE = Path(__file__).parent
WAYS = (BITS, BYTES)
IMAGE_MAX_BYTES = 1_500_000  # a larger grid is scaled down, so that a page of many runs still opens
IMAGE_MAX_SIDE = 1024
_WHEN = ("finished_at", "finished", "started_at", "started", "date", "time")


@dataclass(frozen=True)
class Picture:
    """An embedded image and its caption; problem says why there is none."""

    title: str
    caption: str = ""
    uri: str = ""
    size: tuple[int, int] = (0, 0)
    reduced: bool = False
    problem: str = ""


def page(groups: Sequence[Group], experiment: str | None, damaged: Sequence[str] = (), at: str = BITS) -> str:
    """at: which ranks are shown first; the page can show both."""
    records = [record for group in groups for record in group.records]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    environment.filters["runs_of_kind"] = _runs_of_kind
    return environment.get_template("template.html").render(
        title=f"ditbench · {experiment}" if experiment else "ditbench · all experiments",
        provenance=provenance(records),
        at=at,
        tables=[ranked_rows(group) for group in groups],
        paired=[{way: paired_text.tests(group, at=way) for way in WAYS} for group in groups],
        paired_columns=paired_text.COLUMNS,
        counts={status: sum(r.status == status for r in records) for status in ("ok", "failed", "skipped")},
        galleries=[(group.label, gallery(group)) for group in groups],
        figures=[figures(group) for group in groups],
        damaged=damaged,
        problems=[(r, compare.bits_label(r), reason(r)) for r in records if r.status != "ok"],
        details=[(group.label, details(group)) for group in groups],
        style=Markup((HERE / "style.css").read_text()),
        script=Markup((HERE / "page.js").read_text()),
        plotly=Markup(get_plotlyjs()),
    )


@dataclass(frozen=True)
class RankedRow:
    """A row of the page's table; by BITS and by BYTES its place, whom it is ranked with, and the mark of each cell."""

    row: Row
    place: dict[str, int]
    contest: dict[str, str]
    marks: dict[str, list[str]]


def ranked_rows(group: Group) -> tuple[Table, list[RankedRow]]:
    """The group's table with the ranks among equal bits, and its rows with both ranks."""
    built = {way: table(group, compare.headline([group]), compare.headline_first(group), way) for way in WAYS}
    orders = {way: in_order(group, way) for way in WAYS}
    rows = []
    for index in orders[BITS]:
        place = {way: orders[way].index(index) for way in WAYS}
        its = {way: built[way].rows[place[way]] for way in WAYS}
        marks = {way: [cell.mark for cell in its[way].cells] for way in WAYS}
        rows.append(RankedRow(its[BITS], place, {way: its[way].contest for way in WAYS}, marks))
    return built[BITS], rows


def provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the records say about where they come from; a value all share is printed once."""
    facts: dict[str, list[str]] = {"experiment": [record.experiment for record in records]}
    for record in records:
        env = record.env
        git, packages = env.get("git"), env.get("packages")
        when = next((env[key] for key in _WHEN if env.get(key)), None)
        facts.setdefault("date", []).append(str(when)[:19].replace("T", " ") if when else "")
        facts.setdefault("git", []).append(_git(git))
        facts.setdefault("device", []).append(str(record.efficiency.get("device") or ""))
        versions = {name: env.get(name) for name in ("ditbench", "python")} | dict(packages or {})
        facts.setdefault("versions", []).append(", ".join(f"{name} {v}" for name, v in versions.items() if v))
    unique = {key: sorted(set(filter(None, found))) for key, found in facts.items()}
    if len(dates := unique["date"]) > 2:
        unique["date"] = [f"{dates[0]} – {dates[-1]}"]
    return [(key, "; ".join(found)) for key, found in unique.items() if found]


def gallery(group: Group) -> list[tuple[str, list[Picture]]]:
    """Per bits label: the float model's grid, then each run's, from the same noise."""
    rows = []
    quantized = [
        (record, name)
        for record, name in zip(group.records, group.run_names, strict=True)
        if record.method != FLOAT_METHOD and record.artifacts.get("grid")
    ]
    for bits, runs in groupby(quantized, key=lambda pair: compare.bits_label(pair[0])):
        pictures: list[Picture] = []
        float_uri = None
        for record, name in runs:
            shown = "animation" if record.artifacts.get("animation") else "grid"
            if record.artifacts.get(f"float_{shown}"):
                reference = picture(record, f"float_{shown}", "float", f"{_reference_dtype(record)}, same noise")
                if reference.uri != float_uri:  # once per row, again only where it is another image
                    pictures.append(reference)
                    float_uri = reference.uri
            pictures.append(picture(record, shown, name, _headline_text(group, record)))
        rows.append((bits, pictures))
    return rows


def _reference_dtype(record: Record) -> str:
    return (record.config.get("generate") or {}).get("reference_dtype") or "float"


def picture(record: Record, artifact: str, title: str, caption: str) -> Picture:
    """The image file beside the record, embedded."""
    assert record.folder is not None, "records of a report are read from disk"
    relative = record.artifacts[artifact]
    path = record.folder / relative
    try:
        content = path.read_bytes()
        if relative in record.files:
            check_bytes(path, record.files[relative])
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size, kind, reduced = image.size, Image.MIME[image.format or "PNG"], False
            if len(content) > IMAGE_MAX_BYTES and not getattr(image, "is_animated", False):
                image.thumbnail((IMAGE_MAX_SIDE, IMAGE_MAX_SIDE))
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "WEBP", quality=88)
                content, size, kind, reduced = buffer.getvalue(), image.size, "image/webp", True
    except Exception as error:  # Pillow has an exception of its own for many a damage
        why = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        return Picture(title, caption, problem=f"{path.name} is {why}")
    return Picture(title, caption, f"data:{kind};base64,{base64.b64encode(content).decode()}", size, reduced)


def details(group: Group) -> list[dict[str, Any]]:
    """Everything else a record holds, run by run."""
    shown = []
    for record, run in zip(group.records, group.run_names, strict=True):
        metrics = [
            {
                "name": metric,
                "text": _value_text(group, record, metric) if value(record, metric) is not None else "–",
                "why": entry.get("reason"),
                "passport": entry.get("passport") or {},
            }
            for metric, entry in record.metrics.items()
        ]
        parts = {"bits": record.bits, "efficiency": record.efficiency, "timings_s": record.timings_s, "env": record.env}
        parts |= {"cost": record.cost, "layers": record.layers, "config": record.config}
        shown.append(
            {
                "record": record,
                "run": f"{run} {compare.bits_label(record)}",
                "reason": reason(record),
                "metrics": metrics,
                "parts": {name: json.dumps(part, indent=2, ensure_ascii=False) for name, part in parts.items() if part},
            }
        )
    return shown


def _headline_text(group: Group, record: Record) -> str:
    names = short_names(group.metrics)
    shown = [name for name in compare.headline([group]) if value(record, name) is not None][:3]
    return " · ".join(f"{names[name]} {number(value(record, name), decimals_for(group, name))}" for name in shown)


def _value_text(group: Group, record: Record, metric: str) -> str:
    entry, x = record.metrics[metric], value(record, metric)
    assert x is not None
    decimals = decimals_for(group, metric)
    parts = [number(x, decimals), interval(x, entry.get("ci95"), decimals), entry.get("unit") or "", f"n={entry['n']}"]
    if entry.get("noise_floor") is not None:
        parts.append(f"noise floor ±{number(entry['noise_floor'], decimals)}")
    return " ".join(part for part in parts if part)


def _git(git: Any) -> str:
    """ "<commit>" or "<commit>-dirty", or a mapping of commit and dirty, in words."""
    if isinstance(git, Mapping):
        git = f"{git.get('commit') or ''}{'-dirty' if git.get('dirty') else ''}"
    commit, dirty, _ = str(git or "").partition("-dirty")
    return f"{commit[:12]} with uncommitted changes" if dirty else commit[:12]


def _runs_of_kind(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Neighbouring columns of one kind of metric, as one head over them."""
    return [{"kind": kind, "count": len(list(same))} for kind, same in groupby(columns, key=lambda column: column.kind)]


def _breakable(text: str) -> Markup:
    """Lets a long name wrap after / and _."""
    escaped = Markup.escape(text)
    return Markup(escaped.replace("/", Markup("/<wbr>")).replace("_", Markup("_<wbr>")))
