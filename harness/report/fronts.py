"""What to ship: who stores the fewest bytes, or runs fastest, for its quality; and the run after which more of either buys little.

A run is on the front if no other is at least as good in quality and in bytes (or speed), and better in one of them. The knee is the
run of the front that lies highest above the straight line between the front's ends, both axes scaled to 0…1 (Satopää et al. 2011,
"Finding a 'Kneedle' in a Haystack"); where none lies KNEE above it there is no knee. Fronts are of values as measured: that two of
their runs cannot be told apart is said by the interval of their difference. Runs without a rank (failed, collapsed) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare, contests
from ditbench.harness.report.compare import FLOAT_METHOD, Group, value
from ditbench.harness.report.frame import measured, mib
from ditbench.harness.report.paired import between, comparisons
from ditbench.harness.report.table import decimals_for, number

SIZE, SPEED = "size", "speed"
KNEE = 0.1  # of the height of the plot; less is a straight line


@dataclass(frozen=True)
class Front:
    """places: all runs that compete; front: those on it, from the cheapest (fewest bytes, fastest) to the best; all of the group.

    against: SIZE or SPEED. device: of SPEED, where it was measured. sentences: what follows, in words. left_out: a line each.
    """

    against: str
    device: str
    places: list[int]
    front: list[int]
    knee: int | None
    sentences: list[str]
    left_out: list[str]


def fronts(group: Group, metric: str) -> list[Front]:
    """One of size, and one of speed for each device on which runs were timed; none of a metric that ranks nobody."""
    if compare.better(group, metric) == "none":
        return []
    out = contests.unranked(group)
    able = [
        place
        for place, record in enumerate(group.records)
        if record.method != FLOAT_METHOD and place not in out and value(record, metric) is not None
    ]
    left_out = [f"{called(group, place)}: {why}" for place, why in out.items()]
    sized = [place for place in able if stored(group.records[place])]
    found = [_front(group, metric, SIZE, "", sized, left_out)] if sized else []
    timed = [place for place in able if speedup(group.records[place])]
    for device in sorted({device_of(group.records[place]) for place in timed}):
        here = [place for place in timed if device_of(group.records[place]) == device]
        found.append(_front(group, metric, SPEED, device, here, left_out))
    return found


def stored(record: Record) -> float | None:
    return record.efficiency.get("model_bytes")


def speedup(record: Record) -> float | None:
    """Times as fast as eager bf16, where a kernel was timed."""
    return measured(record).get("speedup")


def device_of(record: Record) -> str:
    return compare.printable(str(record.efficiency.get("device") or "device not recorded"))


def called(group: Group, place: int) -> str:
    return f"{group.run_names[place]} {compare.bits_label(group.records[place])}"


def on_front(cost_N: Sequence[float], quality_N: Sequence[float]) -> list[int]:
    """Who is on the front, from the least cost to the most; of runs that are equal in both the first."""
    order = sorted(range(len(cost_N)), key=lambda i: (cost_N[i], -quality_N[i]))
    found: list[int] = []
    for i in order:
        if not found or quality_N[i] > quality_N[found[-1]]:
            found.append(i)
    return found


def knee_of(cost_F: Sequence[float], quality_F: Sequence[float]) -> int | None:
    """The place on a front, ordered by cost, that lies highest above the line between its ends."""
    if len(cost_F) < 3 or cost_F[-1] == cost_F[0] or quality_F[-1] == quality_F[0]:
        return None
    heights = [
        (quality - quality_F[0]) / (quality_F[-1] - quality_F[0]) - (cost - cost_F[0]) / (cost_F[-1] - cost_F[0])
        for cost, quality in zip(cost_F, quality_F, strict=True)
    ]
    highest = max(range(len(heights)), key=heights.__getitem__)
    return highest if heights[highest] >= KNEE else None


def _front(group: Group, metric: str, against: str, device: str, places: list[int], left_out: list[str]) -> Front:
    sign = 1.0 if compare.better(group, metric) == "higher" else -1.0
    quality = [sign * float(value(group.records[place], metric) or 0.0) for place in places]
    cost = [float((stored if against == SIZE else _slowness)(group.records[place]) or 0.0) for place in places]
    front = on_front(cost, quality)
    bend = knee_of([cost[i] for i in front], [quality[i] for i in front])
    its = [places[i] for i in front]
    alike = _not_told_apart(group, metric, its[-1 if bend is None else bend], places)
    return Front(
        against,
        device,
        places,
        its,
        None if bend is None else its[bend],
        [*_sentences(group, metric, against, device, its, bend), *alike],
        left_out,
    )


def _not_told_apart(group: Group, metric: str, place: int, places: Sequence[int]) -> list[str]:
    """By the paired tests of its contest (Holm), the same that marks come from."""
    name = group.run_names[place]
    label = compare.bits_label(group.records[place])
    pairs = [each for each in comparisons(group, metric) if each.contest == label and not each.told_apart]
    rivals = {each.first if each.second == name else each.second for each in pairs if name in (each.first, each.second)}
    known = {group.run_names[other] for other in places if compare.bits_label(group.records[other]) == label}
    alike = sorted(rivals & known)
    if not alike:
        return []
    title = compare.short_names(group.metrics)[metric]
    return [f"In {title} {called(group, place)} is not told apart from {', '.join(alike)} at these bits."]


def _slowness(record: Record) -> float:
    return -float(speedup(record) or 0.0)


def _sentences(group: Group, metric: str, against: str, device: str, front: list[int], bend: int | None) -> list[str]:
    what = {SIZE: "size", SPEED: f"speed on {device}"}[against]
    extreme = {SIZE: "smallest", SPEED: "fastest"}[against]
    if len(front) == 1:
        return [f"By {what}, one run is both {extreme} and best: {_described(group, metric, against, front[0])}."]
    if bend is None:
        ends = f"{extreme} is {_described(group, metric, against, front[0])}; best is {_described(group, metric, against, front[-1])}"
        return [f"By {what}, no run stands out between the {extreme} and the best: {ends}."]
    place = front[bend]
    said = [f"By {what}, the knee is {_described(group, metric, against, place)}."]
    if bend + 1 < len(front):
        said.append(_step(group, metric, against, front[bend + 1], place, {SIZE: "larger", SPEED: "slower"}[against]))
    if bend:
        said.append(_step(group, metric, against, front[bend - 1], place, {SIZE: "smaller", SPEED: "faster"}[against]))
    return said


def _described(group: Group, metric: str, against: str, place: int) -> str:
    """quarot W4A8 (0.52 MiB, 3.8 × smaller than bf16; psnr 24.31 [23.90, 24.70] dB)."""
    record = group.records[place]
    entry, decimals = record.metrics[metric], decimals_for(group, metric)
    name, unit = compare.short_names(group.metrics)[metric], f" {entry['unit']}" if entry.get("unit") else ""
    band = " [{}, {}]".format(*(number(end, decimals) for end in entry["ci95"])) if entry.get("ci95") else ""
    if against == SIZE:
        ratio = record.efficiency.get("compression")
        cost = f"{number(mib(stored(record)))} MiB" + (f", {number(ratio, 1)} × smaller than bf16" if ratio else "")
    else:
        times = float(speedup(record) or 0.0)
        cost = f"{number(times)} × as fast as eager bf16" + (", slower than bf16" if times < 1 else "")
    above = contests.above_label(record)
    flag = f"; ▲ {number(above)} bits a weight, more than its label says" if above else ""
    return f"{called(group, place)} ({cost}; {name} {number(entry['value'], decimals)}{band}{unit}{flag})"


def _step(group: Group, metric: str, against: str, other: int, place: int, word: str) -> str:
    """What the next run of the front gives for what it takes, with the paired interval."""
    decimals = decimals_for(group, metric)
    entry = group.records[place].metrics[metric]
    unit = f" {entry['unit']}" if entry.get("unit") else ""
    cost_of = stored if against == SIZE else speedup
    times = float(cost_of(group.records[other]) or 0.0) / float(cost_of(group.records[place]) or 1.0)
    cost = f"{number(times)} × the {'bytes' if against == SIZE else 'speed'}"
    found = between(group, metric, other, place)
    plain = group.records[other].metrics[metric]["value"] - entry["value"]
    delta = found.value if found is not None else plain
    if found is None:
        certain = "no interval: their samples do not pair"
    else:
        certain = "95 % interval of this pair alone [{}, {}]".format(*(_signed(end, decimals) for end in found.ci95))
        certain += "" if found.ci95[0] > 0 or found.ci95[1] < 0 else ", so it may be no difference"
    name = compare.short_names(group.metrics)[metric]
    return (
        f"The next {word}, {called(group, other)}, has {cost} and {name} {_signed(delta, decimals)}{unit} ({certain})."
    )


def _signed(x: float, decimals: int) -> str:
    return f"{'−' if x < 0 else '+'}{abs(x):.{decimals}f}"
