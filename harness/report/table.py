"""Groups of records → tables of cells, as they are printed in the terminal, Markdown, LaTeX and HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare, contests
from ditbench.harness.report.compare import FLOAT_METHOD, Group, value
from ditbench.harness.report.contests import BITS, BYTES
from ditbench.harness.report.frame import SIMULATED, fit_s, measured, median_ms, mib, reason
from ditbench.harness.report.marks import verdicts
from ditbench.harness.report.notes import notes

MISSING = "–"
ABOVE = "▲"  # stores more than its label says
QUALITY, CLOSENESS = "quality", "closeness to float"
RANKED = {BITS: "of the same bits", BYTES: "of nearly equal bytes"}
BEHIND_MARKS = "what paired tests separate; several bests are tied, no mark: nobody told apart, or not tested"
CLOSENESS_NOTE = (
    "Quality: how good the samples are, and how the set resembles the reference. Closeness to float: how near a run stays to the float "
    "model's samples of the same noise, which says nothing of how good either is. The float row is the reference and has no rank."
)
COMPILED = "compiled"
EFFECTIVE = "eff. W/A"
EFFECTIVE_NOTE = (
    f"{EFFECTIVE}: bits per weight of the whole transformer, all that is stored counted (scales, and layers left in float at 16); bits per "
    "activation, weighted with MACs."
)
BASELINE_NOTE = (
    "Baseline of compression, speed-up and latency: the same model in bf16, eager, on the same device, in the same process. "
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
    kind: str = ""  # of a metric: QUALITY | CLOSENESS
    metric: str = ""  # its whole name


@dataclass(frozen=True)
class Row:
    cells: list[Cell]
    contest: str  # who it is ranked with; a rule stands where it changes
    is_float: bool
    status: str


@dataclass(frozen=True)
class Table:
    label: str
    devices: str
    caption: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    problems: list[str]  # one line per run that failed, was skipped or has no rank
    not_ranked: list[str]  # those of runs that collapsed, or lack seeds


def table(group: Group, metrics: Sequence[str], behind: Sequence[str] = (), at: str = BITS) -> Table:
    """The group's runs as printable rows with the given metrics; more of them stand behind size, speed and cost.

    Of the metrics quality comes first, closeness to the float model after it. at: what those share that are ranked together.
    """
    metrics = compare.quality_first(group, [name for name in metrics if name in group.metrics])
    behind = compare.quality_first(group, [name for name in behind if name in group.metrics and name not in metrics])
    columns = [
        Column("method", numeric=False),
        Column("bits", numeric=False),
        Column(EFFECTIVE, "bits", EFFECTIVE_NOTE),
    ]
    by_column = [
        [Cell(name, sort=name) for name in group.run_names],
        [Cell(compare.bits_label(record), sort=place) for place, record in enumerate(group.records)],
        [_effective_bits(record) for record in group.records],
    ]
    for name in metrics:
        columns.append(_metric_column(group, name))
        by_column.append(_metric_cells(group, name, at))
    columns += [
        Column("compr.", "×", "bytes of the bf16 model / bytes stored", descending_first=True),
        Column("stored", "MiB", "codes, scales and transforms, all counted"),
        Column(
            "speed-up",
            "×",
            "bf16 latency / latency, both eager, interleaved; on hover the baseline",
            descending_first=True,
        ),
        Column("latency", "ms", "median; on hover p10 – p90 and the baseline"),
        Column("fit", "s", "calibrate + quantize"),
        Column("fit peak", "MiB", "most memory held during calibrate + quantize: of the process, or of the GPU"),
    ]
    by_column += [[_efficiency_cells(record)[place] for record in group.records] for place in range(6)]
    if any(compiled_baseline(record) for record in group.records):  # asked for: measure.compile=true
        tip = "compiled bf16 latency / compiled latency, interleaved; on hover the baseline"
        columns.append(Column(COMPILED, "×", tip, descending_first=True))
        by_column.append([_compiled_cell(record) for record in group.records])
    for name in behind:
        columns.append(_metric_column(group, name))
        by_column.append(_metric_cells(group, name, at))
    for title, values in (
        ("seeds", [", ".join(compare.seeds(record)) for record in group.records]),
        ("device", _devices(group)),
        ("experiment", [compare.printable(r.experiment) for r in group.records]),
    ):
        if len(set(values) - {MISSING}) > 1:
            columns.append(Column(title, numeric=False))
            by_column.append([Cell(text, sort=text) for text in values])
    columns.append(Column("status", numeric=False))
    by_column.append([Cell(r.status, sort=r.status, tip=reason(r)) for r in group.records])
    with_whom, lines = contests.label_of(group, at), list(zip(*by_column, strict=True))
    rows = [
        Row(list(lines[place]), with_whom.get(place, ""), run.method == FLOAT_METHOD, run.status)
        for place in contests.in_order(group, at)
        for run in (group.records[place],)
    ]
    devices = ", ".join(dict.fromkeys(name for name in _devices(group) if name != MISSING)) or "device not recorded"
    note = compare.printable((group.records[0].config.get("model") or {}).get("note") or "", 400)
    setting = " · ".join(filter(None, (group.label, devices, note)))
    caption = (
        f"{setting}. {BASELINE_NOTE} {CLOSENESS_NOTE} {EFFECTIVE_NOTE} Intervals are 95 %; fit is calibrate + quantize."
    )
    return Table(
        group.label,
        devices,
        caption,
        columns,
        rows,
        notes(group, [*metrics, *behind], at),
        _problems(group),
        _not_ranked(group),
    )


def only(built: Table, places: Sequence[int]) -> Table:
    """The table with these columns of it."""
    rows = [replace(row, cells=[row.cells[place] for place in places]) for row in built.rows]
    return replace(built, columns=[built.columns[place] for place in places], rows=rows)


def without_empty(built: Table, asked: Sequence[str]) -> Table:
    """The table without the columns that hold nothing in any row, except those of the metrics asked for."""

    def stays(place: int) -> bool:
        texts = {row.cells[place].text for row in built.rows}
        return built.columns[place].metric in asked or bool(texts - {MISSING, ""})

    return only(built, [place for place in range(len(built.columns)) if stays(place)])


def plain(cell: Cell) -> str:
    return ("~" if cell.inside else "") + cell.text + (f" {cell.interval}" if cell.interval else "")


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
    kind = CLOSENESS if compare.is_closeness(group, metric) else QUALITY
    return Column(
        f"{compare.printable(name)}{compare.ARROWS[better]}",
        " ".join(filter(None, [compare.printable(library), *unit, *n])),
        f"{metric} ({kind}): {'describes, and ranks nobody' if better == 'none' else f'{better} is better'}",
        descending_first=better == "higher",
        kind=kind,
        metric=metric,
    )


def _metric_cells(group: Group, metric: str, at: str) -> list[Cell]:
    decimals = decimals_for(group, metric)
    cells = []
    for record, verdict in zip(group.records, verdicts(group, metric, at), strict=True):
        entry, x = record.metrics.get(metric, {}), value(record, metric)
        if x is None:
            cells.append(Cell(MISSING, tip=entry.get("reason") or reason(record) or "not asked for in this run"))
            continue
        like_float = "not told apart from the float model" if verdict.tested else "inside the noise floor"
        tip = f"n = {entry['n']}" + (f"; {like_float}" if verdict.inside else "")
        band = interval(x, entry.get("ci95"), decimals)
        cells.append(Cell(number(x, decimals), band, verdict.mark, bool(verdict.inside), x, tip))
    return cells


def _effective_bits(record: Record) -> Cell:
    weight_bits, act_bits = record.bits.get("weight_bits_effective"), record.bits.get("act_bits_effective")
    share, left = record.bits.get("mac_share_quantized"), record.bits.get("float_layers") or []
    if weight_bits is None and act_bits is None:
        return Cell(MISSING)
    tip = (f"{share:.1%} of MACs quantized; " if share is not None else "") + f"{len(left)} layers left in float"
    above = contests.above_label(record)
    if above is not None:
        tip += f"; {above:.2f} bits per weight of the quantized layers"
    return Cell(f"{number(weight_bits)}/{number(act_bits)}{ABOVE if above else ''}", sort=weight_bits, tip=tip)


def _efficiency_cells(record: Record) -> list[Cell]:
    """compression, stored MiB, speed-up, latency, fit and its memory."""
    efficiency, clock = record.efficiency, measured(record)
    latency, baseline = clock.get("latency_ms") or {}, median_ms(clock.get("baseline_latency_ms"))
    size = efficiency.get("model_bytes")
    tip = f"p10 {number(latency.get('p10'))} – p90 {number(latency.get('p90'))} ms" if latency else ""
    tip += f"; bf16 {number(baseline)} ms" if baseline else ""
    speedup = clock.get("speedup")
    simulated = efficiency.get("kind") == SIMULATED
    backend, against = efficiency.get("backend") or "", clock.get("baseline")
    backend += f"; against {compare.printable(str(against))}" if against else ""
    return [
        Cell(number(efficiency.get("compression")), sort=efficiency.get("compression")),
        Cell(number(mib(size)), sort=size),
        Cell(SIMULATED if simulated else number(speedup), sort=speedup, tip=backend),
        Cell(number(latency.get("median"), 1), sort=latency.get("median"), tip=tip),
        Cell(number(fit_s(record), 1), sort=fit_s(record)),
        Cell(number(mib(record.cost.get("peak_memory_bytes")), 0), sort=record.cost.get("peak_memory_bytes")),
    ]


def compiled_baseline(record: Record) -> str:
    """What a run's compiled blocks were compared with, or why with nothing; empty if nobody asked."""
    return str(measured(record).get("compiled_baseline") or "")


def _compiled_cell(record: Record) -> Cell:
    times = measured(record).get("compiled_speedup")
    return Cell(number(times), sort=times, tip=compare.printable(compiled_baseline(record), 400))


def _devices(group: Group) -> list[str]:
    return [compare.printable(str(record.efficiency.get("device") or MISSING)) for record in group.records]


def _problems(group: Group) -> list[str]:
    return [
        f"{run} {compare.bits_label(record)} {record.status}: {reason(record)}"
        for record, run in zip(group.records, group.run_names, strict=True)
        if record.status != "ok"
    ] + _not_ranked(group)


def _not_ranked(group: Group) -> list[str]:
    """Runs that ended well and have no rank."""
    return [
        f"{group.run_names[place]} {compare.bits_label(group.records[place])} not ranked, {why}"
        for place, why in contests.unranked(group).items()
        if group.records[place].status == "ok"
    ]
