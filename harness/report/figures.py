"""The plots of what to ship, as plain plotly data and layout: quality over stored size, and over measured speed-up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare
from ditbench.harness.report.compare import FLOAT_METHOD, Group, short_names, value
from ditbench.harness.report.contests import above_label
from ditbench.harness.report.frame import mib
from ditbench.harness.report.fronts import SIZE, Front, called, speedup, stored

# Okabe and Ito's colour-blind-safe colours without black and yellow: each reads on white and on near-black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FLOAT_COLOR = "#808890"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "cross", "triangle-down")
# A label's place beside its point, as plotly calls it, and how far its left end and its middle then lie from the point, in widths and heights.
POSITIONS = {"top left": (-1.0, 1.0), "bottom right": (0.0, -1.0), "top right": (0.0, 1.0), "bottom left": (-1.0, -1.0)}
POSITIONS |= {
    "middle right": (0.08, 0.0),
    "middle left": (-1.08, 0.0),
    "top center": (-0.5, 1.3),
    "bottom center": (-0.5, -1.3),
}
PLOT = (500, 340)  # of a plot on the page, in pixels, and of a letter of its labels
LETTER = (6.6, 15)


def plotted(group: Group) -> list[str]:
    """The metrics that any run has a value of; quality first, headline ones in front."""
    found = [name for name in compare.headline_first(group) if any(value(r, name) is not None for r in group.records)]
    return compare.quality_first(group, found)


def front_figure(group: Group, metric: str, front: Front) -> dict[str, Any]:
    """Colour says the method, symbol the bits; a line joins the front, a ring is round its knee; the band is the noise floor."""
    x_of = _stored_mib if front.against == SIZE else speedup
    records, look = group.records, _looks(group)
    entry = records[front.places[0]].metrics[metric]
    data = [_line(group, metric, front.front, x_of)]
    floats: list[int] = []
    if front.against == SIZE:
        floats = [
            p for p, r in enumerate(records) if r.method == FLOAT_METHOD and value(r, metric) is not None and x_of(r)
        ][:1]
    shown = [*front.front, *floats, *(place for place in front.places if place not in front.front)]
    points = [(float(x_of(records[place]) or 0.0), records[place].metrics[metric]["value"]) for place in shown]
    spots = dict(
        zip(shown, label_spots(points, [_label(group, place) for place in shown], front.against == SIZE), strict=True)
    )
    for name in dict.fromkeys(group.run_names[place] for place in [*front.places, *floats]):
        its = [place for place in [*front.places, *floats] if group.run_names[place] == name]
        data.append(_trace(group, name, its, metric, x_of, look, spots))
    if front.knee is not None:
        data.append(_ring(records[front.knee], metric, x_of))
    unit = f" [{entry['unit']}]" if entry.get("unit") else ""
    x_title = "stored model [MiB], all counted" if front.against == SIZE else "times as fast as eager bf16, measured"
    title = f"{short_names(group.metrics)[metric]}{unit}{compare.ARROWS[entry['better']]}"
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": x_title}} | ({"rangemode": "tozero"} if front.against == SIZE else {}),
        "yaxis": {"title": {"text": plain(title)}},
        "shapes": _noise_band(group, metric) + ([] if front.against == SIZE else [_AT_ONE]),
        "height": 440,
    }
    return {"data": data, "layout": layout}


def short(x: float | None) -> float | None:
    """With the digits that a plot can show."""
    return None if x is None else float(f"{x:.6g}")


def plain(text: str) -> str:
    """Text that plotly takes as it stands: it would read < as the beginning of a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def label_spots(points: Sequence[tuple[float, float]], labels: Sequence[str], from_zero: bool) -> list[str | None]:
    """Where each label stands so that it covers no point and no label before it; None: nowhere, it is shown on hover only.

    points: (x, y), the most important first. from_zero: whether the x axis starts there.
    """
    xs, ys = zip(*points, strict=True)
    left, bottom = (0.0 if from_zero else min(xs)), min(ys)
    across, up = (max(xs) - left) or 1.0, (max(ys) - bottom) or 1.0
    places = [((x - left) / across * PLOT[0], (y - bottom) / up * PLOT[1]) for x, y in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    found: list[str | None] = []
    for (x, y), label in zip(places, labels, strict=True):
        wide, high = LETTER[0] * len(label) + 8, LETTER[1]
        spot = None
        for name, (aside, above) in POSITIONS.items():
            box = (x + aside * wide, y + above * high - high / 2, x + aside * wide + wide, y + above * high + high / 2)
            inside = box[0] > -30 and box[2] < PLOT[0] + 30
            own = (x - 6, y - 6, x + 6, y + 6)
            if inside and not any(_overlap(box, other) for other in taken if other != own):
                spot = name
                taken.append(box)
                break
        found.append(spot)
    return found


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _label(group: Group, place: int) -> str:
    return called(group, place) + (" ▲" if above_label(group.records[place]) else "")


_AT_ONE = {"type": "line", "xref": "x", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1}
_AT_ONE |= {"line": {"color": FLOAT_COLOR, "width": 1, "dash": "dot"}, "layer": "below"}


def _line(group: Group, metric: str, front: Sequence[int], x_of: Callable[[Record], float | None]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [x_of(group.records[place]) for place in front],
        "y": [value(group.records[place], metric) for place in front],
        "line": {"color": FLOAT_COLOR, "width": 1.5},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _ring(record: Record, metric: str, x_of: Callable[[Record], float | None]) -> dict[str, Any]:
    marker = {"size": 22, "color": "rgba(0,0,0,0)", "line": {"color": "#C4320A", "width": 2}}
    point = {"x": [x_of(record)], "y": [value(record, metric)], "name": "knee"}
    return {"type": "scatter", "mode": "markers", "marker": marker, "hoverinfo": "skip", **point}


def _trace(
    group: Group,
    name: str,
    places: list[int],
    metric: str,
    x_of: Callable[[Record], float | None],
    look: dict[str, str],
    spots: dict[int, str | None],
) -> dict[str, Any]:
    records = [group.records[place] for place in places]
    is_float = records[0].method == FLOAT_METHOD
    runs = [key for key in look if look[key].startswith("#")]
    filling = "-open" if not is_float and runs.index(name) >= len(COLORS) else ""  # colours have come round
    ys: list[float] = [record.metrics[metric]["value"] for record in records]
    bands = [record.metrics[metric].get("ci95") or (y, y) for record, y in zip(records, ys, strict=True)]
    labels = [_label(group, place) for place in places]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": plain(f"{name} (bf16)" if is_float else name),
        "x": [short(x_of(record)) for record in records],
        "y": [short(y) for y in ys],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [short(high - y) for (_, high), y in zip(bands, ys, strict=True)],
            "arrayminus": [short(y - low) for (low, _), y in zip(bands, ys, strict=True)],
            "thickness": 1,
            "width": 3,
        },
        "marker": {
            "color": FLOAT_COLOR if is_float else look[name],
            "symbol": ["star" if is_float else look[compare.bits_label(record)] + filling for record in records],
            "size": 13 if is_float else 10,
        },
        "text": [plain(label) if spots[place] else "" for place, label in zip(places, labels, strict=True)],
        "textposition": [spots[place] or "top center" for place in places],
        "textfont": {"size": 11},
        "cliponaxis": False,
        "customdata": [plain(label) for label in labels],
        "hovertemplate": "%{customdata}<br>%{y:.4g} at %{x:.4g}<extra></extra>",
    }


def _looks(group: Group) -> dict[str, str]:
    """Run name → colour and bits → symbol, the same in every plot of a group."""
    pairs = [
        (name, compare.bits_label(record))
        for record, name in zip(group.records, group.run_names, strict=True)
        if record.method != FLOAT_METHOD
    ]
    colors = zip(sorted({name for name, _ in pairs}), itertools.cycle(COLORS), strict=False)
    symbols = zip(dict.fromkeys(bits for _, bits in pairs), itertools.cycle(SYMBOLS), strict=False)
    return dict(colors) | dict(symbols)


def _noise_band(group: Group, metric: str) -> list[dict[str, Any]]:
    """Where all runs have one floor (it came from seeds); a run's own, of its paired difference, says nothing of the others."""
    center = compare.float_value(group.records, metric)
    entries = [record.metrics.get(metric, {}) for record in group.records]
    unpaired = [entry for entry in entries if not entry.get("paired")]
    floors: list[float] = [entry["noise_floor"] for entry in unpaired if entry.get("noise_floor") is not None]
    if center is None or len(set(floors)) != 1:
        return []
    band = {"xref": "paper", "x0": 0, "x1": 1, "y0": center - floors[0], "y1": center + floors[0]}
    return [{"type": "rect", **band, "fillcolor": FLOAT_COLOR, "opacity": 0.16, "line": {"width": 0}, "layer": "below"}]


def _stored_mib(record: Record) -> float | None:
    return mib(stored(record))
