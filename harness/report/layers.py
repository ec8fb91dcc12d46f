"""Layers for the page: error by layer and run, by layer and denoising step, the worst layers, and plans of mixed precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare, contests
from ditbench.harness.report.compare import Group, short_names, value
from ditbench.harness.report.figures import plain
from ditbench.harness.report.frame import mib
from ditbench.harness.report.fronts import called
from ditbench.harness.report.page_files import PageFiles
from ditbench.harness.report.table import decimals_for, interval, number
from ditbench.harness.report.whole import beside

WORST = 12
FP8 = "FP8"
MOST_RUNS = 40  # columns of the heat map of runs; more are not readable
COLORBAR = {"title": {"text": "SQNR [dB]"}, "thickness": 12, "outlinewidth": 0}


def layers(group: Group, start: int, files: PageFiles) -> dict[str, Any] | None:
    """{"runs": figure, "left_out": runs not in it, "of_run": {place: name of a file {"steps", "worst"}}, "plans": […]}; None: no errors here."""
    runs = [place for place, record in enumerate(group.records) if record.layers]
    plans = [plan_of(group, place, start) for place, record in enumerate(group.records) if record.bits.get("mixed")]
    if not runs and not plans:
        return None
    of_run = {
        str(start + place): files.data(
            f"layers/{start + place}",
            {"steps": step_heatmap(group.records[place]), "worst": worst(group.records[place])},
        )
        for place in runs
    }
    left_out = max(len(runs) - MOST_RUNS, 0)
    return {"runs": layer_heatmap(group), "left_out": left_out, "of_run": of_run, "plans": plans}


def worst(record: Record) -> list[list[str]]:
    """[layer, dB, widths, backend] of the layers with the least signal to noise."""
    known = [(cell["sqnr_db"], name, cell) for name, cell in record.layers.items() if cell.get("sqnr_db") is not None]
    known.sort(key=lambda each: each[:2])
    return [
        [
            compare.printable(name, 120),
            f"{x:.1f} dB",
            label_of(record, cell),
            str(cell.get("backend") or ""),
        ]
        for x, name, cell in known[:WORST]
    ]


def plan_of(group: Group, place: int, start: int) -> dict[str, Any]:
    """A plan of mixed precision: what each layer got, what was predicted, and the uniform runs of nearly its bytes beside it."""
    record = group.records[place]
    mixed, titles = record.bits["mixed"], short_names(group.metrics)
    ranges = [f"steps {first}–{last}" for first, last in mixed.get("ranges", ())] or ["all steps"]
    chosen = {name: labels if isinstance(labels, list) else [labels] for name, labels in mixed.get("plan", {}).items()}
    budget = ", ".join(f"{name.replace('_', ' ')} ≤ {limit:g}" for name, limit in mixed.get("budget", {}).items())
    predicted = ", ".join(f"{name.replace('_', ' ')} {x:.4g}" for name, x in mixed.get("predicted", {}).items())
    errors = {str(label).upper(): x for label, x in mixed.get("uniform_errors", {}).items()}
    metrics = [name for name in compare.headline([group]) if value(record, name) is not None]
    return {
        "run": called(group, place),
        "id": start + place,
        "budget": budget,
        "predicted": predicted,
        "error": f"{mixed['predicted_error']:.3g}" if mixed.get("predicted_error") is not None else "",
        "uniform": [[label, f"{x:.3g}"] for label, x in errors.items()],
        "ranges": ranges,
        "layers": [
            [compare.printable(name, 120), *[str(label).upper() for label in labels]] for name, labels in chosen.items()
        ],
        "heads": [
            "run",
            "stored MiB",
            *[titles[name] + compare.ARROWS[compare.better(group, name)] for name in metrics],
        ],
        "rows": [_measured(group, other, metrics) for other in [place, *uniform_beside(group, place)]],
    }


def uniform_beside(group: Group, place: int) -> list[int]:
    """Runs of one width whose bytes are within 10 % of the plan's; where there are none, the next smaller and the next larger."""
    own = group.records[place].efficiency.get("model_bytes")
    sized = [
        (size, other)
        for other, record in enumerate(group.records)
        if record.status == "ok"
        and record.method == group.records[place].method
        and contests.label_bits(record) is not None
        and (size := record.efficiency.get("model_bytes"))
    ]
    if not own:
        return []
    near = [other for size, other in sized if max(size, own) <= contests.OVER * min(size, own)]
    below = [pair for pair in sized if pair[0] < own]
    above = [pair for pair in sized if pair[0] > own]
    return near or [other for _, other in [*([max(below)] if below else []), *([min(above)] if above else [])]]


def _measured(group: Group, place: int, metrics: list[str]) -> list[str]:
    record, cells = group.records[place], []
    for name in metrics:
        x, decimals = value(record, name), decimals_for(group, name)
        band = interval(x, record.metrics[name].get("ci95"), decimals) if x is not None else ""
        cells.append(f"{number(x, decimals)} {band}".strip())
    return [called(group, place), number(mib(record.efficiency.get("model_bytes"))), *cells]


def layer_heatmap(group: Group) -> dict[str, Any] | None:
    """Per-layer SQNR, first layer on top; a gap is a layer left in float, or one without any error."""
    names = [f"{name} {compare.bits_label(r)}" for r, name in zip(group.records, group.run_names, strict=True)]
    # plotly merges columns of the same name
    names = [f"{n} {r.run_id}" if names.count(n) > 1 else n for r, n in zip(group.records, names, strict=True)]
    runs = [(record, name) for record, name in zip(group.records, names, strict=True) if record.layers][:MOST_RUNS]
    layers = list(dict.fromkeys(layer for record, _ in runs for layer in record.layers))
    if not layers:
        return None
    cells = [[record.layers.get(layer, {}) for record, _ in runs] for layer in layers]
    heatmap = {
        "type": "heatmap",
        "x": [plain(name).replace(" ", "<br>") for _, name in runs],
        "y": [plain(compare.printable(layer, 80)) for layer in layers],
        "z": [[cell.get("sqnr_db") for cell in line] for line in cells],
        "customdata": [
            [_layer_note(record, cell) for (record, _), cell in zip(runs, line, strict=True)] for line in cells
        ],
        "hovertemplate": "%{y}<br>%{x}<br>%{z:.1f} dB%{customdata}<extra></extra>",
        "colorscale": "Cividis",
        "colorbar": COLORBAR,
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


def step_heatmap(record: Record) -> dict[str, Any] | None:
    """SQNR of each layer alone and of each block with all before it, over the denoising steps."""
    atlas = beside(record, "layer_errors")
    if atlas is None:
        return None
    heatmap = {
        "type": "heatmap",
        "x": [str(step) for step in atlas["steps"]],
        "y": [plain(compare.printable(str(layer), 80)) for layer in atlas["names"]],
        "z": [[round(float(cell), 1) if np.isfinite(cell) else None for cell in row] for row in atlas["sqnr_db"]],
        "hovertemplate": "%{y}<br>step %{x}<br>%{z:.1f} dB<extra></extra>",
        "colorscale": "Cividis",
        "colorbar": COLORBAR,
        "hoverongaps": False,
    }
    layout = {
        "height": min(140 + 16 * len(atlas["names"]), 1600),
        "xaxis": {"side": "top", "title": {"text": "denoising step (0 is the noisiest)"}, "type": "category"},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return {"data": [heatmap], "layout": layout}


def label_of(record: Record, cell: dict[str, Any]) -> str:
    """The layer's format. Records of before it was written down have widths only: eight bits in a run of FP8 are FP8."""
    widths = f"W{cell.get('weight_bits')}A{cell.get('act_bits')}"
    of_the_run = FP8 if compare.bits_label(record).upper() == FP8 and widths == "W8A8" else widths
    return compare.printable(str(cell.get("label") or of_the_run), 24)


def _layer_note(record: Record, cell: dict[str, Any]) -> str:
    return plain(f"\0{label_of(record, cell)}, {cell.get('backend')}").replace("\0", "<br>") if cell else ""
