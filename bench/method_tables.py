"""The tables of docs/methods.md, from the recorded sweeps in results/tiny-dit-stress/*.csv.

    ditbench report --over-seeds --format csv --experiment w4a4 --out results/tiny-dit-stress/w4a4.csv
    python bench/method_tables.py                 # writes the tables between the markers <!-- table: NAME --> and <!-- end -->; --check only compares

Numbers are means over seeds with 95 % intervals (Student's t). Rows are in the order of PSNR.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "results" / "tiny-dit-stress"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FID = "torchmetrics/fid_judge"
COLUMNS = {FID: ("FID (judge) ↓", 1), "psnr": ("PSNR dB ↑", 2), "ssim": ("SSIM ↑", 4), "accuracy": ("recognised ↑", 3)}


def main() -> None:
    page = PAGE.read_text()
    filled = MARKED.sub(lambda match: f"{match[1]}{table(match['name'])}\n{match[3]}", page)
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
