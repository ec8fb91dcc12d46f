"""Groups of records → tables of cells, as they are printed in the terminal, Markdown, LaTeX and HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare
from ditbench.harness.report.compare import FLOAT_METHOD, Group, value
from ditbench.harness.report.frame import SIMULATED, fit_s, measured, median_ms, mib, reason

MISSING = "–"
BASELINE_NOTE = (
    "Baseline of compression, speed-up and latency: the same model in bf16, on the same device, in the same process. "
    "“simulated”: quantization was computed in floating point, no low-bit kernel ran, so there is no latency and no "
    "speed-up to report."
)


@dataclass(frozen=True)
class Cell:
    """text and interval as printed; sort: what a click on the header compares (None goes last); tip: on hover."""

    text: str
    interval: str = ""
    mark: str = ""  # best | second
    inside: bool = False  # of the noise floor
    sort: float | str | None = None
    tip: str = ""


@dataclass(frozen=True)
class Column:
    title: str
    subtitle: str = ""
    tip: str = ""
    numeric: bool = True
    descending_first: bool = False


@dataclass(frozen=True)
class Row:
    cells: list[Cell]
    bits: str
    is_float: bool
    inside: bool
    status: str


@dataclass(frozen=True)
class Table:
    label: str
    devices: str
    caption: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    problems: list[str]  # one line per run that failed, was skipped or collapsed
    collapsed: list[str]  # those of runs that collapsed


def table(group: Group, metrics: Sequence[str], behind: Sequence[str] = ()) -> Table:
    """The group's runs as printable rows with the given metrics; more of them stand behind size, speed and cost."""
    metrics = [name for name in metrics if name in group.metrics]
    behind = [name for name in behind if name in group.metrics and name not in metrics]
    columns = [Column("method", numeric=False), Column("bits", numeric=False), Column("eff. W/A", "bits")]
    by_column = [
        [Cell(name, sort=name) for name in group.run_names],
        [Cell(compare.bits_label(record), sort=place) for place, record in enumerate(group.records)],
        [_effective_bits(record) for record in group.records],
    ]
    for name in metrics:
        columns.append(_metric_column(group, name))
        by_column.append(_metric_cells(group, name))
    columns += [
        Column("compr.", "×", "bytes of the bf16 model / bytes stored", descending_first=True),
        Column("stored", "MiB", "codes, scales and transforms, all counted"),
        Column("speed-up", "×", "bf16 latency / latency, interleaved", descending_first=True),
        Column("latency", "ms", "median; on hover p10 – p90 and the baseline"),
        Column("fit", "s", "calibrate + quantize"),
        Column("fit peak", "MiB", "most memory held during calibrate + quantize: of the process, or of the GPU"),
    ]
    by_column += [[_efficiency_cells(record)[place] for record in group.records] for place in range(6)]
    for name in behind:
        columns.append(_metric_column(group, name))
        by_column.append(_metric_cells(group, name))
    for title, values in (
        ("device", _devices(group)),
        ("experiment", [compare.printable(r.experiment) for r in group.records]),
    ):
        if len(set(values) - {MISSING}) > 1:
            columns.append(Column(title, numeric=False))
            by_column.append([Cell(text, sort=text) for text in values])
    columns.append(Column("status", numeric=False))
    by_column.append([Cell(r.status, sort=r.status, tip=reason(r)) for r in group.records])
    rows = [
        Row(list(cells), compare.bits_label(run), run.method == FLOAT_METHOD, group.row_inside(index), run.status)
        for index, (run, cells) in enumerate(zip(group.records, zip(*by_column, strict=True), strict=True))
    ]
    devices = ", ".join(dict.fromkeys(name for name in _devices(group) if name != MISSING)) or "device not recorded"
    note = compare.printable((group.records[0].config.get("model") or {}).get("note") or "", 400)
    setting = " · ".join(filter(None, (group.label, devices, note)))
    caption = f"{setting}. {BASELINE_NOTE} Intervals are 95 %; fit is calibrate + quantize."
    return Table(
        group.label,
        devices,
        caption,
        columns,
        rows,
        _notes(group, [*metrics, *behind]),
        _problems(group),
        _collapsed(group),
    )


def short_names(metrics: Sequence[str]) -> dict[str, str]:
    """torchmetrics/fid_judge → fid_judge, unless two metrics would then share a name."""
    last = [name.rsplit("/", 1)[-1] for name in metrics]
    return {
        name: compare.printable(part if last.count(part) == 1 else name)
        for name, part in zip(metrics, last, strict=True)
    }


def number(x: float | None, decimals: int = 2) -> str:
    return MISSING if x is None else f"{x:.{decimals}f}"


def interval(x: float, ci95: Sequence[float] | None, decimals: int) -> str:
    """±half where value sits in the middle, else [low, high]."""
    if not ci95:
        return ""
    below, above = x - ci95[0], ci95[1] - x
    if abs(above - below) <= 0.1 * (above + below):
        return f"±{(above + below) / 2:.{decimals}f}"
    return f"[{ci95[0]:.{decimals}f}, {ci95[1]:.{decimals}f}]"


def decimals_for(group: Group, metric: str) -> int:
    """Enough for two digits of a typical interval, or four digits of a typical value."""
    entries = [r.metrics[metric] for r in group.records if value(r, metric) is not None]
    halves = [(e["ci95"][1] - e["ci95"][0]) / 2 for e in entries if e.get("ci95")]
    sizes = [half for half in halves if half > 0] or [abs(entry["value"]) for entry in entries if entry["value"]]
    digits_after_first = 1 if any(halves) else 3
    return min(max(digits_after_first - math.floor(math.log10(statistics.median(sizes))), 0), 4) if sizes else 2


def _metric_column(group: Group, metric: str) -> Column:
    entries = [record.metrics[metric] for record in group.records if metric in record.metrics]
    sizes = sorted({entry["n"] for entry in entries if entry.get("value") is not None})
    unit = [compare.printable(entries[0]["unit"], 24)] if entries[0].get("unit") else []
    # A set metric means nothing without its n; what is paired rests on the protocol's n, which the caption has.
    n = ["n=" + "–".join(map(str, sizes[:: max(len(sizes) - 1, 1)]))] if sizes and not entries[0].get("paired") else []
    better = entries[0]["better"]
    library, _, name = metric.rpartition("/")
    return Column(
        f"{compare.printable(name)}{compare.ARROWS[better]}",
        " ".join(filter(None, [compare.printable(library), *unit, *n])),
        f"{metric}: {'describes, and ranks nobody' if better == 'none' else f'{better} is better'}",
        descending_first=better == "higher",
    )


def _metric_cells(group: Group, metric: str) -> list[Cell]:
    decimals = decimals_for(group, metric)
    cells = []
    for record, verdict in zip(group.records, group.verdicts[metric], strict=True):
        entry, x = record.metrics.get(metric, {}), value(record, metric)
        if x is None:
            cells.append(Cell(MISSING, tip=entry.get("reason") or reason(record) or "not asked for in this run"))
            continue
        tip = f"n = {entry['n']}" + (f"; noise floor ±{entry['noise_floor']:.{decimals}f}" if verdict.inside else "")
        band = interval(x, entry.get("ci95"), decimals)
        cells.append(Cell(number(x, decimals), band, verdict.mark, bool(verdict.inside), x, tip))
    return cells


def _effective_bits(record: Record) -> Cell:
    weight_bits, act_bits = record.bits.get("weight_bits_effective"), record.bits.get("act_bits_effective")
    share, left = record.bits.get("mac_share_quantized"), record.bits.get("float_layers") or []
    if weight_bits is None and act_bits is None:
        return Cell(MISSING)
    tip = (f"{share:.1%} of MACs quantized; " if share is not None else "") + f"{len(left)} layers left in float"
    return Cell(f"{number(weight_bits)}/{number(act_bits)}", sort=weight_bits, tip=tip)


def _efficiency_cells(record: Record) -> list[Cell]:
    """compression, stored MiB, speed-up, latency, fit and its memory."""
    efficiency, clock = record.efficiency, measured(record)
    latency, baseline = clock.get("latency_ms") or {}, median_ms(clock.get("baseline_latency_ms"))
    size = efficiency.get("model_bytes")
    tip = f"p10 {number(latency.get('p10'))} – p90 {number(latency.get('p90'))} ms" if latency else ""
    tip += f"; bf16 {number(baseline)} ms" if baseline else ""
    speedup = clock.get("speedup")
    simulated = efficiency.get("kind") == SIMULATED
    return [
        Cell(number(efficiency.get("compression")), sort=efficiency.get("compression")),
        Cell(number(mib(size)), sort=size),
        Cell(SIMULATED if simulated else number(speedup), sort=speedup, tip=efficiency.get("backend") or ""),
        Cell(number(latency.get("median"), 1), sort=latency.get("median"), tip=tip),
        Cell(number(fit_s(record), 1), sort=fit_s(record)),
        Cell(number(mib(record.cost.get("peak_memory_bytes")), 0), sort=record.cost.get("peak_memory_bytes")),
    ]


def _devices(group: Group) -> list[str]:
    return [compare.printable(str(record.efficiency.get("device") or MISSING)) for record in group.records]


def _notes(group: Group, metrics: Sequence[str]) -> list[str]:
    """What the marks mean, where they occur, and why a metric is missing."""
    notes, names = [], short_names(group.metrics)
    floors = {}
    for name in metrics:
        pairs = zip(group.records, group.verdicts[name], strict=True)
        if inside := [record.metrics[name]["noise_floor"] for record, verdict in pairs if verdict.inside]:
            floors[names[name]] = f"{names[name]} ±{max(inside):.4g}"
    if floors:
        listed = ", ".join(floors.values())
        notes.append(f"Inside the noise floor (~, tied, one rank): no further from the float row than {listed}.")
    if any(r.method != FLOAT_METHOD and r.metrics for r in group.records) and not any(
        r.method == FLOAT_METHOD and r.status == "ok" for r in group.records
    ):
        notes.append(
            "No run of method=fp here: differences of the set metrics could not be held against their noise floor. Paired tests "
            "do not need one, they compare with the float model's own samples."
        )
    runs_without: dict[tuple[str, str, str], list[str]] = {}
    for record, run in zip(group.records, group.run_names, strict=True):
        for name in group.metrics:
            entry = record.metrics.get(name, {})
            if entry.get("status") in ("skipped", "failed"):
                key = (name, entry["status"], str(entry.get("reason")))
                runs_without.setdefault(key, []).append(f"{run} {compare.bits_label(record)}")
    finished = sum(record.status == "ok" for record in group.records)
    missing: dict[tuple[str, str, str], list[str]] = {}
    for (name, status, why), runs in runs_without.items():
        where = "" if len(runs) >= finished else f" for {', '.join(runs)}"
        missing.setdefault((status, why, where), []).append(name)
    return notes + [f"{status}{where}: {why}: {', '.join(found)}" for (status, why, where), found in missing.items()]


def _problems(group: Group) -> list[str]:
    return [
        f"{run} {compare.bits_label(record)} {record.status}: {reason(record)}"
        for record, run in zip(group.records, group.run_names, strict=True)
        if record.status != "ok"
    ] + _collapsed(group)


def _collapsed(group: Group) -> list[str]:
    return [
        f"{run} {compare.bits_label(record)} not ranked, samples collapsed: {', '.join(found)} of them"
        for record, run in zip(group.records, group.run_names, strict=True)
        if (found := compare.alarms(record))
    ]
