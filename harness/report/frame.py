"""Groups of records → one pandas frame of plain numbers, which is also the csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare, contests
from ditbench.harness.report.compare import Group, value
from ditbench.harness.report.marks import verdicts
from ditbench.harness.report.paired import comparisons, of_bits

if TYPE_CHECKING:
    import pandas as pd

MIB = 2**20
SIMULATED = "simulated"
STARTS_A_FORMULA = ("=", "+", "-", "@")


def frame(groups: Sequence[Group], at: str = contests.BITS) -> pd.DataFrame:
    """One row per record, numbers as recorded. Per metric: value, interval, n, mark, inside_noise_floor, reason."""
    import pandas as pd

    rows = []
    for group in groups:
        with_whom, out = contests.label_of(group, at), contests.unranked(group)
        judged = {metric: verdicts(group, metric, at) for metric in group.metrics}
        for index, (record, name) in enumerate(zip(group.records, group.run_names, strict=True)):
            row = _plain_columns(group, record) | {
                "run": name,
                "ranked_in": with_whom.get(index),
                "not_ranked": out.get(index),
                "bits_above_label": contests.above_label(record),
            }
            for metric in group.metrics:
                entry, verdict = record.metrics.get(metric, {}), judged[metric][index]
                low, high = (entry.get("ci95") if value(record, metric) is not None else None) or (None, None)
                row |= {
                    metric: value(record, metric),
                    f"{metric}.ci95_low": low,
                    f"{metric}.ci95_high": high,
                    f"{metric}.n": entry.get("n"),
                    f"{metric}.mark": verdict.mark or None,
                    f"{metric}.inside_noise_floor": verdict.inside,
                    f"{metric}.reason": entry.get("reason"),
                }
            rows.append(row)
    return pd.DataFrame(rows)


def tests_frame(
    groups: Sequence[Group],
    metrics: Sequence[str] | None = None,
    at: str = contests.BITS,
    bits: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per comparison of the paired tests; bits: of runs of these labels."""
    import pandas as pd

    return pd.DataFrame(
        {
            "group": group.label,
            "metric": metric,
            "better": each.better,
            "ranked_in": each.contest,
            "first": each.first,
            "second": each.second,
            "difference": each.difference.value,
            "ci95_low": each.difference.ci95[0],
            "ci95_high": each.difference.ci95[1],
            "p_holm": each.p_holm,
            "p": each.difference.p,
            "n": each.difference.n,
            "test": each.difference.test,
            "told_apart": each.told_apart,
        }
        for group in groups
        for metric in group.metrics
        if metrics is None or metric in metrics
        for each in of_bits(group, comparisons(group, metric, at), bits, at)
    )


def inert(table: pd.DataFrame) -> pd.DataFrame:
    """The frame with no text in it that a spreadsheet would run as a formula: such text gets an apostrophe in front."""

    def safe(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        line = "".join(char if char.isprintable() else " " for char in value).strip()  # a line's end ends a cell too
        return f"'{line}" if line.startswith(STARTS_A_FORMULA) else line

    return table.map(safe).rename(columns=safe)


def reason(record: Record) -> str:
    """The one line that says why a run did not end well: of a traceback the last, else the first."""
    lines = [line.strip() for line in (record.error or "").splitlines() if line.strip()]
    if not lines:
        return "" if record.status == "ok" else "no reason recorded"
    return compare.printable(lines[-1] if lines[0].startswith("Traceback") else lines[0], 1000)


def measured(record: Record) -> dict[str, Any]:
    """The efficiency fields that come from a clock, empty unless a kernel really ran."""
    return record.efficiency if record.status == "ok" and record.efficiency.get("kind") == "measured" else {}


def fit_s(record: Record) -> float | None:
    if record.cost.get("fit_s") is not None:  # with the seconds that a cache saved added back
        return record.cost["fit_s"]
    parts = [record.timings_s[name] for name in ("calibrate", "quantize") if record.timings_s.get(name) is not None]
    return sum(parts) if parts else None


def median_ms(latency: Mapping[str, float] | float | None) -> float | None:
    return latency.get("median") if isinstance(latency, Mapping) else latency


def mib(size_bytes: float | None) -> float | None:
    return size_bytes / MIB if size_bytes else None


def _plain_columns(group: Group, record: Record) -> dict[str, Any]:
    efficiency, clock, settings = record.efficiency, measured(record), compare.protocol(record)
    latency = clock.get("latency_ms") or {}
    return {
        "group": group.label,
        "experiment": record.experiment,
        "run_id": record.run_id,
        "model": compare.model_label(record),
        "protocol": settings.get("name"),
        "n": settings.get("n"),
        "steps": settings.get("steps"),
        "guidance": settings.get("guidance"),
        "seed": record.config.get("seed"),
        "method": record.method,
        "bits": compare.bits_label(record),
        "weight_bits_effective": record.bits.get("weight_bits_effective"),
        "act_bits_effective": record.bits.get("act_bits_effective"),
        "mac_share_quantized": record.bits.get("mac_share_quantized"),
        "status": record.status,
        "error": reason(record) or None,
        "kind": efficiency.get("kind"),
        "backend": efficiency.get("backend"),
        "device": efficiency.get("device"),
        "commit": record.env.get("git"),
        "compression": efficiency.get("compression"),
        "model_mib": mib(efficiency.get("model_bytes")),
        "baseline_model_mib": mib(efficiency.get("baseline_model_bytes")),
        "speedup": clock.get("speedup"),
        "latency_ms": latency.get("median"),
        "latency_ms.p10": latency.get("p10"),
        "latency_ms.p90": latency.get("p90"),
        "baseline_latency_ms": median_ms(clock.get("baseline_latency_ms")),
        "baseline": clock.get("baseline"),
        "compiled_speedup": clock.get("compiled_speedup"),
        "compiled_latency_ms": median_ms(clock.get("compiled_latency_ms")),
        "compiled_baseline_latency_ms": median_ms(clock.get("compiled_baseline_latency_ms")),
        "peak_memory_mib": mib(clock.get("peak_memory_bytes")),
        "fit_s": fit_s(record),
        "fit_peak_memory_mib": mib(record.cost.get("peak_memory_bytes")),
    }
