"""Paired tests as lines: what a contest's ranks rest on, as the terminal, Markdown, LaTeX and the page print it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditbench.harness.report import compare, marks, paired
from ditbench.harness.report.compare import Group, short_names
from ditbench.harness.report.contests import BITS, contests, most_seeds
from ditbench.harness.report.paired import FLOAT, Comparison
from ditbench.harness.report.table import decimals_for

COLUMNS = ("ranked in", "difference", "Δ [95 %]", "p (Holm)", "p")


@dataclass(frozen=True)
class PairedTests:
    """Of one metric in one group. rows: text under COLUMNS, one per comparison, `told_apart` beside them."""

    metric: str
    title: str
    how: str
    verdicts: list[str]
    rows: list[tuple[str, ...]]
    told_apart: list[bool]


def tests(
    group: Group, metrics: Sequence[str] | None = None, at: str = BITS, bits: Sequence[str] | None = None
) -> list[PairedTests]:
    """Of the group's metrics (or those of them that are named) which have something to compare, headline ones first.

    bits: rows of runs of these labels only; what is said of their contests is of all that compete in them.
    """
    names, made = short_names(group.metrics), []
    for metric in compare.headline_first(group):
        whole = paired.comparisons(group, metric, at) if metrics is None or metric in metrics else []
        if found := paired.of_bits(group, whole, bits, at):
            contests_shown = {each.contest for each in found}
            of_contests = [each for each in whole if each.contest in contests_shown]
            title = names[metric] + (" (closeness to float)" if compare.is_closeness(group, metric) else "")
            decimals = decimals_for(group, metric) + 1
            rows = [_row(each, decimals) for each in found]
            verdicts = _verdicts(group, metric, of_contests, at)
            how = _how(group, of_contests)
            made.append(PairedTests(metric, title, how, verdicts, rows, [each.told_apart for each in found]))
    return made


def _row(each: Comparison, decimals: int) -> tuple[str, ...]:
    delta, low, high = (_signed(x, decimals) for x in (each.difference.value, *each.difference.ci95))
    p_values = _p_text(each.p_holm), _p_text(each.difference.p)
    return each.contest, f"{each.first} − {each.second}", f"{delta} [{low}, {high}]", *p_values


def _how(group: Group, found: Sequence[Comparison]) -> str:
    sizes = sorted({each.difference.n for each in found})
    n = "–".join(map(str, sizes[:: max(len(sizes) - 1, 1)]))
    seeds = most_seeds(group)
    over = f" of {seeds} seeds" if seeds > 1 else ""
    families = [sum(each.contest == contest for each in found) for contest in dict.fromkeys(e.contest for e in found)]
    holm = "–".join(map(str, sorted({min(families), max(families)})))
    p, interval = (
        _by_contest([(each.contest, how(each)) for each in found])
        for how in (lambda each: each.difference.test, lambda each: each.difference.ci_method)
    )
    return f"n = {n} pairs of samples{over}; p: {p}, Holm over {holm} comparisons; interval: {interval}"


def _by_contest(told: Sequence[tuple[str, str]]) -> str:
    """What all comparisons share is said once, else with the contests where it holds (over seeds large ones are moderated)."""
    where: dict[str, list[str]] = {}
    for contest, how in told:
        where.setdefault(how, []).append(contest)
    if len(where) == 1:
        return next(iter(where))
    return " or ".join(f"{how} ({', '.join(dict.fromkeys(labels))})" for how, labels in where.items())


def _verdicts(group: Group, metric: str, found: Sequence[Comparison], at: str) -> list[str]:
    """A line per contest: who is best and second as the tables mark it, who is behind, and where each stands to the float model."""
    lines, untested = [], marks.untested(group, metric, at)
    for contest in contests(group, at):
        its = [each for each in found if each.contest == contest.label]
        said, better = [], compare.better(group, metric)
        if its and contest.label in untested:
            said.append("nobody is ranked, since not every two runs could be tested")
        ranks = None if better == "none" else paired.ranks(group, metric, contest, at)
        if ranks is not None and not ranks.behind:
            said.append(f"nobody told apart: {', '.join(ranks.best)}")
        elif ranks is not None:
            tied = " (tied)" if len(ranks.best) > 1 else ""
            rest = [name for name in ranks.behind if name not in ranks.second]
            said.append(f"best {', '.join(ranks.best)}{tied}")
            said += _listed("second", ranks.second)
            said += _listed("behind", rest)
        to_float = [each for each in its if each.second == FLOAT]
        apart = [each for each in to_float if each.told_apart]
        if better == "none":
            said += _listed("differ from the float model:", [each.first for each in apart])
        else:
            said += _listed("better than the float model:", [each.first for each in apart if each.winner == each.first])
            said += _listed("worse than the float model:", [each.first for each in apart if each.winner == FLOAT])
        said += _listed(
            "not told apart from the float model:", [each.first for each in to_float if not each.told_apart]
        )
        lines += [f"{contest.label}: {'; '.join(said)}"] if said else []
    return lines


def _listed(words: str, names: Sequence[str]) -> list[str]:
    return [f"{words} {', '.join(names)}"] if names else []


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _signed(x: float, decimals: int) -> str:
    text = f"{abs(x):.{decimals}f}"
    return text if not text.strip("0.") else f"{'−' if x < 0 else '+'}{text}"
