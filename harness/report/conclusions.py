"""What a sweep says, in at most three sentences a group: who stays closest, whose quality suffers, what the smallest good model is.

Each is computed from the paired tests behind the marks (`paired.py`) and says no more than they do: who was not told apart is called
so, and runs without a rank (failed, collapsed, with too few seeds) are no part of a comparison; that they collapsed is said. Where
there is nothing to compare nothing is said.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from scipy.stats import t

from ditbench.eval.paired_differences import Difference
from ditbench.harness.report import compare, paired
from ditbench.harness.report.compare import FLOAT_METHOD, Group, value
from ditbench.harness.report.contests import Contest, contests, label_bits, unranked
from ditbench.harness.report.fronts import called, speedup, stored
from ditbench.harness.report.paired import ALPHA, FLOAT
from ditbench.harness.report.table import decimals_for, number

WIDTH = 120  # longer lines are hard to read
MARGIN_DB = 1.0  # so near counts as "within"
PLAINEST = "rtn"  # what is had without a method: at the most bits, what smaller models are held against
HEAD = f"In words, as far as paired tests carry ({100 * ALPHA:g} %, corrected for their number):"
PLAIN = {"fid": "FID", "kid": "KID", "psnr": "PSNR", "ssim": "SSIM", "sqnr": "SQNR", "lpips": "LPIPS"}
PLAIN |= {"accuracy": "the share of the right class", "overall": "the share that follows the prompt"}
PLAIN |= {"direction": "the share that moves as asked"}


def conclusions(group: Group) -> list[str]:
    """The sentences that hold; none where no two runs can be compared."""
    return [said for said in (_closest(group), _quality(group), _smallest(group)) if said]


def printed(groups: Sequence[Group], width: int | None = None) -> str:
    """As they stand under a table in a terminal, WIDTH columns at most; "" where there are none."""
    width = min(width or WIDTH, WIDTH)
    said = [(group, found) for group in groups if (found := conclusions(group))]
    lines = textwrap.wrap(HEAD, width) if said else []
    for group, found in said:
        if len(groups) > 1:
            lines.append(textwrap.shorten(group.label, width, placeholder="…"))
        lines += [textwrap.fill(f"  {each}", width, subsequent_indent="    ", break_on_hyphens=False) for each in found]
    return "\n".join(lines)


def plain_name(group: Group, metric: str) -> str:
    """FID for torchmetrics/fid_judge: the word that papers use, where there is one."""
    name = compare.short_names(group.metrics)[metric]
    return PLAIN.get(re.sub("_(judge|alex|vgg)$", "", metric.rsplit("/", 1)[-1]), name)


def _closest(group: Group) -> str:
    """At the fewest bits at which runs were tested against each other: who is nearest to the float model, and who is furthest behind."""
    collapsed = _collapsed(group)
    metric = _first(group, closeness=True)
    found = _fewest_bits(group, metric) if metric else None
    if metric is None or found is None:
        return f"{collapsed}." if collapsed else ""
    contest, ranks = found
    name = plain_name(group, metric)
    if not ranks.behind:
        said = f"At {contest.label} the tests do not tell {_and(ranks.best)} apart in {name}"
        return "; ".join(filter(None, (said, collapsed))) + "."
    of = {group.run_names[place]: value(group.records[place], metric) for place in reversed(contest.places)}
    better = compare.better(group, metric)
    order = sorted(ranks.best, key=lambda run: of[run], reverse=better == "higher")
    best = f"{order[0]} stays" if len(order) == 1 else f"{_and(order)} stay"
    tied = ", not told apart" if len(order) > 1 else ""
    values = _valued(group, metric, *(of[run] for run in order))
    said = [f"At {contest.label} {best} closest to the float model ({values}{tied})"]
    said += [behind] if (behind := _furthest(group, metric, contest, order[0], ranks.behind, of)) else []
    return "; ".join([*said, *([collapsed] if collapsed else [])]) + "."


def _quality(group: Group) -> str:
    """Of how good the samples are: which runs the tests call worse than the float model, and which better."""
    metric = _first(group, closeness=False)
    tests = [each for each in paired.comparisons(group, metric) if each.second == FLOAT] if metric else []
    if metric is None or not tests:
        return ""
    name = plain_name(group, metric)
    worse = [each for each in tests if each.winner == FLOAT]
    better = [each for each in tests if each.winner == each.first]
    if not worse and not better:
        return f"In {name} the tests tell no tested run from the float model."
    said = [
        f"{words} than the float model: {_by_label(its)}"
        for words, its in (("worse", worse), ("better", better))
        if its
    ]
    if len(worse) + len(better) < len(tests):
        said.append("the tests do not tell the other tested runs from it")
    return f"In {name}, {'; '.join(said)}."


def _smallest(group: Group) -> str:
    """The smallest run shown to lose at most MARGIN_DB against plain rounding at the most bits (where that is not here, the best there).

    Shown: the lower end of its paired interval does, one-sided at 2.5 %, after Bonferroni over all smaller runs, since the smallest
    is sought among them.
    """
    metric = _first(group, closeness=True)
    if metric is None or compare.better(group, metric) != "higher" or _unit(group, metric) != "dB":
        return ""
    out = unranked(group)
    able = [
        place
        for place, record in enumerate(group.records)
        if record.method != FLOAT_METHOD and place not in out and value(record, metric) is not None and stored(record)
    ]
    reference = _reference(group, metric, able)
    if reference is None:
        return ""
    size = {place: float(stored(group.records[place]) or 0.0) for place in able}
    smaller = [place for place in able if size[place] < size[reference]]
    lost = {place: found for place in smaller if (found := paired.between(group, metric, place, reference)) is not None}
    if not lost:
        return ""
    within = [p for p, found in lost.items() if _least(found, len(lost)) > -MARGIN_DB]
    it = f"{called(group, reference)} ({_valued(group, metric, value(group.records[reference], metric))})"
    if within:
        chosen = min(within, key=lambda place: (size[place], -lost[place].value))
        return f"The smallest model within {MARGIN_DB:g} dB of {it} is {_priced(group, metric, chosen, reference, lost[chosen])}."
    nearest = max(lost, key=lambda place: lost[place].value)
    return (
        f"No smaller model is shown to be within {MARGIN_DB:g} dB of {it}; "
        f"nearest is {_priced(group, metric, nearest, reference, lost[nearest])}."
    )


def _reference(group: Group, metric: str, able: Sequence[int]) -> int | None:
    widths = {place: label_bits(group.records[place]) or 0 for place in able}
    widest = [place for place in able if widths[place] == max(widths.values())]
    if not widest:
        return None
    label = compare.bits_label(group.records[widest[0]])  # of these the one with most bits for activations
    there = [place for place in widest if compare.bits_label(group.records[place]) == label]
    plain = [place for place in there if group.records[place].method == PLAINEST]
    return max(plain or there, key=lambda place: value(group.records[place], metric) or 0.0)


def _first(group: Group, *, closeness: bool) -> str | None:
    """The first headline metric of that kind which ranks."""
    return next(
        (
            name
            for name in compare.headline([group])
            if compare.is_closeness(group, name) == closeness and compare.better(group, name) != "none"
        ),
        None,
    )


def _fewest_bits(group: Group, metric: str) -> tuple[Contest, paired.Ranks] | None:
    tested = [(each, ranks) for each in contests(group) if (ranks := paired.ranks(group, metric, each)) is not None]
    width = [label_bits(group.records[contest.places[0]]) or 99 for contest, _ in tested]  # a mix of widths comes last
    return next((each for each, its in zip(tested[::-1], width[::-1], strict=True) if its == min(width)), None)


def _furthest(
    group: Group, metric: str, contest: Contest, best: str, behind: Sequence[str], of: Mapping[str, float]
) -> str:
    """rtn is 6.3 dB behind it [5.9, 6.7], if the tests tell the two apart; the interval is of this pair alone."""
    sign = 1.0 if compare.better(group, metric) == "higher" else -1.0
    last = min(behind, key=lambda run: sign * of[run])
    for each in paired.comparisons(group, metric):
        if each.contest == contest.label and {each.first, each.second} == {best, last} and each.winner == best:
            decimals, turned = decimals_for(group, metric), each.first == best
            low, high = sorted((sign if turned else -sign) * end for end in each.difference.ci95)
            unit = f" {_unit(group, metric)}" if _unit(group, metric) else ""
            size = number(abs(each.difference.value), decimals)
            return f"{last} is {size}{unit} behind {best} [{number(low, decimals)}, {number(high, decimals)}]"
    return ""


def _collapsed(group: Group) -> str:
    """rtn W4A4 collapsed (blank 38% of samples) and has no rank."""
    found = [
        (called(group, place), ", ".join(alarms))
        for place, record in enumerate(group.records)
        if record.status == "ok" and record.method != FLOAT_METHOD and (alarms := compare.alarms(record))
    ]
    if not found:
        return ""
    return f"{_and([f'{name} ({alarms})' for name, alarms in found])} collapsed and {'has' if len(found) == 1 else 'have'} no rank"


def _priced(group: Group, metric: str, place: int, reference: int, lost: Difference) -> str:
    """svdquant W4A8: 0.55 × its bytes, −0.42 dB [−0.50, −0.35], 1.13 × as fast as eager bf16."""
    record, decimals = group.records[place], decimals_for(group, metric)
    ratio = float(stored(record) or 0.0) / float(stored(group.records[reference]) or 1.0)
    low, high = (_signed(end, decimals) for end in lost.ci95)
    said = [f"{number(ratio)} × its bytes", f"{_signed(lost.value, decimals)} dB [{low}, {high}]"]
    times = speedup(record)
    if times and not record.efficiency.get("timed_beside"):
        said.append(f"{number(times)} × as fast as eager bf16")
    return f"{called(group, place)}: {', '.join(said)}"


def _least(found: Difference, candidates: int) -> float:
    """The lower end of the interval, widened for as many candidates as there are."""
    half = (found.ci95[1] - found.ci95[0]) / 2
    return found.value - half * float(t.isf(0.025 / candidates, found.freedom) / t.isf(0.025, found.freedom))


def _by_label(tests: Sequence[paired.Comparison]) -> str:
    by: dict[str, list[str]] = {}
    for each in tests:
        by.setdefault(each.contest, []).append(each.first)
    return ", ".join(f"{_and(names)} at {label}" for label, names in by.items())


def _valued(group: Group, metric: str, *values: float | None) -> str:
    """PSNR 25.00 and 24.91 dB."""
    unit = f" {_unit(group, metric)}" if _unit(group, metric) else ""
    numbers = [number(x, decimals_for(group, metric)) for x in values]
    return f"{plain_name(group, metric)} {_and(numbers)}{unit}"


def _unit(group: Group, metric: str) -> str:
    return next((record.metrics[metric].get("unit") or "" for record in group.records if metric in record.metrics), "")


def _signed(x: float, decimals: int) -> str:
    return f"{'−' if x < 0 else '+'}{abs(x):.{decimals}f}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
