"""The lines under a table: what its marks and signs mean where they occur, what they cannot say, and why a number is missing."""

from __future__ import annotations

from collections.abc import Sequence

from ditbench.eval.seed_differences import FEWEST_SEEDS
from ditbench.harness.report import compare, contests, marks
from ditbench.harness.report.compare import FLOAT_METHOD, Group, short_names

CHECKED_FROM = 64  # samples: the least that bench/intervals.py draws


def notes(group: Group, metrics: Sequence[str], at: str = contests.BITS) -> list[str]:
    found = [
        *_like_float(group, metrics, at),
        *_untested(group, metrics, at),
        *_above_label(group, at),
        *_seeds(group),
        *_timed_beside(group),
        *_few_samples(group),
        *_without_alarms(group),
    ]
    if any(r.method != FLOAT_METHOD and r.metrics for r in group.records) and not any(
        r.method == FLOAT_METHOD and r.status == "ok" for r in group.records
    ):
        found.append(
            "The float model is no row here (add method=fp to the sweep), so nothing says what FID and other numbers of a "
            "whole set would be without quantization. Closeness and paired tests are not affected: each run draws the float "
            "model's samples itself."
        )
    return found + _missing(group)


def _like_float(group: Group, metrics: Sequence[str], at: str) -> list[str]:
    """What ~ means at the numbers where it stands: a test's answer, or a noise floor where nothing was kept to test."""
    names, floors, tested = short_names(group.metrics), [], False
    for name in metrics:
        inside = [
            (record.metrics[name], verdict)
            for record, verdict in zip(group.records, marks.verdicts(group, name, at), strict=True)
            if verdict.inside
        ]
        tested |= any(verdict.tested for _, verdict in inside)
        if own := [entry["noise_floor"] for entry, verdict in inside if not verdict.tested]:
            floors.append(f"{names[name]} ±{max(own):.4g}")
    found = ["the paired tests (Holm) do not tell it apart from the float model"] if tested else []
    found += [f"inside the noise floor around the float row, which is {', '.join(floors)} at most"] if floors else []
    return [f"~: {'; or '.join(found)}."] if found else []


def _timed_beside(group: Group) -> list[str]:
    """Of whose speed it cannot be said what it would be on a machine of its own."""
    beside = [
        f"{name} {compare.bits_label(record)}"
        for name, record in zip(group.run_names, group.records, strict=True)
        if record.efficiency.get("timed_beside") and record.efficiency.get("latency_ms")
    ]
    if not beside:
        return []
    return [
        f"Speed-up and latency of {', '.join(beside)} were timed while other workers of the sweep used the same processor: "
        "they say little. launcher=local times one run alone."
    ]


def _few_samples(group: Group) -> list[str]:
    n = min((r.config.get("protocol", {}).get("n") or CHECKED_FROM for r in group.records), default=CHECKED_FROM)
    if n >= CHECKED_FROM:
        return []
    return [f"n = {n}: intervals and tests of set metrics were checked from n = {CHECKED_FROM} on (docs/protocols.md)."]


def _untested(group: Group, metrics: Sequence[str], at: str) -> list[str]:
    """Where nobody is marked because nothing could be tested, not because nothing was found."""
    names = short_names(group.metrics)
    lacking: dict[tuple[str, ...], list[str]] = {}
    for name in metrics:
        if where := tuple(marks.untested(group, name, at)):
            lacking.setdefault(where, []).append(names[name])
    return [
        f"No marks on {', '.join(metrics)} ({', '.join(where)}): not every two of these runs can be tested, since values per sample were not "
        "kept, or are of other prompts, seeds, code or weights."
        for where, metrics in lacking.items()
    ]


def _above_label(group: Group, at: str) -> list[str]:
    found = [
        f"{name} {compare.bits_label(record)} ({above:.2f} bits)"
        for record, name in zip(group.records, group.run_names, strict=True)
        if (above := contests.above_label(record)) is not None
    ]
    if not found:
        return []
    advice = "" if at == contests.BYTES else "; ranks at equal bytes: --equal-bytes"
    return [
        f"▲: the quantized layers take over 10 % more bits a weight than the label says, all counted: {', '.join(found)}{advice}."
    ]


def _seeds(group: Group) -> list[str]:
    most = contests.most_seeds(group)
    of_float = [len(compare.seeds(record)) for record in group.records if record.method == FLOAT_METHOD]
    rest = [f"{its} seed{'s' * (its > 1)}" for its in of_float if its != most]
    beside = [f"The float row is of {' and '.join(rest)}, and its interval of these."] if rest else []
    if most == 1 and not group.over_seeds:
        return beside
    if most < FEWEST_SEEDS:
        told = (
            "1 seed: intervals and tests are of its samples"
            if most == 1
            else f"{most} seeds: intervals and tests are of the samples of these seeds"
        )
        return [
            f"{told}. How far another seed (another calibration) would move "
            f"a method cannot be known from fewer than {FEWEST_SEEDS}.",
            *beside,
        ]
    return [
        f"{most} seeds: intervals and tests are over seeds, and never narrower than the samples within the seeds allow. So few seeds "
        "prove large differences only: not to be told apart is not to be the same.",
        *beside,
    ]


def _without_alarms(group: Group) -> list[str]:
    runs = [
        f"{name} {compare.bits_label(record)}"
        for record, name in zip(group.records, group.run_names, strict=True)
        if record.status == "ok" and record.metrics and compare.value(record, "collapse") is None
    ]
    if not runs:
        return []
    who = "any run" if len(runs) == sum(record.status == "ok" for record in group.records) else ", ".join(runs)
    return [f"No collapse alarm was computed for {who}: black pictures or noise would be ranked like others."]


def _missing(group: Group) -> list[str]:
    runs_without: dict[tuple[str, str, str], list[str]] = {}
    for record, run in zip(group.records, group.run_names, strict=True):
        for name in group.metrics:
            entry = record.metrics.get(name, {})
            if entry.get("status") in ("skipped", "failed"):
                key = (name, entry["status"], str(entry.get("reason")))
                runs_without.setdefault(key, []).append(f"{run} {compare.bits_label(record)}")
    finished = sum(record.status == "ok" for record in group.records)
    missing: dict[tuple[str, str, str], list[str]] = {}
    for (name, status, why), runs in runs_without.items():
        where = "" if len(runs) >= finished else f" for {', '.join(runs)}"
        missing.setdefault((status, why, where), []).append(name)
    return [f"{status}{where}: {why}: {', '.join(found)}" for (status, why, where), found in missing.items()]
