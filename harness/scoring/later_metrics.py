"""Metrics of finished runs, computed later: their samples are read from the store, nothing is drawn or quantized again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditbench.eval.base import known_metrics, no_metric
from ditbench.harness.common.errors import UserError
from ditbench.harness.records import sample_values
from ditbench.harness.records.attempts import alone_with, named
from ditbench.harness.records.drawn_samples import samples_at, store_of
from ditbench.harness.records.record import Record, add_metric
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.evaluate import hold_against_float, scored, write_noise_floor
from ditbench.harness.stages.generate import Drawn
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.sweep.compose import composed

SETTINGS = ("generate", "metrics", "measure", "calibration", "tracker")  # sections that were added to over time


@dataclass(frozen=True)
class Outcome:
    text: str
    failed: bool


def evaluate(
    target: str, metrics: Sequence[str], results_dir: Path, overrides: Sequence[str] = (), again: bool = False
) -> Outcome:
    """Score a run (its folder) or an experiment's finished runs with metrics that they lack.

    overrides: of the configuration, such as metrics.reference=… or device=…. again: with those that they have as well, since a
    metric was mended; what is computed now counts from now on.

    Raises:
        UserError: no such run, an unknown metric, an override that would change the samples.
    """
    for name in metrics:
        if name not in known_metrics():
            raise no_metric(name)
    lines, failed = [], False
    for found in runs_of(target, results_dir):
        with alone_with(found) as record:
            lacking = [name for name in metrics if again or record.metrics.get(name, {}).get("status") != "ok"]
            entries = add(record, lacking, overrides) if lacking else {}
        title = f"{record.folder.name if record.folder else record.run_id} {record.method} {record.bits['label']}"
        lines += [f"{title} {name}: recorded already" for name in metrics if name not in lacking]
        for name, entry in entries.items():
            failed |= entry["status"] == "failed"
            value = (
                f"{entry['value']:.4g} (n = {entry['n']})"
                if entry["status"] == "ok"
                else f"{entry['status']}: {entry['reason']}"
            )
            lines.append(f"{title} {name}: {value}")
    return Outcome("\n".join(lines), failed)


def add(record: Record, metrics: Sequence[str], overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The entries of metrics that the record lacks; those that could be computed are filed beside it."""
    config = as_recorded(record, metrics, overrides)
    model = model_of(config.model)

    def of(key: str) -> Drawn:
        folder = store_of(record, key)
        return Drawn(samples_at(folder, record), key, folder, {})

    samples, float_model = of(record.made_from["samples"]), of(record.made_from["float_samples"])
    entries, found = scored(config, model, samples, float_model)
    unpaired = [name for name in found if not entries[name]["paired"]]
    of_float = scored(config, model, float_model, float_model, unpaired)[1]
    hold_against_float(entries, found, of_float)
    write_noise_floor(config, model, entries, [of(key) for key in record.made_from.get("noise_samples", ())])
    assert record.folder is not None
    drawn = sample_values.drawn(samples.samples, config.seed)
    for name, entry in entries.items():
        if entry["status"] == "ok":
            path = add_metric(record.folder, name, entry, again=True)
            of_this = [{name: values[name]} if name in values else {} for values in (found, of_float)]
            if of_this[0]:
                sample_values.save(sample_values.Values(*of_this, drawn), path.with_suffix(".npz"))
    return entries


def as_recorded(record: Record, metrics: Sequence[str], overrides: Sequence[str]) -> RunConfig:
    """The run's configuration with other metrics; what it lacks, being older, has today's defaults."""
    here = composed([overrides])[0]
    raw = {
        name: here[name] | value if isinstance(value, dict) and name in SETTINGS else value
        for name, value in record.config.items()
    }
    given = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    for name in given:
        section, _, key = name.partition(".")
        if name != "device" and section != "metrics":
            raise UserError(f"{name}: the samples are there already; only device and metrics.… can be other ones")
        raw[section] = raw[section] | {key: here[section][key]} if key else here[section]
    raw = {name: here[name] for name in here} | raw
    return parse(raw | {"metrics": raw["metrics"] | {"names": list(metrics)}})


def runs_of(target: str, results_dir: Path) -> list[Record]:
    """The run of a folder, or the finished runs of an experiment, as far as their samples are in a store."""
    kept = [record for record in named(target, results_dir) if "samples" in record.made_from]
    if not kept:
        raise UserError(f"{target}: no finished run whose samples are kept in a store; run it again with this version")
    return kept
