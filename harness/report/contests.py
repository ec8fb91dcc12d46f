"""Who competes with whom: the runs of one bits label, or, since a label does not say what is stored, those of nearly equal bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditbench.harness.quant import spec
from ditbench.harness.records.record import Record
from ditbench.harness.report import compare
from ditbench.harness.report.compare import FLOAT_METHOD, Group

BITS, BYTES = "bits", "bytes"  # what runs of one contest share
OVER = 1.1  # of the least bytes in a contest, and of what a label says
FLOAT_BITS = 16
MIB = 2**20


@dataclass(frozen=True)
class Contest:
    """places: of the group's records, in the order of the table; who competes of them is not in `unranked`."""

    label: str
    places: tuple[int, ...]


def contests(group: Group, at: str = BITS) -> list[Contest]:
    """All quantized runs of a group, each in one contest (at equal bytes: those whose bytes are known).

    Equal bytes: the smallest run opens a contest for all that store at most 10 % more; the next one opens another.
    """
    places = [place for place, record in enumerate(group.records) if record.method != FLOAT_METHOD]
    if at == BITS:
        labels = {place: compare.bits_label(group.records[place]) for place in places}
        return [
            Contest(label, tuple(place for place in places if labels[place] == label))
            for label in dict.fromkeys(labels.values())
        ]
    size = {place: stored for place in places if (stored := group.records[place].efficiency.get("model_bytes"))}
    found: list[list[int]] = []
    for place in sorted(size, key=lambda place: (size[place], place)):
        if found and size[place] <= OVER * size[found[-1][0]]:
            found[-1].append(place)
        else:
            found.append([place])
    return [Contest(_sizes(size[each[0]], size[each[-1]]), tuple(each)) for each in found]


def names(group: Group, at: str = BITS) -> list[str]:
    """What each run is called in its contest: at equal bytes one method may be there with several labels."""
    if at == BITS:
        return group.run_names
    pairs = zip(group.run_names, group.records, strict=True)
    return [f"{name} {compare.bits_label(record)}" for name, record in pairs]


def unranked(group: Group) -> dict[int, str]:
    """{place: why} of the runs that have no rank, whatever their numbers: nobody is better than them, and they are better than nobody."""
    most, found = most_seeds(group), {}
    for place, record in enumerate(group.records):
        if record.method == FLOAT_METHOD:
            continue
        if record.status != "ok":
            found[place] = record.status
        elif alarms := compare.alarms(record):
            found[place] = f"samples collapsed: {', '.join(alarms)} of them"
        elif (its := len(compare.seeds(record))) < most:
            found[place] = f"{its} of {most} seeds"
    return found


def most_seeds(group: Group) -> int:
    """Of those that compete, whatever the float row has; where that is all there is, its own."""
    competing = [record for record in group.records if record.method != FLOAT_METHOD]
    return max(len(compare.seeds(record)) for record in competing or group.records)


def above_label(record: Record) -> float | None:
    """Bits per quantized weight, all that is stored with it counted, where that is over 10 % more than the label says."""
    said = label_bits(record)
    if said is None or record.method == FLOAT_METHOD:
        return None
    taken = [record.bits.get("weight_bits_quantized_layers") or 0.0]
    if compression := record.efficiency.get("compression_quantized_layers"):  # with tables of biases
        taken.append(FLOAT_BITS / compression)
    return max(taken) if max(taken) > OVER * said else None


def label_bits(record: Record) -> float | None:
    """The weights' bits by the label, scales of blocks with them; None for a mix of widths."""
    found = spec.label_bits(compare.bits_label(record))
    return None if found is None else found[0]


def in_order(group: Group, at: str = BITS) -> list[int]:
    """The places of the rows: as the group has them, or at equal bytes the float rows, then from few bytes to many."""
    if at == BITS:
        return list(range(len(group.records)))
    competing = [place for contest in contests(group, at) for place in contest.places]
    rest = [place for place in range(len(group.records)) if place not in competing]
    is_float = [place for place in rest if group.records[place].method == FLOAT_METHOD]
    return [*is_float, *competing, *(place for place in rest if place not in is_float)]


def label_of(group: Group, at: str = BITS) -> dict[int, str]:
    """{place: the label of its contest}; a row that competes with nobody is not there."""
    return {place: contest.label for contest in contests(group, at) for place in contest.places}


def _sizes(least: float, most: float) -> str:
    """Two digits at least: sizes that open a contest are 10 % apart, and no two contests may be called the same."""
    digits = max(2, 1 - math.floor(math.log10(least / MIB)))
    low, high = (f"{size / MIB:.{digits}f}" for size in (least, most))
    return f"{low} MiB" if low == high else f"{low}–{high} MiB"
