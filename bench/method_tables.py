"""The tables of docs/methods.md, from the recorded sweeps in results/tiny-dit-stress/*.csv.

    ditbench report --over-seeds --format csv --experiment w4a4 --out results/tiny-dit-stress/w4a4.csv
    ditbench report --format csv --experiment w4a4 --out results/tiny-dit-stress/w4a4.seeds.csv
    python bench/method_tables.py                 # writes the tables between the markers <!-- table: NAME --> and <!-- end -->; --check only compares

Numbers are means over seeds with 95 % intervals (Student's t). Rows are in the order of PSNR. A line between
<!-- paired: NAME, METRIC, RUN, RUN --> and <!-- end --> is the difference of two rows, seed by seed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

from harness.report.seeds import t_interval

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "results" / "tiny-dit-stress"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAIRED = re.compile(
    r"(<!-- paired: (?P<name>[\w-]+), (?P<metric>[\w/]+), (?P<one>.+?), (?P<other>.+?) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
COST = ROOT / "results" / "bench" / "fit_cost-dit-xl-2-256-random.jsonl"
FIT = re.compile(r"(<!-- fit cost -->\n).*?(<!-- end -->)", re.DOTALL)
FID = "torchmetrics/fid_judge"
COLUMNS = {FID: ("FID (judge) ↓", 1), "psnr": ("PSNR dB ↑", 2), "ssim": ("SSIM ↑", 4), "accuracy": ("recognised ↑", 3)}


def main() -> None:
    page = PAGE.read_text()
    filled = MARKED.sub(lambda match: f"{match[1]}{table(match['name'])}\n{match[3]}", page)
    filled = PAIRED.sub(lambda m: f"{m[1]}{difference(m['name'], m['metric'], m['one'], m['other'])}\n{m[6]}", filled)
    filled = FIT.sub(lambda m: f"{m[1]}{fit_cost()}\n{m[2]}", filled)
    if "--check" not in sys.argv:
        PAGE.write_text(filled)
    elif filled != page:
        sys.exit("docs/methods.md does not show what results/tiny-dit-stress says; run python bench/method_tables.py")


def table(name: str) -> str:
    runs = pd.read_csv(RESULTS / f"{name}.csv")
    runs = runs[runs.status == "ok"].sort_values("psnr", ascending=False)
    heads = ["method", "weight bits, effective", *(title for title, _ in COLUMNS.values()), "fit s", "fit peak MiB"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for _, run in runs.iterrows():
        cells = [run["run"], f"{run.weight_bits_effective:.2f}"]
        cells += [with_interval(run, metric, decimals) for metric, (_, decimals) in COLUMNS.items()]
        lines.append([*cells, f"{run.fit_s:.0f}", f"{run.fit_peak_memory_mib:.0f}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{caption(runs)}"


def difference(name: str, metric: str, one: str, other: str) -> str:
    runs = pd.read_csv(RESULTS / f"{name}.seeds.csv").set_index("seed")
    first, second = (runs[runs.run == run][metric] for run in (one, other))
    steps = (first - second).dropna()
    low, high = t_interval(steps.tolist())
    title, decimals = COLUMNS[metric]
    return (
        f"{one} − {other}, {title.split()[0]}: {steps.mean():+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}] "
        f"over {len(steps)} seeds, paired."
    )


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


def with_interval(run: pd.Series, metric: str, decimals: int) -> str:
    half = (run[f"{metric}.ci95_high"] - run[f"{metric}.ci95_low"]) / 2
    inside = " ~" if run.get(f"{metric}.inside_noise_floor") is True else ""
    return f"{run[metric]:.{decimals}f} ± {half:.{decimals}f}{inside}"


def caption(runs: pd.DataFrame) -> str:
    first = runs.iloc[0]
    seeds = len(str(first.seed).split(","))
    over = f"over {seeds} seeds" if seeds > 1 else "over bootstrap resamples"
    return (
        f"{first.model}, n = {first.n:,} images × {seeds} seed{'s' * (seeds > 1)}, {first.steps} steps, guidance {first.guidance}; "
        f"95 % intervals {over}; ~: inside the noise floor; {first.device}, commit {first.commit[:7]}."
    )


if __name__ == "__main__":
    main()
