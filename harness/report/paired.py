"""Paired tests within a group of comparable runs: every two methods of the same bits, and each against the float model.

What is compared are values per sample (harness/records/sample_values.py), so runs recorded without them, collapsed runs and metrics that
have no value per sample (FID) take no part. p is Holm's over all comparisons of one metric in one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditbench.eval.base import PerSample
from ditbench.eval.paired_differences import Difference, differences, holm
from ditbench.eval.passport import scored_alike
from ditbench.harness.records.record import Record
from ditbench.harness.records.sample_values import Values
from ditbench.harness.report import compare
from ditbench.harness.report.compare import FLOAT_METHOD, Group
from ditbench.harness.report.table import decimals_for, short_names
from ditbench.harness.report.whole import values_with

FLOAT = "float model"
ALPHA = 0.05
COLUMNS = ("bits", "difference", "Δ [95 %]", "p (Holm)", "p")


@dataclass(frozen=True)
class Comparison:
    """first − second at `bits`; second may be FLOAT. p_holm: over all comparisons of the metric in its group."""

    bits: str
    first: str
    second: str
    difference: Difference
    p_holm: float

    @property
    def told_apart(self) -> bool:
        return self.p_holm < ALPHA


@dataclass(frozen=True)
class PairedTests:
    """Of one metric in one group. rows: text under COLUMNS, one per comparison, `told_apart` beside them."""

    metric: str
    title: str
    how: str
    verdicts: list[str]
    rows: list[tuple[str, ...]]
    told_apart: list[bool]


def tests(group: Group, metrics: Sequence[str] | None = None) -> list[PairedTests]:
    """Of the group's metrics (or those of them that are named) which have something to compare, headline ones first."""
    names, made = short_names(group.metrics), []
    for metric in compare.headline_first(group):
        if metrics is None or metric in metrics:
            found = comparisons(group, metric)
            if found:
                decimals = decimals_for(group, metric) + 1
                rows = [_row(each, decimals) for each in found]
                told_apart = [each.told_apart for each in found]
                made.append(
                    PairedTests(metric, names[metric], _how(found), _verdicts(group, metric, found), rows, told_apart)
                )
    return made


def comparisons(group: Group, metric: str) -> list[Comparison]:
    """In the order of the group's rows: of each run those with the runs below it, then with the float model."""
    candidates = _candidates(group, metric)
    found = differences([pair for _, _, _, pair in candidates])
    adjusted = holm([difference.p for difference in found])
    return [
        Comparison(bits, first, second, difference, p_holm)
        for (bits, first, second, _), difference, p_holm in zip(candidates, found, adjusted, strict=True)
    ]


def _row(each: Comparison, decimals: int) -> tuple[str, ...]:
    delta, low, high = (_signed(x, decimals) for x in (each.difference.value, *each.difference.ci95))
    p_values = _p_text(each.p_holm), _p_text(each.difference.p)
    return each.bits, f"{each.first} − {each.second}", f"{delta} [{low}, {high}]", *p_values


def _how(found: Sequence[Comparison]) -> str:
    one, sizes = found[0].difference, sorted({each.difference.n for each in found})
    n = "–".join(map(str, sizes[:: max(len(sizes) - 1, 1)]))
    return f"n = {n} pairs of samples; p: {one.test}, Holm over {len(found)} comparisons; interval: {one.ci_method}"


def _verdicts(group: Group, metric: str, found: Sequence[Comparison]) -> list[str]:
    """A line per bits: what the best run is told apart from, and which runs are from the float model."""
    entries = {
        (compare.bits_label(record), name): record.metrics[metric]
        for record, name in zip(group.records, group.run_names, strict=True)
        if record.method != FLOAT_METHOD and compare.value(record, metric) is not None
    }
    lines = []
    for bits in dict.fromkeys(each.bits for each in found):
        rivals = [each for each in found if each.bits == bits and each.second != FLOAT]
        to_float = [each for each in found if each.bits == bits and each.second == FLOAT]
        said = []
        runs = list(dict.fromkeys(name for each in rivals for name in (each.first, each.second)))
        better = entries[bits, (rivals or to_float)[0].first]["better"]
        if runs and better != "none":
            best = (max if better == "higher" else min)(runs, key=lambda name: entries[bits, name]["value"])
            its_own = [each for each in rivals if best in (each.first, each.second)]
            others = [(each.second if each.first == best else each.first, each.told_apart) for each in its_own]
            said += _listed(f"{best} better than", [name for name, apart in others if apart])
            said += _listed(f"{best} not told apart from", [name for name, apart in others if not apart])
        said += _listed("differ from the float model:", [each.first for each in to_float if each.told_apart])
        said += _listed(
            "not told apart from the float model:", [each.first for each in to_float if not each.told_apart]
        )
        lines += [f"{bits}: {'; '.join(said)}"] if said else []
    return lines


def _listed(words: str, names: Sequence[str]) -> list[str]:
    return [f"{words} {', '.join(names)}"] if names else []


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _signed(x: float, decimals: int) -> str:
    text = f"{abs(x):.{decimals}f}"
    return text if not text.strip("0.") else f"{'−' if x < 0 else '+'}{text}"


def _candidates(group: Group, metric: str) -> list[tuple[str, str, str, tuple[PerSample, PerSample]]]:
    """(bits, first, second, their values) of everything that may be compared."""
    runs: dict[tuple[str, str], tuple[Record, Values]] = {}  # of twins that no setting tells apart, the first
    for record, name in zip(group.records, group.run_names, strict=True):
        values: Values | None = (
            None if record.method == FLOAT_METHOD or compare.alarms(record) else values_with(record, metric)
        )
        if values is not None and metric in values.run and compare.value(record, metric) is not None:
            runs.setdefault((compare.bits_label(record), name), (record, values))
    found = []
    for place, ((bits, name), (record, values)) in enumerate(runs.items()):
        for (its_bits, other), (rival, its_values) in list(runs.items())[place + 1 :]:
            if bits != its_bits or not _pair(values.run[metric], its_values.run[metric]):
                continue
            if values.drawn == its_values.drawn and scored_alike(
                record.metrics[metric]["passport"] or {}, rival.metrics[metric]["passport"] or {}
            ):
                found.append((bits, name, other, (values.run[metric], its_values.run[metric])))
        if metric in values.float_model and _pair(values.run[metric], values.float_model[metric]):
            found.append((bits, name, FLOAT, (values.run[metric], values.float_model[metric])))
    sizes = [len(first.values_N) for _, _, _, (first, _) in found]
    return [each for each, size in zip(found, sizes, strict=True) if size == sizes[0]]  # they are resampled together


def _pair(one: PerSample, other: PerSample) -> bool:
    """Whether two sets of values can lie side by side: a file made elsewhere may say what it likes of how it was drawn."""
    if len(one.values_N) != len(other.values_N) or (one.strata_N is None) != (other.strata_N is None):
        return False
    return one.yes_no == other.yes_no and bool(np.isfinite(one.values_N - other.values_N).any())
