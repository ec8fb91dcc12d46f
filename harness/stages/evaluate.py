"""Score samples with the run's metrics, the float model's own samples beside them; each metric's values are kept by what made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t

from ditbench.eval.base import Evidence, PerSample, evaluate_samples, known_metrics
from ditbench.eval.needs import lacking, offered
from ditbench.eval.paired_differences import differences
from ditbench.harness.common.artifacts import obtain
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import read_json, write_json
from ditbench.harness.common.watch import say
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.records import sample_values
from ditbench.harness.samples.samples import Samples
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.generate import Drawn, float_samples
from ditbench.harness.stages.identity import title
from ditbench.harness.stages.keys import keeps_latents, values_address, wanted
from ditbench.harness.stages.loaded import judge_in, reference_of

SEED_STRIDE = 1_000_003  # seeds of the noise floor lie far from those that users give
ENTRY, PER_SAMPLE = "entry.json", "per_sample.npz"

Scored = tuple[dict[str, Any], PerSample | None]  # the record's entry of one metric, and its values per sample


def evaluate(
    config: RunConfig, model: LoadedModel, samples: Drawn, float_model: Drawn
) -> tuple[dict[str, Any], sample_values.Values]:
    """The record's `metrics`, each held against the float model, and the values per sample of the run and of the float model."""
    entries, found = scored(config, model, samples, float_model)
    unpaired = [name for name in found if not entries[name]["paired"]]
    its_entries, of_float = scored(config, model, float_model, float_model, unpaired)
    if _broke(its_entries):  # on files that were damaged under our hands: they are drawn again, once
        float_model = float_samples(config, model, seed=config.seed)
        of_float = scored(config, model, float_model, float_model, unpaired)[1]
    hold_against_float(entries, found, of_float)
    return entries, sample_values.Values(found, of_float, sample_values.drawn(samples.samples, config.seed))


def hold_against_float(
    metrics: dict[str, Any], found: Mapping[str, PerSample], of_float: Mapping[str, PerSample]
) -> None:
    """Write into each unpaired metric's entry what the run has against the float model of the same noise, and its noise floor.

    against_float: difference (run − float model), its 95 % interval, p and their methods (eval/paired_differences.py).
    noise_floor: half of that interval, how far chance alone sets two models of equal quality apart. Noise and prompts are shared,
    so no other seeds are needed; metrics that have nothing per sample get theirs from `add_noise_floor`.
    """
    for name, one in found.items():
        if name not in of_float or np.isnan(one.values_N - of_float[name].values_N).all():
            continue  # no sample counts on both sides
        (difference,) = differences([(one, of_float[name])])
        if np.isfinite(difference.ci95).all():
            low, high = difference.ci95
            metrics[name]["noise_floor"] = (high - low) / 2
            metrics[name]["against_float"] = {
                "difference": difference.value,
                "ci95": [low, high],
                "p": difference.p,
                "n": difference.n,
                "test": difference.test,
                "ci_method": difference.ci_method,
            }


def add_noise_floor(config: RunConfig, model: LoadedModel, metrics: dict[str, Any]) -> list[str]:
    """Write the values of other seeds of the float model, and the noise floors that rest on them → the keys of their samples."""
    section = config.section("generate")
    if section["noise_floor_seeds"] < 1 or not _unpaired(metrics):
        return []
    seeds = [config.seed + SEED_STRIDE * k for k in range(section["noise_floor_seeds"] + 1)]

    def draw() -> list[Drawn]:
        return [float_samples(config, model, seed, section["dtype"]) for seed in seeds]

    drawn = draw()
    if not write_noise_floor(
        config, model, metrics, drawn
    ):  # files that were damaged under our hands are drawn again, once
        write_noise_floor(config, model, metrics, draw())
    return [each.key for each in drawn]


def write_noise_floor(config: RunConfig, model: LoadedModel, metrics: dict[str, Any], drawn: list[Drawn]) -> bool:
    """Whether no metric broke on these samples.

    float_seeds: each unpaired metric's value of every seed of the 16-bit float model, its own first.

    noise_floor, where nothing per sample gave one: how far two seeds lie apart in 95 of 100 cases. Paired metrics have none: their noise
    is their interval. With one seed nothing is written.
    """
    unpaired = _unpaired(metrics)
    if len(drawn) < 2 or not unpaired:
        return True
    replicates = [scored(config, model, each, each, unpaired)[0] for each in drawn]
    for name in unpaired:
        values = [each[name]["value"] for each in replicates]
        metrics[name]["float_seeds"] = values
        if metrics[name]["noise_floor"] is None:
            metrics[name]["noise_floor"] = apart(values)
    return not any(map(_broke, replicates))


def _broke(entries: dict[str, Any]) -> bool:
    return any(entry["status"] == "failed" for entry in entries.values())


def _unpaired(metrics: dict[str, Any]) -> list[str]:
    return [name for name, entry in metrics.items() if not entry["paired"] and entry["status"] == "ok"]


def apart(values: list[float | None]) -> float | None:
    """t_{k−1, 97.5 %} · √2 · sd of k seeds: the difference of two more has that at most, 95 times in 100.

    None if the metric could not run on one of them.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return float(t.ppf(0.975, len(known) - 1) * np.sqrt(2) * np.std(known, ddof=1))


def scored(
    config: RunConfig, model: LoadedModel, samples: Drawn, float_model: Drawn, names: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, PerSample]]:
    """The record's `metrics`, and the values per sample; names: of some metrics only, not of all that the run asks for.

    A metric that was computed on the same samples before is read; one that failed or was skipped is tried again.
    """
    evidence = evidence_of(config, model, samples.samples, float_model.samples)
    entries, values = {}, {}
    for name in config.section("metrics")["names"] if names is None else names:
        entry, per_sample = obtain(
            values_address(config, model, name, samples.key, float_model.key),
            lambda name=name: _of_one(name, evidence),
            _write,
            _read,
            keep=lambda scored: scored[0]["status"] == "ok",
        ).value
        if entry["status"] == "failed":
            say(f"{title(config)}: {name} FAILED: {entry['reason']}")
        entries[name] = entry
        if per_sample is not None:
            values[name] = per_sample
    return entries, values


def evidence_of(config: RunConfig, model: LoadedModel, samples: Samples, float_model: Samples | None) -> Evidence:
    section = config.section("metrics")
    return Evidence(
        generated=samples,
        float_model=float_model,
        reference=reference_of(section["reference"]),
        judge=judge_in(model.extras.get("judge"), config.device),
        seed=config.seed,
        resamples=section["resamples"],
        device=config.device,
    )


def refuse_skipped_metrics(config: RunConfig, model: LoadedModel) -> None:
    """Raise UserError, a line per metric that lacks something which can be known before the run; nothing is calibrated or
    generated.
    """
    asked = wanted(config, model, config.seed).rows(0, 1)
    latents = torch.zeros(1, 1) if keeps_latents(config) else None
    unseen = Samples(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), asked.labels_N, latents, config.protocol.prompts)
    has = offered(evidence_of(config, model, unseen, None))
    problems = {name: lacking(known_metrics()[name], has) for name in config.section("metrics")["names"]}
    skipped = "\n".join(f"  {name}: {'; '.join(found)}" for name, found in problems.items() if found)
    if skipped:
        raise UserError(f"--strict: {config.model.name}: these metrics would be skipped\n{skipped}")


def _of_one(name: str, evidence: Evidence) -> Scored:
    entries, values = evaluate_samples([name], evidence)
    return entries[name], values.get(name)


def _write(scored: Scored, folder: Path) -> None:
    entry, per_sample = scored
    write_json(folder / ENTRY, entry)
    if per_sample is not None:
        sample_values.save(sample_values.Values({"metric": per_sample}, {}, ""), folder / PER_SAMPLE)


def _read(folder: Path) -> Scored:
    path = folder / PER_SAMPLE
    entry = read_json(folder / ENTRY)
    return entry, next(iter(sample_values.load(path).run.values())) if path.exists() else None
