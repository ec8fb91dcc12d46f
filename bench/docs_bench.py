"""Tables of the docs about time, memory and launches, from results/bench; each function makes one (see docs_tables.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd

from ditbench.harness.bench.show import profile_lines

BENCH = Path(__file__).resolve().parent.parent / "results" / "bench"
COST = BENCH / "fit_cost-dit-xl-2-256-random.jsonl"


def fit_cost() -> str:
    runs = pd.read_json(COST, lines=True).sort_values(["blocks", "fit_s"], ascending=False)
    lines = [
        "| method | changed from its defaults | blocks | seconds | of CPU | peak GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for _, run in runs.iterrows():
        changed = ", ".join(run.set if isinstance(run.set, list) else []) or "nothing"
        cpu = "–" if pd.isna(run.cpu_s) else f"{run.cpu_s:.0f}"
        peak = run.peak_memory_bytes / 2**30
        lines.append(f"| {run.method} | {changed} | {run.blocks} | {run.fit_s:.0f} | {cpu} | {peak:.1f} |")
    return "\n".join(lines)


def step_times(name: str) -> str:
    record = json.loads((BENCH / f"{name}.json").read_text())
    errs = any("error" in row for row in record["rows"])  # to float32; records of schema 1 have none
    counts = sorted({row["rows"] for row in record["rows"]})
    lines = [
        f"| format | backend | mode | {'rows | ' if counts[1:] else ''}step, ms | against bf16 | {'error | ' if errs else ''}transformer held, MiB |",
        f"| --- | --- | --- | {'---: | ' if counts[1:] else ''}---: | ---: | {'---: | ' if errs else ''}---: |",
    ]
    for row in record["rows"]:
        held = "–" if row["held_bytes"] is None else f"{row['held_bytes'] / 2**20:.0f}"
        speedup = "–" if row["speedup"] is None else f"{row['speedup']:.2f}×"
        if errs:
            held = f"{row['error']:.3f} | {held}"
            speedup += f" {row['baseline'].removeprefix('bf16 ')}" if row["baseline"] else ""
        step = f"{row['rows']} | " if counts[1:] else ""
        median = row["latency_ms"]["median"]
        step += f"{median:.0f}" if median >= 10 else f"{median:.1f}"
        lines.append(f"| {row['format']} | `{row['backend']}` | {row['mode']} | {step} | {speedup} | {held} |")
    changed = " ".join(each for each in record.get("overrides", ()) if not each.startswith(("model=", "method=")))
    lines += [
        "",
        f"{record['model']}{changed and f' with `{changed}`'}, {', '.join(map(str, counts))} rows, {record['env']['device']}, medians; `results/bench/{name}.json`.",
    ]
    lines += [f"{what} did not run: {why}." for what, why in record["refused"].items()]
    return "\n".join(lines)


def profile(name: str) -> str:
    """A line for each part, and for each node that takes a hundredth of a call somewhere."""
    record = json.loads((BENCH / f"{name}.json").read_text())
    found = record["profile"]
    labels = list(found["of"])
    lines = [["part", "node", *labels], ["---", "---", *["---:"] * len(labels)]]
    for part, times, nodes in profile_lines(found):
        for title, node, each in [(f"**{part}**", "", times), *(("", f"`{node}`", each) for node, each in nodes)]:
            lines.append([title, node, *(f"{each[label]:.2f}" if each[label] else "–" for label in labels)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{text}\n\nms of a call of {found['rows']} rows, all its blocks; of each node the least of {found['calls']} profiled calls, none of them of those "
        f"that are timed; {record['env']['device']}; `results/bench/{name}.json`."
    )


def launches() -> str:
    """A line for each block, number of tokens and format; before → now, and bf16 before them."""
    record = json.loads((BENCH / "launches.json").read_text())
    found: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault((row["block"], row["tokens"], row["format"]), {})[row["design"]] = row
    lines = [
        "| block | image tokens | format | launches | of which rows | products | MiB moved | of which rows |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (block, tokens, label), designs in found.items():

        def cell(tell: Callable[[dict[str, Any]], float], designs: dict[str, dict[str, Any]] = designs) -> str:
            return " → ".join(f"{tell(row):,.0f}" for row in designs.values())

        cells = [
            cell(lambda row: sum(row["launches"].values())),
            cell(lambda row: row["launches"].get("rows", 0)),
            f"{list(designs.values())[-1]['launches']['products']}",
            cell(lambda row: sum(row["bytes"].values()) / 2**20),
            cell(lambda row: row["bytes"].get("rows", 0) / 2**20),
        ]
        lines.append(f"| {block} | {tokens:,} | {label.upper()} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"Counted {record['counted']}; torch {record['torch']}; `results/bench/launches.json`."]
    )


def overhead(*names: str) -> str:
    """A line for each part, and those of the bar; of wall time / of CPU time."""
    found = [json.loads((BENCH / f"overhead-{name}.json").read_text()) for name in names]
    lines = [["part", *(work_of(each["command"]) for each in found)], ["---", *["---:"] * len(found)]]

    def add(title: str, told: Callable[[dict[str, Any], str], str], name: str) -> None:
        lines.append([title, *(" / ".join(told(each[clock], name) for clock in ("wall", "cpu")) for each in found)])

    for part in sorted({part for each in found for clock in ("wall", "cpu") for part in each[clock]["seconds"]}):
        add(part, lambda clock, name: f"{clock['seconds'].get(name, 0) / clock['total_s']:.1%}", part)
    for name in ("harness", "harness_without_start"):
        add(f"**{name.replace('_', ' ')}**", lambda clock, name: f"{clock[name]:.1%}", name)
    for title, name in (
        ("whole, s", "total_s"),
        ("start, s", "start_s"),
        ("5 % from this length on, s", "below_bar_from_s"),
    ):
        add(title, lambda clock, name: f"{clock[name]:.0f}" if name in clock else "never", name)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    devices = ", ".join(sorted({each["device"] for each in found}))
    return f"{text}\n\nOf wall time / of CPU time. {devices}; other work ran beside it: what waits for a core is in wall time."


def work_of(command: list[str]) -> str:
    """Such as "tiny-t2i, n = 768, 6 runs"."""
    values = dict(argument.split("=", 1) for argument in command if "=" in argument)
    runs = prod(len(value.split(",")) for value in values.values()) if "-m" in command else 1
    return f"{values['model']}, n = {int(values['protocol.n']):,}, {runs} run{'s' * (runs > 1)}"
