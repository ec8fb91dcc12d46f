"""The plots of the HTML report, as plain plotly data and layout: scatter per metric, and layers × runs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare
from ditbench.harness.report.compare import FLOAT_METHOD, Group, short_names, value
from ditbench.harness.report.frame import measured, mib
from ditbench.harness.report.whole import beside

# Okabe and Ito's colour-blind-safe colours without black and yellow: each reads on white and on near-black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FLOAT_COLOR = "#808890"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "cross", "triangle-down")
NOT_MEASURED = "No quantized run here was measured: all were simulated,<br>so there is no latency to plot."


def figures(group: Group) -> dict[str, Any]:
    """{metrics: [{name, title}], size: {metric: figure}, latency: {metric: figure}, layers: figure | None}."""
    names = short_names(group.metrics)
    in_order = compare.headline_first(group)
    plotted = [name for name in in_order if any(value(record, name) is not None for record in group.records)]
    plotted = compare.quality_first(group, plotted)
    return {
        "label": group.label,
        "metrics": [
            {"name": name, "title": f"{names[name]}{' (closeness to float)' * compare.is_closeness(group, name)}"}
            for name in plotted
        ],
        "size": {name: scatter(group, name, "size") for name in plotted},
        "latency": {name: scatter(group, name, "latency") for name in plotted},
        "layers": layer_heatmap(group),
        "steps": step_heatmaps(group),
    }


def scatter(group: Group, metric: str, against: str) -> dict[str, Any]:
    """Quality over stored size or latency. Colour says the method, symbol the bits; the band is the noise floor."""
    x_of = _stored_mib if against == "size" else _latency_ms
    entry = next(r.metrics[metric] for r in group.records if value(r, metric) is not None)
    runs = [
        (record, name)
        for record, name in zip(group.records, group.run_names, strict=True)
        if x_of(record) is not None and value(record, metric) is not None
    ]
    look = _looks(group)
    data = [
        _trace(name, [record for record, run in runs if run == name], metric, x_of, look)
        for name in dict.fromkeys(name for _, name in runs)
    ]
    for bits in dict.fromkeys(compare.bits_label(record) for record, _ in runs if record.method != FLOAT_METHOD):
        marker = {"color": FLOAT_COLOR, "symbol": look[bits], "size": 10}
        data.append({"x": [None], "y": [None], "name": bits, "mode": "markers", "marker": marker, "hoverinfo": "skip"})
    unit = f" [{entry['unit']}]" if entry.get("unit") else ""
    x_title = "stored model [MiB]" if against == "size" else "latency per call, median [ms]"
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": x_title}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": f"{short_names(group.metrics)[metric]}{unit}{compare.ARROWS[entry['better']]}"}},
        "shapes": _noise_band(group, metric),
    }
    if all(record.method == FLOAT_METHOD for record, _ in runs):
        text = NOT_MEASURED if against == "latency" else "No quantized run with a stored size and this metric."
        middle = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
        layout["annotations"] = [{"text": text, **middle}]
    if not runs:
        layout["xaxis"]["visible"] = layout["yaxis"]["visible"] = False
    layout["height"] = 400 + 20 * max(0, (len(data) - 6) // 2)  # room for the legend
    return {"data": data, "layout": layout}


def layer_heatmap(group: Group) -> dict[str, Any] | None:
    """Per-layer SQNR, first layer on top; a gap is a layer left in float, or one without any error."""
    names = [f"{name} {compare.bits_label(r)}" for r, name in zip(group.records, group.run_names, strict=True)]
    # plotly merges columns of the same name
    names = [f"{n} {r.run_id}" if names.count(n) > 1 else n for r, n in zip(group.records, names, strict=True)]
    runs = [(record, name) for record, name in zip(group.records, names, strict=True) if record.layers]
    layers = list(dict.fromkeys(layer for record, _ in runs for layer in record.layers))
    if not layers:
        return None
    cells = [[record.layers.get(layer, {}) for record, _ in runs] for layer in layers]
    heatmap = {
        "type": "heatmap",
        "x": [name.replace(" ", "<br>") for _, name in runs],
        "y": [compare.printable(layer, 80) for layer in layers],
        "z": [[cell.get("sqnr_db") for cell in line] for line in cells],
        "customdata": [[_layer_note(cell) for cell in line] for line in cells],
        "hovertemplate": "%{y}<br>%{x}<br>%{z:.1f} dB%{customdata}<extra></extra>",
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": "SQNR [dB]"}, "thickness": 12, "outlinewidth": 0},
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "height": min(120 + 20 * len(layers), 1600),
        "xaxis": {"side": "top", "tickangle": 0, "showgrid": False},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
    }
    return {"data": [heatmap], "layout": layout}


def step_heatmaps(group: Group) -> dict[str, dict[str, Any]]:
    """{run: figure}: SQNR of each layer alone and of each block with all before it, over the denoising steps."""
    found = {}
    for record, name in zip(group.records, group.run_names, strict=True):
        atlas = beside(record, "layer_errors")
        if atlas is None:
            continue
        found[f"{name} {compare.bits_label(record)}"] = {
            "data": [
                {
                    "type": "heatmap",
                    "x": [str(step) for step in atlas["steps"]],
                    "y": [compare.printable(str(layer), 80) for layer in atlas["names"]],
                    "z": [
                        [round(float(cell), 2) if np.isfinite(cell) else None for cell in row]
                        for row in atlas["sqnr_db"]
                    ],
                    "hovertemplate": "%{y}<br>step %{x}<br>%{z:.1f} dB<extra></extra>",
                    "colorscale": "Cividis",
                    "colorbar": {"title": {"text": "SQNR [dB]"}, "thickness": 12, "outlinewidth": 0},
                    "hoverongaps": False,
                }
            ],
            "layout": {
                "height": min(140 + 16 * len(atlas["names"]), 1600),
                "xaxis": {"side": "top", "title": {"text": "denoising step (0 is the noisiest)"}, "type": "category"},
                "yaxis": {"autorange": "reversed", "automargin": True},
            },
        }
    return found


def _trace(name: str, records: list[Record], metric: str, x_of: Any, look: dict[str, str]) -> dict[str, Any]:
    is_float = records[0].method == FLOAT_METHOD
    runs = [key for key in look if look[key].startswith("#")]
    filling = "-open" if not is_float and runs.index(name) >= len(COLORS) else ""  # colours have come round
    ys: list[float] = [record.metrics[metric]["value"] for record in records]
    bands = [record.metrics[metric].get("ci95") or (y, y) for record, y in zip(records, ys, strict=True)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{name} (bf16)" if is_float else name,
        "x": [x_of(record) for record in records],
        "y": ys,
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - y for (_, high), y in zip(bands, ys, strict=True)],
            "arrayminus": [y - low for (low, _), y in zip(bands, ys, strict=True)],
            "thickness": 1,
            "width": 3,
        },
        "marker": {
            "color": FLOAT_COLOR if is_float else look[name],
            "symbol": ["star" if is_float else look[compare.bits_label(record)] + filling for record in records],
            "size": 13 if is_float else 10,
        },
        "text": [compare.bits_label(record) for record in records],
        "hovertemplate": f"{name} %{{text}}<br>%{{y:.4g}} at %{{x:.4g}}<extra></extra>",
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
    return mib(record.efficiency.get("model_bytes"))


def _latency_ms(record: Record) -> float | None:
    return (measured(record).get("latency_ms") or {}).get("median")


def _layer_note(cell: dict[str, Any]) -> str:
    return f"<br>W{cell.get('weight_bits')}A{cell.get('act_bits')}, {cell.get('backend')}" if cell else ""
