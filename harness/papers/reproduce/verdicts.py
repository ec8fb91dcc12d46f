"""Our number against the paper's: within, outside, or not comparable with the reasons, which are found, not written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditbench.harness.papers.reproduce.rows import Line
from ditbench.harness.papers.schema import CONFIDENCES, Reproduce, Row
from ditbench.harness.records.record import Record
from ditbench.harness.report.compare import value
from ditbench.harness.report.frame import reason

JUDGE = "_judge"  # metrics in the features of a zoo model's judge end so, and stand in for Inception's there
GENEVAL, SHAPES = "geneval/", "geneval_shapes/"  # the detector's, and an exact reader's of the shapes world


@dataclass(frozen=True)
class Judged:
    """One cell: ours and its interval, on the paper's scale, and the verdict with its reasons {what: how it differs}."""

    ours: float | None
    ci95: Sequence[float] | None
    verdict: str
    reasons: Mapping[str, str]


def judged_row(
    line: Line,
    section: Reproduce,
    record: Record | None,
    refusal: str | None = None,
    expected: Mapping[str, Any] | None = None,
) -> dict[str, Judged]:
    """{column: judged}; a row that was not run, or not to the end, says so in every column.

    expected: the configuration that the paper's own settings make; None where its model is not here.
    """
    if line.lacks:
        said = f"not here: {', '.join(line.lacks)}"
    elif record is None:
        said = f"refused: {refusal}"
    elif record.status != "ok":
        said = f"{record.status}: {reason(record)}"
    else:
        asked = {"model": f"{record.model}, not {line.row.keys.get('model', section.model)}"}
        settings = asked if expected is None else departures(record.config, expected)
        return {column: _judged(line.row, column, section, record, settings) for column in section.metrics}
    return {column: Judged(None, None, said, {}) for column in section.metrics}


def _judged(row: Row, column: str, section: Reproduce, record: Record, settings: Mapping[str, str]) -> Judged:
    wanted, paper, factor = section.metrics[column], row.values.get(column), section.scale.get(column, 1)
    metric = next((name for name in stand_ins(wanted) if value(record, name) is not None), wanted)
    measured, entry = value(record, metric), record.metrics.get(metric, {})
    if measured is None:
        skipped = next((record.metrics[name] for name in stand_ins(wanted) if name in record.metrics), {})
        return Judged(None, None, f"not computed: {skipped.get('reason') or f'{wanted} was not asked for'}", {})
    ours, ci95 = measured * factor, entry.get("ci95") and [end * factor for end in entry["ci95"]]
    if paper is None:
        return Judged(ours, ci95, "the paper prints no value", {})
    reference = section.reference.file if section.reference else None
    reasons = dict(settings) | evaluator_departures(metric, wanted, entry.get("passport", {}), reference)
    for what, how in section.departs.items():
        if what == column or what not in section.metrics:
            reasons.setdefault("evaluator" if what == column else what, f"{column}: {how}" if what == column else how)
    if row.confidence == "recall":
        reasons["confidence"] = f"recall ({CONFIDENCES['recall']})"
    return Judged(ours, ci95, verdict(paper, ours, ci95, section.tolerance[column], reasons), reasons)


def stand_ins(wanted: str) -> list[str]:
    """The metric, and what an embedded model has in its place."""
    return [wanted, wanted + JUDGE, *([wanted.replace(GENEVAL, SHAPES)] if wanted.startswith(GENEVAL) else [])]


def verdict(
    paper: float, ours: float, ci95: Sequence[float] | None, tolerance: float, reasons: Iterable[str] = ()
) -> str:
    """within | outside | not comparable: what differs."""
    if reasons := list(reasons):
        return f"not comparable: {', '.join(reasons)}"
    in_interval = ci95 is not None and ci95[0] <= paper <= ci95[1]
    return "within" if in_interval or abs(ours - paper) <= tolerance else "outside"


def departures(ours: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, str]:
    """{what: "ours, not the paper's"} for every setting that can move the comparison; both are whole configurations."""
    left, right = _settings(ours), _settings(expected)
    differing = [key for key in {**right, **left} if left.get(key) != right.get(key)]
    return {_short(key): f"{left.get(key)}, not {right.get(key)}" for key in differing}


def evaluator_departures(
    metric: str, wanted: str, passport: Mapping[str, Any], reference: str | None
) -> dict[str, str]:
    """Other features than those asked for, or another set of real images."""
    found = {}
    if metric == wanted + JUDGE:
        found["features"] = f"{metric} (the zoo judge's), not {wanted} (Inception's)"
    elif metric != wanted:
        found["evaluator"] = f"{metric} (exact reading of the shapes world), not {wanted}"
    if reference and passport.get("reference") not in (None, reference):
        found["reference"] = f"{passport['reference']}, not {reference}"
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared between two configurations: not where weights lie, nor what only this machine is told."""
    parts = {
        "model": {key: config["model"][key] for key in ("name", "random", "stress")},
        "protocol": {key: setting for key, setting in config["protocol"].items() if key != "name"},
        "method": config["method"],
        "bits": {side: config["bits"][side] for side in ("weight", "act")},
        "calibration": {"n": config["calibration"]["n"]},
        "generate": {"dtype": config["generate"]["dtype"]},
    }
    return dict(_flat(parts))


def _flat(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(config, Mapping):
        yield prefix, config
        return
    for key, setting in config.items():
        yield from _flat(setting, f"{prefix}.{key}" if prefix else key)


def _short(key: str) -> str:
    """model.name → model, protocol.n → n; other parts keep their prefix."""
    return "model" if key == "model.name" else key.removeprefix("protocol.")
