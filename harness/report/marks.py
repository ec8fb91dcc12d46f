"""Best and second: what the paired tests of a contest separate, and nothing else.

Best is who no other run of the contest is told apart from as better; there may be several, tied. Where one run alone is best,
second are those that it alone is better than. Where nobody is told apart from anybody nobody is marked, and neither is anyone in a
contest whose runs cannot all be tested against each other. The float row is the reference and has no rank: beside the marks it is only
said which values the same tests do not tell apart from its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare, contests, paired
from ditbench.harness.report.compare import FLOAT_METHOD, Group

BEST, SECOND = "best", "second"


@dataclass(frozen=True)
class Verdict:
    """mark: "best" | "second" | "". inside: of the metric's noise around the float row's value; None: cannot be asked.

    tested: whether a paired test says so, and not the noise floor.
    """

    mark: str = ""
    inside: bool | None = None
    tested: bool = False


def verdicts(group: Group, metric: str, at: str = contests.BITS) -> list[Verdict]:
    """One per record of the group."""
    marks = _marks(group, metric, at)
    center = compare.float_value(group.records, metric)
    apart, out = _apart_from_float(group, metric, at), contests.unranked(group)

    def inside(place: int) -> bool | None:
        if place in out:  # not tested, and no good samples
            return None
        return not apart[place] if place in apart else _within_floor(group.records[place], metric, center)

    return [Verdict(marks.get(place, ""), inside(place), place in apart) for place in range(len(group.records))]


def untested(group: Group, metric: str, at: str = contests.BITS) -> list[str]:
    """The labels of the contests in which at least two runs have the metric, and not all of them could be tested."""
    if compare.better(group, metric) == "none":
        return []
    return [
        contest.label
        for contest in contests.contests(group, at)
        if len(paired.able(group, metric, contest, at)) > 1 and paired.ranks(group, metric, contest, at) is None
    ]


def _marks(group: Group, metric: str, at: str) -> dict[int, str]:
    if compare.better(group, metric) == "none":
        return {}
    found: dict[int, str] = {}
    without_rank = contests.unranked(group)
    for contest in contests.contests(group, at):
        ranks = paired.ranks(group, metric, contest, at)
        if ranks is None or not ranks.behind:
            continue
        marked = dict.fromkeys(ranks.best, BEST) | dict.fromkeys(ranks.second, SECOND)
        names = contests.names(group, at)
        able = [place for place in contest.places if place not in without_rank and names[place] in marked]
        found |= {place: marked[names[place]] for place in able}
    return found


def _apart_from_float(group: Group, metric: str, at: str) -> dict[int, bool]:
    """{place: whether the contest's tests tell it apart from the float model}, of the runs that were tested so."""
    told = {
        (each.contest, each.first): each.told_apart
        for each in paired.comparisons(group, metric, at)
        if each.second == paired.FLOAT
    }
    called, out = contests.names(group, at), contests.unranked(group)
    return {
        place: told[contest.label, called[place]]
        for contest in contests.contests(group, at)
        for place in contest.places
        if place not in out and (contest.label, called[place]) in told
    }


def _within_floor(record: Record, metric: str, center: float | None) -> bool | None:
    """By the noise floor that the run's record has, where nothing was kept that could be tested."""
    entry, own = record.metrics.get(metric, {}), compare.value(record, metric)
    floor = entry.get("noise_floor")
    if record.method == FLOAT_METHOD or entry.get("paired") or floor is None or own is None or center is None:
        return None
    return abs(own - center) <= floor
