"""All that the page shows, as one value that JSON holds: numbers, marks, tests and sentences are made here, the page only lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditbench.harness.report import compare, contests, figures, paired_text, trust
from ditbench.harness.report.compare import FLOAT_METHOD, Group, plain, short_names
from ditbench.harness.report.conclusions import conclusions
from ditbench.harness.report.contests import BITS, BYTES
from ditbench.harness.report.fronts import called, fronts
from ditbench.harness.report.gallery import gallery
from ditbench.harness.report.layers import layers
from ditbench.harness.report.page_files import PageFiles
from ditbench.harness.report.table import Cell, Column, Table, table

WAYS = (BITS, BYTES)
MOST_TESTS = 400  # rows of paired tests of one metric on the page; `ditbench compare` has them all
ALWAYS = ("method", "bits", "compr.", "stored", "speed-up", "status")
HEADS = {  # what newcomers read, for the short heads of a terminal
    "method": "run",
    "eff. W/A": "bits stored, W/A",
    "compr.": "smaller than bf16",
    "stored": "stored",
    "speed-up": "speed-up over eager bf16",
    "compiled": "speed-up over compiled bf16, compiled",
    "fit": "time to quantize",
    "fit peak": "memory to quantize",
}


def page_data(groups: Sequence[Group], files: PageFiles, at: str, damaged: Sequence[str]) -> dict[str, Any]:
    """{"groups": […], "columns": […], "rows": […], …}; what is large goes to `files`. at: which ranks are shown first."""
    records = [record for group in groups for record in group.records]
    tables = [
        {way: table(group, compare.headline([group]), compare.headline_first(group), way) for way in WAYS}
        for group in groups
    ]
    columns = _columns(groups, [each[BITS] for each in tables])
    starts = [sum(len(group.records) for group in groups[:index]) for index in range(len(groups))]
    rows = []
    for index, (group, built) in enumerate(zip(groups, tables, strict=True)):
        rows += _rows(index, group, built, columns, starts[index], files)
    return {
        "at": at,
        "counts": {status: sum(r.status == status for r in records) for status in ("ok", "failed", "skipped")},
        "columns": columns,
        "rows": rows,
        "groups": [
            _group(group, built, index, start, files)
            for index, (group, built, start) in enumerate(zip(groups, tables, starts, strict=True))
        ],
        "provenance": trust.provenance(records),
        "damaged": list(damaged),
    }


def _columns(groups: Sequence[Group], tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Those of all groups, each once: metrics by their whole name."""
    shown = set(compare.headline(groups)) | set(ALWAYS)
    found: dict[str, dict[str, Any]] = {}
    for built in tables:
        for column in built.columns:
            key = column.metric or column.title
            unit = column.subtitle.partition("n=")[0].strip()
            found.setdefault(
                key,
                {
                    "key": key,
                    "title": _head(column),
                    "unit": unit,
                    "tip": column.tip,
                    "kind": column.kind,
                    "numeric": column.numeric,
                    "down": column.descending_first,
                    "shown": key in shown,
                },
            )
    status = found.pop("status", None)  # after what only some groups have
    return [*found.values(), *([status] if status else [])]


def _head(column: Column) -> str:
    if not column.metric:
        return HEADS.get(column.title, column.title)
    name, blank, arrow = column.title.partition(" ")
    return plain(name) + blank + arrow


def _rows(
    index: int, group: Group, built: dict[str, Table], columns: Sequence[dict[str, Any]], start: int, files: PageFiles
) -> list[dict[str, Any]]:
    orders = {way: contests.in_order(group, way) for way in WAYS}
    place_of = {way: {place: position for position, place in enumerate(orders[way])} for way in WAYS}
    out = contests.unranked(group)
    found = []
    for place, (record, name) in enumerate(zip(group.records, group.run_names, strict=True)):
        its = {way: built[way].rows[place_of[way][place]] for way in WAYS}
        at_bits, at_bytes = (its[way].cells for way in WAYS)
        cells = {
            column.metric or column.title: _cell(one, other)
            for column, one, other in zip(built[BITS].columns, at_bits, at_bytes, strict=True)
        }
        settings = compare.protocol(record)
        found.append(
            {
                "id": start + place,
                "key": f"{record.experiment}/{record.run_id}",
                "group": index,
                "name": name,
                "called": called(group, place),
                "method": record.method,
                "bits": compare.bits_label(record),
                "model": compare.model_label(record),
                "protocol": f"{settings.get('name', '?')}, n = {settings.get('n', '?')}, {settings.get('steps', '?')} steps",
                "seed": str(record.config.get("seed")),
                "status": record.status if place not in out or record.status != "ok" else "not ranked",
                "why": out.get(place, ""),
                "float": record.method == FLOAT_METHOD,
                "place": {way: place_of[way][place] for way in WAYS},
                "contest": {way: its[way].contest for way in WAYS},
                "above": contests.above_label(record) is not None,
                "cells": cells,
                "details": files.data(f"runs/{start + place}", trust.of_run(group, place)),
            }
        )
    return found


def _cell(cell: Cell, at_bytes: Cell) -> dict[str, Any]:
    """t: text, i: interval, s: what it sorts by, h: tip; b, y: mark among equal bits, equal bytes; n, m: not told from float in them."""
    sort = float(f"{cell.sort:.7g}") if isinstance(cell.sort, float) else cell.sort
    found = {"t": cell.text, "i": cell.interval, "h": cell.tip, "b": cell.mark, "y": at_bytes.mark}
    found |= {"n": int(cell.inside), "m": int(at_bytes.inside)}
    return {key: said for key, said in found.items() if said} | ({} if sort is None else {"s": sort})


def _group(group: Group, built: dict[str, Table], index: int, start: int, files: PageFiles) -> dict[str, Any]:
    """What every view knows of a group, and the name of what is loaded when it is looked at."""
    names = short_names(group.metrics)
    plotted = figures.plotted(group)
    first = built[BITS]
    metrics = [
        {"name": name, "title": names[name] + " (closeness to float)" * compare.is_closeness(group, name)}
        for name in plotted
    ]
    looked_at = {
        "caption": first.caption,
        "notes": {way: built[way].notes for way in WAYS},
        "not_ranked": first.not_ranked,
        "metrics": metrics,
        "metric": most_telling(group, plotted),
        "conclusions": conclusions(group),
        "answers": {metric: _answers(group, metric, start) for metric in plotted},
        "tests": {way: [_tests(each) for each in paired_text.tests(group, at=way)] for way in WAYS},
        "gallery": _moved(gallery(group, files), start),
        "layers": layers(group, start, files),
        "computed": trust.computed(group),
        "passports": trust.passports(group),
    }
    return {
        "label": group.label,
        "problems": trust.problems(group),
        "file": files.data(f"groups/{index}", looked_at),
    }


def most_telling(group: Group, metrics: Sequence[str]) -> str | None:
    """Of the headline metrics the one by whose paired tests most runs are told apart; the page shows it first."""
    headline = [name for name in compare.headline([group]) if name in metrics] or list(metrics)
    apart = {test.metric: sum(test.told_apart) for test in paired_text.tests(group, headline)}
    return max(headline, key=lambda name: apart.get(name, 0), default=None)


def _answers(group: Group, metric: str, start: int) -> list[dict[str, Any]]:
    """The fronts of a metric with their plots."""
    return [
        {
            "against": front.against,
            "device": front.device,
            "front": [start + place for place in front.front],
            "knee": None if front.knee is None else start + front.knee,
            "sentences": front.sentences,
            "left_out": front.left_out,
            "figure": figures.front_figure(group, metric, front),
        }
        for front in fronts(group, metric)
    ]


def _tests(tests: paired_text.PairedTests) -> dict[str, Any]:
    rows = list(zip(tests.rows, tests.told_apart, strict=True))
    return {
        "title": tests.title,
        "how": tests.how,
        "verdicts": tests.verdicts,
        "rows": [[list(row), apart] for row, apart in rows[:MOST_TESTS]],
        "left_out": max(len(rows) - MOST_TESTS, 0),
        "metric": tests.metric,
    }


def _moved(found: dict[str, Any] | None, start: int) -> dict[str, Any] | None:
    """Its runs by their places on the page."""
    if found is None:
        return None
    return found | {"runs": {str(start + place): its for place, its in found["runs"].items()}}
