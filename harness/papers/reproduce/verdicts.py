"""Our number against the paper's: within, outside, or not comparable with the reasons, which are found, not written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditbench.harness.papers import reported
from ditbench.harness.papers.reported import Reproduce, Row
from ditbench.harness.papers.reproduce.rows import NOT_YET, Line
from ditbench.harness.records.record import Record
from ditbench.harness.report.compare import value
from ditbench.harness.report.frame import reason
from ditbench.harness.stages.config import RunConfig

JUDGE = "_judge"  # metrics in the features of a zoo model's judge end so, and stand in for Inception's there


@dataclass(frozen=True)
class Judged:
    """One cell: ours, its interval, and the verdict with its reasons {what: how it differs}."""

    ours: float | None
    ci95: Sequence[float] | None
    verdict: str
    reasons: Mapping[str, str]


def judged_row(
    line: Line, section: Reproduce, record: Record | None, refusal: str | None, expected: RunConfig | None
) -> dict[str, Judged]:
    """{column: judged}; a row that was not run, or not to the end, says so in every column."""
    if record is None or expected is None:
        why = f"refused: {refusal}" if refusal else NOT_YET
    elif record.status != "ok":
        why = f"{record.status}: {reason(record)}"
    else:
        why = None
    if why is not None:
        return {column: Judged(None, None, why, {}) for column in section.metrics}
    settings = departures(record.config, expected.raw)
    return {column: _judged(line.row, column, section, record, settings) for column in section.metrics}


def _judged(row: Row, column: str, section: Reproduce, record: Record, settings: Mapping[str, str]) -> Judged:
    wanted, paper = section.metrics[column], row.values.get(column)
    metric = wanted if value(record, wanted) is not None else wanted + JUDGE
    ours, entry = value(record, metric), record.metrics.get(metric, {})
    if ours is None:
        skipped = record.metrics.get(wanted, entry)
        return Judged(None, None, f"not computed: {skipped.get('reason') or f'{wanted} was not asked for'}", {})
    if paper is None:
        return Judged(ours, entry.get("ci95"), "the paper prints no value", {})
    reasons = dict(settings) | evaluator_departures(metric, wanted, entry.get("passport", {}), section.reference.file)
    if row.confidence == "recall":
        reasons["confidence"] = f"recall ({reported.CONFIDENCES['recall']})"
    return Judged(
        ours, entry.get("ci95"), verdict(paper, ours, entry.get("ci95"), section.tolerance[column], reasons), reasons
    )


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


def evaluator_departures(metric: str, wanted: str, passport: Mapping[str, Any], reference: str) -> dict[str, str]:
    """Other features than those asked for, or another set of real images."""
    found = {}
    if metric != wanted:
        found["features"] = f"{metric} (the zoo judge's), not {wanted} (Inception's)"
    if passport.get("reference") not in (None, reference):
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
