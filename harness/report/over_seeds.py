"""Runs that differ in their seed only, as one row: the mean over seeds, and an interval over them (`eval.seed_differences`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ditbench.eval.seed_differences import OF_LOGARITHMS, logarithms_over_seeds, mean_over_seeds
from ditbench.eval.set_scores import DELETE_QUARTER
from ditbench.eval.statistics import (
    INFLUENCE_OF_LOG,
    INFLUENCE_OF_PAIRS,
    WILSON,
    WILSON_BY_DESIGN,
    WILSON_OF_GROUPS,
    Interval,
)
from ditbench.harness.records.record import Record
from ditbench.harness.report import compare

# By how each seed's own interval was made: where the number cannot lie beyond, nor does the interval over seeds.
_SHARES = (WILSON, WILSON_BY_DESIGN, WILSON_OF_GROUPS, DELETE_QUARTER)
_LEAST = dict.fromkeys((*_SHARES, INFLUENCE_OF_PAIRS), 0.0)
_MOST = dict.fromkeys(_SHARES, 1.0)
_NO_NUMBER_DEPENDS_ON = ("seed", "name", "tracker", "results_dir", "cache_dir", "force", "strict", "debug")


def over_seeds(records: Iterable[Record]) -> list[Record]:
    """One record for every set of finished runs that share all but the seed; what has no twin stays as it is.

    Metrics: mean, 95 % interval of the mean over seeds, of FID that of its logarithm (n stays that of one seed; the largest noise
    floor counts).
    Other numbers: mean. All the rest: as in the first seed's record; the runs themselves are the row's `members`.
    """
    alike: dict[str, list[Record]] = {}
    alone = []
    for record in records:
        if record.status == "ok":
            alike.setdefault(_all_but_the_seed(record), []).append(record)
        else:
            alone.append(record)
    sets = [part for found in alike.values() for part in _once_each(found)]
    return [_merged(members) if len(members) > 1 else members[0] for members in sets] + alone


def _once_each(alike: Sequence[Record]) -> list[list[Record]]:
    """Each seed once. Where a seed is there twice with other numbers (another version made them), no row mixes the two: one for each
    experiment.
    """
    by_seed: dict[str, list[Record]] = {}
    for record in alike:
        by_seed.setdefault(str(record.config.get("seed")), []).append(record)
    experiments = list(dict.fromkeys(record.experiment for record in alike))
    if len(experiments) > 1 and any(compare.numbers_differ(twins) for twins in by_seed.values()):
        of_each = [[record for record in alike if record.experiment == name] for name in experiments]
        return [part for own in of_each for part in _once_each(own)]
    return [[by_seed[seed][-1] for seed in sorted(by_seed)]]


def _all_but_the_seed(record: Record) -> str:
    config = {name: value for name, value in record.config.items() if name not in _NO_NUMBER_DEPENDS_ON}
    weights = record.env.get("weights_sha256")
    return json.dumps([record.model, record.method, config, weights], sort_keys=True, default=str)


def _merged(members: list[Record]) -> Record:
    first = members[0]
    seeds = ", ".join(str(record.config.get("seed")) for record in members)
    averaged = {
        section: _mean([getattr(record, section) for record in members])
        for section in ("bits", "efficiency", "timings_s", "cost")
    }
    metrics = {name: _metric(name, members) for name in dict.fromkeys(name for one in members for name in one.metrics)}
    # Values per sample beside it are those of one seed; tests read those of all members.
    artifacts = {name: file for name, file in first.artifacts.items() if name != "per_sample"}
    merged = replace(first, config=first.config | {"seed": seeds}, metrics=metrics, layers={}, artifacts=artifacts)
    return replace(merged, members=tuple(members), **averaged)


def _metric(name: str, members: Sequence[Record]) -> dict[str, Any]:
    """One metric's entry; it is skipped if any seed skipped it, or was never asked for it (metrics can be computed later)."""
    entries = [record.metrics[name] for record in members if name in record.metrics]
    if lacking := [str(record.config.get("seed")) for record in members if name not in record.metrics]:
        why = f"not computed for seed {', '.join(lacking)}"
        nothing = {"value": None, "ci95": None, "n": 0, "noise_floor": None, "passport": {}}
        return entries[0] | nothing | {"status": "skipped", "reason": why}
    values = [entry.get("value") for entry in entries]
    if None in values:
        return next(entry for entry in entries if entry.get("value") is None)
    floors = [entry["noise_floor"] for entry in entries if entry.get("noise_floor") is not None]
    if of_logs := _of_logarithms(entries):
        found, ci95 = logarithms_over_seeds(values, [entry["ci95"] for entry in entries])
    else:
        found = mean_over_seeds(values, [_error(entry) for entry in entries])
        ci95 = found.ci95
    ci95 = _possible(float(np.mean(values)), ci95, entries)
    method = found.method + OF_LOGARITHMS * of_logs
    passport = (entries[0].get("passport") or {}) | {"ci_method": method, "seeds": len(entries)}
    return entries[0] | {
        "value": float(np.mean(values)),
        "ci95": list(ci95) if found.error or np.isfinite(found.freedom) else None,
        "noise_floor": max(floors, default=None),
        "passport": passport,
    }


def _possible(value: float, ci95: Interval, entries: Sequence[dict[str, Any]]) -> Interval:
    """The interval without what no number of this kind can be: a share above 1, a distance below 0."""
    kinds = {(entry.get("passport") or {}).get("ci_method") for entry in entries}
    least, most = (bounds.get(next(iter(kinds))) if len(kinds) == 1 else None for bounds in (_LEAST, _MOST))
    low, high = ci95
    return (
        low if least is None else max(low, min(value, least)),
        high if most is None else min(high, max(value, most)),
    )


def _of_logarithms(entries: Sequence[dict[str, Any]]) -> bool:
    """Whether each seed's own interval is one of a logarithm (FID)."""
    told = [((entry.get("passport") or {}).get("ci_method"), (entry.get("ci95") or [0])[0]) for entry in entries]
    return all(method == INFLUENCE_OF_LOG and low > 0 for method, low in told)


def _error(entry: dict[str, Any]) -> float:
    """The standard error that the interval of one seed stands for; 0 where there is none."""
    low, high = entry.get("ci95") or (0.0, 0.0)
    return (high - low) / (2 * 1.96)


def _mean(values: Sequence[Any]) -> Any:
    """Numbers averaged, mappings key by key, anything else (and what some lack) as in the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value.get(key) if isinstance(value, dict) else None for value in values]) for key in first}
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return float(np.mean(values)) if numbers else first
