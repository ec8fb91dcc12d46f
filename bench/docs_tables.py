"""The numbers of the docs, from what was recorded in results/.

    ditbench report --over-seeds --format csv --experiment w4a4 --out results/tiny-dit-stress/w4a4.csv
    ditbench report --format csv --experiment w4a4 --out results/tiny-dit-stress/w4a4.seeds.csv
    ditbench compare w4a4 --over-seeds --format csv --out results/tiny-dit-stress/w4a4.tests.csv
    python bench/docs_tables.py                   # fills the marked places; --check only compares

A marked place lies between <!-- WHAT --> and <!-- end -->, where WHAT is

    table: NAME                      results/NAME.csv by bits, in the order of PSNR; means over seeds with 95 % intervals (Student's t); bold
                                     and underlined as NAME.csv marks best and second, if the tests behind it lie in NAME.tests.csv
    forms: NAME, NAME                PSNR of each method's default and published form, from results/NAME.csv of several models
    paired: NAME, METRIC, RUN, RUN   the difference of two rows, seed by seed
    fit cost                         what `bench/fit_cost.py` wrote
    bench: FILE                      results/bench/FILE.json, which `ditbench bench` wrote
    profile: FILE                    where the time of a step goes, ours and OpenVINO's, of the same
    coverage: MODEL                  how often intervals cover, of what `bench/intervals.py` drew from MODEL
    noise floor                      what `bench/noise_floor.py` wrote
    external: NAME                   results/NAME.csv, our rows beside others' checkpoints, in the order of PSNR
    format oracles                   what `bench/format_oracles.py` wrote
    launches                         what `bench/launches.py` counted
    overhead: NAME, NAME             shares of runs' time, of results/bench/overhead-NAME.json, which `bench/overhead.py` wrote
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import docs_bench
import pandas as pd

from ditbench.eval.seed_differences import mean_over_seeds
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import DEFAULT, PUBLISHED, Form

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "docs" / f"{name}.md"
    for name in ("methods", "models", "backends", "mixed-precision", "protocols", "external")
]
RESULTS = ROOT / "results"
INTERVALS = RESULTS / "intervals"
ORACLES = RESULTS / "formats" / "oracles.csv"
MARKED = re.compile(r"(?P<open><!-- (?P<what>[a-z ]+)(?:: (?P<of>.+?))? -->\n).*?(?P<close><!-- end -->)", re.DOTALL)
FID = "torchmetrics/fid_judge"
LOPSIDED = 0.1  # of an interval: where one side is so much longer than the other, its ends are said
COLUMNS = {  # metric: (heading, decimals); a table has those that its runs have
    FID: ("FID (judge) ↓", 1),
    "psnr": ("PSNR dB ↑", 2),
    "ssim": ("SSIM ↑", 4),
    "accuracy": ("right class ↑", 3),
    "geneval_shapes/overall": ("follows the prompt (GenEval) ↑", 3),
    "motion_shapes/direction": ("moves as asked ↑", 3),
}


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        filled = MARKED.sub(fill, text)
        if "--check" not in sys.argv:
            page.write_text(filled)
        elif filled != text:
            sys.exit(f"docs/{page.name} does not show what results/ says; run python bench/docs_tables.py")


def fill(place: re.Match[str]) -> str:
    arguments = place["of"].split(", ") if place["of"] else []
    return f"{place['open']}{CONTENT[place['what']](*arguments)}\n{place['close']}"


def table(name: str) -> str:
    runs = pd.read_csv(RESULTS / f"{name}.csv")
    runs = runs[runs.status == "ok"].sort_values(["bits", "psnr"], ascending=[True, False], kind="stable")
    tested = (RESULTS / f"{name}.tests.csv").is_file()
    columns = {name: column for name, column in COLUMNS.items() if name in runs and runs[name].notna().any()}
    heads = [
        "method",
        "bits",
        "weight bits, effective",
        *(title for title, _ in columns.values()),
        "fit s",
        "fit peak MiB",
    ]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for _, run in runs.iterrows():
        cells = [run["run"], run.bits, f"{run.weight_bits_effective:.2f}"]
        cells += [with_interval(run, metric, decimals, tested) for metric, (_, decimals) in columns.items()]
        lines.append([*cells, f"{run.fit_s:.0f}", f"{run.fit_peak_memory_mib:.0f}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{caption(runs, comparisons(name, columns) if tested else None)}"


def forms(*names: str) -> str:
    """A line for each method and format that has a published form beside its default, and who has none."""
    tables = [pd.read_csv(RESULTS / f"{name}.csv") for name in names]
    found: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    changed: dict[tuple[str, str], str] = {}
    for place, runs in enumerate(tables):
        for _, run in runs[runs.status == "ok"].iterrows():
            words = dict(word.split("=", 1) for word in run["run"].split()[1:])
            form = words.pop("form", DEFAULT)
            words = {"calibration.n" if name == "n" else name: value for name, value in words.items()}
            key = run.bits, run.method
            found.setdefault(key, {})[place, form] = with_interval(run, "psnr", 1, tested=False)
            if form == PUBLISHED and words:
                changed[key] = " ".join(f"{name}={value}" for name, value in words.items())
    heads = ["method", "bits"]
    heads += [f"{form}, {runs.iloc[0].model}" for runs in tables for form in (DEFAULT, PUBLISHED)]
    lines = [[*heads, "published but for"], ["---", "---", *["---:"] * (len(heads) - 2), "---"]]
    for (bits, method), values in sorted(found.items()):
        cells = [values.get((place, form), "–") for place in range(len(tables)) for form in (DEFAULT, PUBLISHED)]
        lines.append([method, bits, *cells, changed.get((bits, method), "")])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    differing = {name for name in registry.known_methods() if vars(registry.forms_of(name)[PUBLISHED]) != vars(Form())}
    measured = {method for (_, method), values in found.items() if any(form == PUBLISHED for _, form in values)}
    left = sorted(differing - measured)
    said = f"\n\nNot measured in their published form: {', '.join(left)}." if left else ""
    return (
        f"{text}\n\nPSNR to the float model, dB. {' '.join(caption(runs, None, signs=False) for runs in tables)}{said}"
    )


def difference(name: str, metric: str, one: str, other: str) -> str:
    runs = pd.read_csv(RESULTS / f"{name}.seeds.csv").set_index("seed")
    first, second = (runs[runs.run == run][metric] for run in (one, other))
    steps = (first - second).dropna()
    low, high = mean_over_seeds(steps, [0.0] * len(steps)).ci95
    title, decimals = COLUMNS[metric]
    return (
        f"{one} − {other}, {title.split()[0]}: {steps.mean():+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}] "
        f"over {len(steps)} seeds, paired{holm_of(name, metric, {one, other})}."
    )


def coverage(model: str) -> str:
    rows = pd.concat([pd.read_csv(path) for path in sorted(INTERVALS.glob("coverage-*.csv"))])
    rows = rows[rows.model == model].sort_values("n", kind="stable")
    places = [(design, n) for design in ("balanced", "independent") for n in rows.n.unique()]
    lines = [["interval of", *(f"{design}, n = {n:,}" for design, n in places)], ["---", *["---:"] * len(places)]]
    for metric, of_metric in rows.groupby("metric", sort=False):
        found = {(row.design, row.n): row for row in of_metric.itertuples()}
        lines.append([str(metric), *(covered(found.get(place)) for place in places)])
    draws = "–".join(str(each) for each in sorted(rows.draws.unique()))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\nPer cent of {draws} draws (± 1.5 where the truth is 95); –: not drawn; ·: the number is the same in every draw."


def covered(row: Any) -> str:
    if row is None:
        return "–"
    return "·" if row.sd < 1e-9 else f"{100 * row.coverage:.1f}"


def format_oracles() -> str:
    """A line for each format and library; what differs with the tensors it does on."""
    rows = pd.read_csv(ORACLES, keep_default_na=False)
    lines = [
        [
            "format",
            "scale's rule",
            "library",
            "tensors equal",
            "codes",
            "of which equal",
            "scales equal",
            "not equal on",
        ]
    ]
    lines.append(["---", "---", "---", "---:", "---:", "---:", "---:", "---"])
    for row in rows.itertuples():
        equal = [
            "all" if not differ else f"{1 - differ / count:.2%}"
            for count, differ in ((row.codes, row.codes_differ), (row.scales, row.scales_differ))
        ]
        tensors = f"{row.tensors - len([name for name in row.where.split(', ') if name])} of {row.tensors}"
        lines.append([row.format, row.rule, row.oracle, tensors, f"{row.codes:,}", *equal, row.where or "–"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def external(name: str) -> str:
    runs = pd.read_csv(RESULTS / f"{name}.csv")
    runs = runs[runs.status == "ok"].sort_values("psnr", ascending=False, kind="stable")
    heads = [
        "row",
        "bits",
        "weight bits, effective",
        "activation bits",
        "model MiB",
        "PSNR dB ↑",
        "SSIM ↑",
        "against bf16",
    ]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for _, run in runs.iterrows():
        numbers = [
            *(told(run[column], "{:.2f}") for column in ("weight_bits_effective", "act_bits_effective", "model_mib")),
            *(with_interval(run, metric, decimals, tested=False) for metric, decimals in (("psnr", 2), ("ssim", 4))),
            told(run.speedup, "{:.2f}×"),
        ]
        lines.append([run["run"].removeprefix("external "), run.bits, *numbers])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{caption(runs, None, signs=False)}"


def told(value: float, form: str) -> str:
    return "–" if pd.isna(value) else form.format(value)


def noise_floor() -> str:
    rows = pd.read_csv(INTERVALS / "noise_floor.csv").sort_values(["metric", "n", "worse share"], kind="stable")
    rules = list(rows.columns[4:-1])
    lines = [["metric", "n", "noisy digits", "worse by, sd", *rules], ["---", *["---:"] * (3 + len(rules))]]
    for _, row in rows.iterrows():
        effect = "0 (equal)" if row["worse share"] == 0 else f"{row.effect:.1f}"
        rates = [f"{100 * row[rule]:.1f}" for rule in rules]
        lines.append([row.metric, f"{row.n:,}", f"{row['worse share']:.0%}", effect, *rates])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def holm_of(name: str, metric: str, runs: set[str]) -> str:
    """p of two runs' test, if it was kept."""
    path = RESULTS / f"{name}.tests.csv"
    if not path.is_file():
        return ""
    tests = pd.read_csv(path)
    (p,) = (row.p_holm for row in tests[tests.metric == metric].itertuples() if {row.first, row.second} == runs)
    return "; p (Holm) < 0.001" if p < 0.001 else f"; p (Holm) = {p:.3f}"


def comparisons(name: str, metrics: Iterable[str]) -> str:
    """How many tests Holm's correction is over, of one metric in one contest."""
    tests = pd.read_csv(RESULTS / f"{name}.tests.csv")
    sizes = sorted(set(tests[tests.metric.isin(list(metrics))].groupby(["metric", "ranked_in"]).size()))
    return "–".join(str(size) for size in sizes[:: max(len(sizes) - 1, 1)])


def with_interval(run: pd.Series, metric: str, decimals: int, tested: bool) -> str:
    low, high = run[f"{metric}.ci95_low"], run[f"{metric}.ci95_high"]
    inside = " ~" if run.get(f"{metric}.inside_noise_floor") is True else ""
    limits = f"± {(high - low) / 2:.{decimals}f}"
    ends_somewhere = metric == FID or high <= 1  # of a logarithm, or of a share
    if ends_somewhere and abs(high + low - 2 * run[metric]) > LOPSIDED * (high - low):
        limits = f"[{low:.{decimals}f}, {high:.{decimals}f}]"
    text = f"{run[metric]:.{decimals}f} {limits}{inside}"
    mark = run.get(f"{metric}.mark") if tested else None
    return {"best": f"**{text}**", "second": f"<ins>{text}</ins>"}.get(str(mark), text)


def caption(runs: pd.DataFrame, compared: str | None, signs: bool = True) -> str:
    """compared: the number of comparisons behind the marks; None: their tests were not kept. signs: the table can have marks or ~."""
    first = runs.iloc[0]
    seeds = len(str(first.seed).split(","))
    one_seed = "over the samples" if compared or not signs else "over bootstrap resamples"
    over = f"over {seeds} seeds" if seeds > 1 else one_seed
    marks = (
        "~: paired tests do not tell it apart from the float model; **best** and <ins>second</ins> of their bits where they tell them apart "
        f"(Holm over {compared} comparisons)"
        if compared
        else "~: inside the noise floor; no marks: the paired tests behind them were not kept"
    )
    return (
        f"{first.model}, n = {first.n:,} samples × {seeds} seed{'s' * (seeds > 1)}, {first.steps} steps, guidance {first.guidance}; "
        f"95 % intervals {over}; {f'{marks}; ' if signs else ''}{first.device}, {commits(runs)}."
    )


def commits(runs: pd.DataFrame) -> str:
    """Such as "commit abcdef0 (rtn: abcdef1)": that of most rows, then those of the others."""
    found = runs.commit.str[:7]
    usual = found.mode()[0]
    others = [f"{run}: {commit}" for run, commit in zip(runs["run"], found, strict=True) if commit != usual]
    return f"commit {usual}" + (f" ({', '.join(others)})" if others else "")


CONTENT = {
    "table": table,
    "forms": forms,
    "paired": difference,
    "fit cost": docs_bench.fit_cost,
    "bench": docs_bench.step_times,
    "profile": docs_bench.profile,
    "coverage": coverage,
    "noise floor": noise_floor,
    "external": external,
    "format oracles": format_oracles,
    "launches": docs_bench.launches,
    "overhead": docs_bench.overhead,
}


if __name__ == "__main__":
    main()
