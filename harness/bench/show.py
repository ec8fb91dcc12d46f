"""A benchmark's record as a table, and as a plot beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditbench.harness.bench.profiles import PARTS
from ditbench.harness.common.text_table import table

COLORS = {"eager": "#0072B2", "compiled": "#D55E00", "graph": "#009E73"}  # Okabe and Ito's, as in the report


def shown(record: dict[str, Any]) -> str:
    """Text: latencies, shares, components and the roofline."""
    env = record["env"]
    parts = [f"{record['model']}, {record['method']}, {env['device']}, torch {env['packages']['torch']}"]
    rows = [
        (
            *(row["format"], row["mode"], row["backend"], str(row["rows"])),
            "{median:.1f} ({p10:.1f}–{p90:.1f})".format(**row["latency_ms"]),
            f"{row['speedup']:.2f}× {row['baseline'].removeprefix('bf16 ')}" if row["speedup"] else "–",
            f"{row['error']:.4f}",
            _mib(row["held_bytes"]),
            _mib(row["peak_bytes"]),
        )
        for row in record["rows"]
    ]
    header = ("format", "mode", "by", "rows", "step [ms] median (p10–p90)", "vs bf16", "error", "held", "peak")
    parts.append(table(header, rows))
    parts.append("vs bf16: which bf16 of the same turns. error: of the prediction to float32, relative.")
    parts += [f"{name} did not run: {why}" for name, why in record["refused"].items()]
    for label, found in record["shares"].items():
        parts.append(f"{label} eager: " + ", ".join(f"{name} {share:.0%}" for name, share in found.items()))
    if (profile := record.get("profile")) and _beside_others(record):
        parts.append(profile_table(profile))
    for label, found in record["components"].items():
        parts.append(f"{label}, one sample: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in found.items()))
    if peaks := record["roofline"]:
        parts.append("measured peaks: " + ", ".join(f"{name} {value:.3g}" for name, value in peaks.items()))
    return "\n\n".join(parts)


def _beside_others(record: dict[str, Any]) -> bool:
    """Node by node there is something to compare; else the page has it. What other engines hold is not known."""
    others = {row["format"] for row in record["rows"] if row["held_bytes"] is None}
    return bool(others & record["profile"]["of"].keys())


def profile_table(profile: dict[str, Any]) -> str:
    """A line for each part, and under it one for each node that is of use: ms of every format's call, and of the whole."""
    of = profile["of"]
    totals = {label: sum(sum(nodes.values()) for nodes in parts.values()) for label, parts in of.items()}

    def cells(times: dict[str, float]) -> list[str]:
        return [f"{times[label]:.2f} ({times[label] / totals[label]:.0%})" if times[label] else "–" for label in of]

    lines = []
    for part, times, nodes in profile_lines(profile):
        lines.append((part, *cells(times)))
        lines += [(f"  {node}", *cells(each)) for node, each in nodes]
    text = table((f"ms of a call of {profile['rows']} rows", *of), lines)
    return f"{text}\n\nThe least of {profile['calls']} profiled calls, of each node. A product has in it what was fused into it."


def profile_lines(
    profile: dict[str, Any], least_share: float = 0.01
) -> Iterator[tuple[str, dict[str, float], list[tuple[str, dict[str, float]]]]]:
    """(part, {format: ms}, [(node, {format: ms})]): nodes that take `least_share` of a call somewhere."""
    of = profile["of"]
    totals = {label: sum(sum(nodes.values()) for nodes in parts.values()) for label, parts in of.items()}
    for part in dict.fromkeys(part for name in PARTS for parts in of.values() for part in parts if part == name):
        spent = {label: parts.get(part, {}) for label, parts in of.items()}
        nodes = dict.fromkeys(node for each in spent.values() for node in each)
        told = [(node, {label: each.get(node, 0.0) for label, each in spent.items()}) for node in nodes]
        worth = [(n, each) for n, each in told if any(ms >= least_share * totals[label] for label, ms in each.items())]
        yield part, {label: sum(each.values()) for label, each in spent.items()}, worth


def plot(record: dict[str, Any], path: Path) -> None:
    """Bars of the median latency by format, one colour per mode, one panel per batch; a page of its own."""
    from plotly.graph_objects import Bar
    from plotly.subplots import make_subplots

    batches = sorted({row["rows"] for row in record["rows"]})
    figure = make_subplots(rows=1, cols=len(batches), subplot_titles=[f"{batch} rows" for batch in batches])
    for column, batch in enumerate(batches, 1):
        for mode, color in COLORS.items():
            rows = [row for row in record["rows"] if (row["rows"], row["mode"]) == (batch, mode)]
            if not rows:
                continue
            bars = Bar(
                x=[row["format"] for row in rows],
                y=[row["latency_ms"]["median"] for row in rows],
                text=[f"{row['speedup']:.2f}×" if row["speedup"] else "" for row in rows],
                name=mode,
                marker_color=color,
                showlegend=column == 1,
            )
            figure.add_trace(bars, row=1, col=column)
    title = f"{record['model']}: one denoising step [ms] on {record['env']['device']}; numbers: against bf16, eager for graphs"
    figure.update_layout(title=title, barmode="group", template="plotly_white")
    figure.write_html(path, include_plotlyjs=True)


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f} MiB"
