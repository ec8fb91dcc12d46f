"""Paired tests within a group of comparable runs: every two runs of a contest, and each of them against the float model.

What is compared are values per sample (harness/records/sample_values.py), of a number of the whole set what each sample contributes
to it, where that was kept. Runs recorded without them take no part, and neither do runs that have no rank. p is Holm's over all comparisons of one metric in one contest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditbench.eval.base import PerSample
from ditbench.eval.paired_differences import Difference, differences, holm
from ditbench.eval.passport import scored_alike
from ditbench.eval.seed_differences import differences_over_seeds, is_positive, logarithm, of_the_ratio
from ditbench.eval.statistics import INFLUENCE_OF_LOG
from ditbench.harness.records.record import Record
from ditbench.harness.records.sample_values import Values
from ditbench.harness.report import compare
from ditbench.harness.report.compare import Group
from ditbench.harness.report.contests import BITS, Contest, contests, names, unranked
from ditbench.harness.report.whole import values_with

FLOAT = "float model"
ALPHA = 0.05

Pair = tuple[PerSample, PerSample]


@dataclass(frozen=True)
class Comparison:
    """first − second in a contest; second may be FLOAT. p_holm: over all comparisons of the metric in that contest."""

    contest: str
    first: str
    second: str
    difference: Difference
    p_holm: float
    better: str  # of the metric: higher | lower | none

    @property
    def told_apart(self) -> bool:
        return self.p_holm < ALPHA

    @property
    def winner(self) -> str | None:
        """Who the test says is better."""
        if not self.told_apart or self.better == "none" or not self.difference.value:
            return None
        return self.first if (self.difference.value > 0) == (self.better == "higher") else self.second


@dataclass(frozen=True)
class Ranks:
    """Names of a contest: best (several: tied), second (only after a single best), and behind those that somebody is better than."""

    best: list[str]
    second: list[str]
    behind: list[str]


@dataclass(frozen=True)
class Run:
    """by_seed: {seed: (the record, its values)}, of all runs that a row is made of."""

    name: str
    by_seed: Mapping[str, tuple[Record, Values]]


def comparisons(group: Group, metric: str, at: str = BITS) -> list[Comparison]:
    """In the order of the table: of each run those with the runs below it, then with the float model."""

    def all_contests() -> list[Comparison]:
        return [each for contest in contests(group, at) for each in _of_contest(group, metric, contest, at)]

    return group.once(("comparisons", metric, at), all_contests)


def of_bits(group: Group, found: Sequence[Comparison], bits: Sequence[str] | None, at: str = BITS) -> list[Comparison]:
    """Those between runs of these labels only (or one of them and the float model), corrected for all comparisons of their contest."""
    if bits is None:
        return list(found)
    label = {name: compare.bits_label(record) for name, record in zip(names(group, at), group.records, strict=True)}
    if at == BITS:
        return [each for each in found if each.contest in bits]
    return [each for each in found if all(name == FLOAT or label[name] in bits for name in (each.first, each.second))]


def between(group: Group, metric: str, first: int, second: int) -> Difference | None:
    """first − second, two places of the group whatever their contests; None where their samples do not pair.

    Its p is of this one comparison: who looks at several adjusts it (`holm`).
    """

    def found() -> Difference | None:
        runs = [Run(group.run_names[place], _by_seed(group.records[place], metric)) for place in (first, second)]
        pairs = _pairs(*runs, metric) if all(run.by_seed for run in runs) else []
        return _differences([pairs], _of_logarithm(group.records[first], metric))[0] if pairs else None

    return group.once(("between", metric, first, second), found)


def ranks(group: Group, metric: str, contest: Contest, at: str = BITS) -> Ranks | None:
    """None where fewer than two runs of the contest were tested, or not all that have the metric against each other."""
    found = [each for each in comparisons(group, metric, at) if each.contest == contest.label and each.second != FLOAT]
    runs = list(dict.fromkeys(name for each in found for name in (each.first, each.second)))
    if not runs or len(found) < len(runs) * (len(runs) - 1) // 2 or not able(group, metric, contest, at) <= set(runs):
        return None  # who is best of some is not best of all
    beaten_by: dict[str, set[str]] = {name: set() for name in runs}
    for each in found:
        if each.winner is not None:
            beaten_by[each.second if each.winner == each.first else each.first].add(each.winner)
    best = [name for name in runs if not beaten_by[name]]
    second = [name for name in runs if beaten_by[name] == set(best)] if len(best) == 1 else []
    return Ranks(best, second, [name for name in runs if beaten_by[name]])


def able(group: Group, metric: str, contest: Contest, at: str = BITS) -> set[str]:
    """The names of the contest's runs that could have a rank: those that have the metric, and nothing that takes their rank."""
    out, called = unranked(group), names(group, at)
    places = [place for place in contest.places if place not in out]
    return {called[place] for place in places if compare.value(group.records[place], metric) is not None}


def _of_contest(group: Group, metric: str, contest: Contest, at: str) -> list[Comparison]:
    better = compare.better(group, metric)
    candidates = _candidates(group, metric, contest, at)
    of_logarithm = any(_of_logarithm(record, metric) for record in group.records)
    found = _differences([pairs for _, _, pairs in candidates], of_logarithm)
    adjusted = holm([difference.p for difference in found])
    return [
        Comparison(contest.label, first, second, difference, p_holm, better)
        for (first, second, _), difference, p_holm in zip(candidates, found, adjusted, strict=True)
    ]


def _candidates(group: Group, metric: str, contest: Contest, at: str) -> list[tuple[str, str, list[Pair]]]:
    """(first, second, what to compare, a pair for each seed) of everything that may be compared."""
    out, called = unranked(group), names(group, at)
    runs: dict[str, Run] = {}  # of twins that no setting tells apart, the first
    for place in contest.places:
        by_seed = {} if place in out else _by_seed(group.records[place], metric)
        if by_seed:
            runs.setdefault(called[place], Run(called[place], by_seed))
    found, rows = [], list(runs.values())
    for place, run in enumerate(rows):
        for rival in rows[place + 1 :]:
            if pairs := _pairs(run, rival, metric):
                found.append((run.name, rival.name, pairs))
        if pairs := _pairs_with_float(run, metric):
            found.append((run.name, FLOAT, pairs))
    kinds = [_kind(pairs) for _, _, pairs in found]
    return [each for each, kind in zip(found, kinds, strict=True) if kind == kinds[0]]  # they are resampled together


def _by_seed(record: Record, metric: str) -> dict[str, tuple[Record, Values]]:
    """Of all runs that the row is made of, or nothing."""
    found = {}
    for run in record.members or (record,):
        values: Values | None = values_with(run, metric)
        if values is None or metric not in values.run or compare.value(run, metric) is None:
            return {}
        found[str(run.config.get("seed"))] = (run, values)
    return found


def _pairs(one: Run, other: Run, metric: str) -> list[Pair]:
    """A pair for each seed, or nothing where they do not pair at all of them."""
    if one.by_seed.keys() != other.by_seed.keys():
        return []
    found = []
    for seed, (record, values) in one.by_seed.items():
        rival, its = other.by_seed[seed]
        alike = scored_alike(record.metrics[metric]["passport"] or {}, rival.metrics[metric]["passport"] or {})
        if values.drawn != its.drawn or not alike or not _fit(values.run[metric], its.run[metric]):
            return []
        found.append((values.run[metric], its.run[metric]))
    return found


def _pairs_with_float(run: Run, metric: str) -> list[Pair]:
    found = []
    for _, values in run.by_seed.values():
        if metric not in values.float_model or not _fit(values.run[metric], values.float_model[metric]):
            return []
        found.append((values.run[metric], values.float_model[metric]))
    return found


def _fit(one: PerSample, other: PerSample) -> bool:
    """Whether two sets of values can lie side by side: a file made elsewhere may say what it likes of how it was drawn."""
    if len(one.values_N) != len(other.values_N) or (one.strata_N is None) != (other.strata_N is None):
        return False
    return one.yes_no == other.yes_no and bool(np.isfinite(one.values_N - other.values_N).any())


def _kind(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Seeds and samples."""
    return len(pairs), len(pairs[0][0].values_N)


def _of_logarithm(record: Record, metric: str) -> bool:
    """Whether the metric's own interval is one of its logarithm: its spread grows with it (FID)."""
    member = (record.members or (record,))[0]
    return ((member.metrics.get(metric) or {}).get("passport") or {}).get("ci_method") == INFLUENCE_OF_LOG


def _differences(candidates: Sequence[Sequence[Pair]], of_logarithm: bool) -> list[Difference]:
    """One per candidate; over seeds where it has several pairs."""
    if not candidates:
        return []
    by_seed = [differences([pairs[seed] for pairs in candidates]) for seed in range(len(candidates[0]))]
    if len(by_seed) == 1:
        return by_seed[0]
    found = differences_over_seeds(list(zip(*by_seed, strict=True)))
    if not of_logarithm or not all(is_positive(run) for pairs in candidates for pair in pairs for run in pair):
        return found
    logs = [[(logarithm(first), logarithm(second)) for first, second in pairs] for pairs in candidates]
    of_logs = [differences([pairs[seed] for pairs in logs]) for seed in range(len(by_seed))]
    tests = differences_over_seeds(list(zip(*of_logs, strict=True)))
    means = [[_mean_over_seeds(runs) for runs in zip(*pairs, strict=True)] for pairs in candidates]
    return [of_the_ratio(each, its, *both) for each, its, both in zip(found, tests, means, strict=True)]


def _mean_over_seeds(runs: Sequence[PerSample]) -> float:
    return float(np.mean([np.nanmean(run.values_N) for run in runs]))
