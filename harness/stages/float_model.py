"""Images of the float model, drawn once per (model, protocol, seed, dtype) and kept by content address.

They are the reference of every paired metric, and, with other seeds, the measure of each metric's noise floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ditbench.eval.base import PerSample
from ditbench.eval.passport import SCORED_BY
from ditbench.harness.build.build import float_copy
from ditbench.harness.common.code_identity import code_identity
from ditbench.harness.common.files import cached, canonical_sha256, read_json, write_json
from ditbench.harness.generation.generate import conditions, generate, load_samples, save_samples
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.records import sample_values
from ditbench.harness.samples.samples import Samples
from ditbench.harness.stages.config import RunConfig

SEED_STRIDE = 1_000_003  # extra seeds lie far from the seeds that users give


def float_images(config: RunConfig, model: LoadedModel, seed: int, dtype: str | None = None) -> Samples:
    """The float model's images with the same labels and noise as a run with this seed; from the cache if there."""
    section = config.section("generate")
    dtype = dtype or section["reference_dtype"]
    path = config.cache_dir / "float" / _key(config, model, seed, dtype) / "images.npz"
    if (kept := cached(path, load_samples)) is not None:
        return kept
    images = generate(
        model,
        float_copy(model.target(), dtype=getattr(torch, dtype), device=config.device),
        conditions(model, config.protocol.n, seed, config.protocol.labels, config.protocol.prompts),
        config.protocol.sampler,
        batch_size=section["batch_size"],
        title=f"generate {model.spec.name} {dtype} seed {seed}",
    )
    save_samples(images, path)
    return images


def float_values(
    config: RunConfig,
    model: LoadedModel,
    metrics: dict[str, dict[str, Any]],
    evaluate: Callable[[list[str]], dict[str, PerSample]],
    evaluator: dict[str, Any],
) -> dict[str, PerSample]:
    """The given metrics of the float model's own samples, one by one; from the cache if there.

    metrics: entries of the record; what their passports say of the judge is part of the cache's key. evaluate: names →
    values of the float model's samples.
    """
    dtype = config.section("generate")["reference_dtype"]
    judges = {name: {key: entry["passport"].get(key) for key in SCORED_BY} for name, entry in metrics.items()}
    key = canonical_sha256([evaluator, judges])
    path = config.cache_dir / "float" / _key(config, model, config.seed, dtype) / f"values-{key[:16]}.npz"
    if (kept := cached(path, sample_values.load)) is not None:
        return dict(kept.float_model)
    found = evaluate(list(metrics))
    if found.keys() != metrics.keys():  # one of them broke, which it may not do next time
        return found
    sample_values.save(sample_values.Values({}, found, ""), path)
    return dict(sample_values.load(path).float_model)


def noise_floor(
    config: RunConfig,
    model: LoadedModel,
    metrics: dict[str, dict[str, Any]],
    evaluate: Callable[[Samples, Samples], dict[str, Any]],
    evaluator: dict[str, Any],
) -> None:
    """Write into each unpaired metric the largest difference between any two seeds of the 16-bit float model.

    Paired metrics have none: their noise is their interval. With fewer than one extra seed nothing is written.
    evaluator: everything that makes `evaluate` what it is (metric names, judge, reference), for the cache.
    """
    extra = config.section("generate")["noise_floor_seeds"]
    unpaired = {name for name, entry in metrics.items() if not entry["paired"] and entry["status"] == "ok"}
    if extra < 1 or not unpaired:
        return
    dtype = config.section("generate")["dtype"]
    seeds = [config.seed + SEED_STRIDE * k for k in range(extra + 1)]
    key = canonical_sha256([_key(config, model, config.seed, dtype), extra, evaluator])
    path = config.cache_dir / "noise" / f"{key}.json"
    floors: dict[str, float | None] = cached(path, read_json) or {}
    if unpaired - floors.keys():  # nothing is known, or a metric can run now that could not when the others were kept
        replicates = []
        for seed in seeds:
            images = float_images(config, model, seed, dtype)
            replicates.append(evaluate(images, images))
        whole = [name for name in unpaired if all(each[name]["status"] != "failed" for each in replicates)]
        floors |= {name: _range([each[name]["value"] for each in replicates]) for name in whole}
        write_json(path, floors)
    for name in unpaired:
        metrics[name]["noise_floor"] = floors.get(name)


def _range(values: list[float | None]) -> float | None:
    """None if the metric could not run on one of the replicates."""
    known = [value for value in values if value is not None]
    return max(known) - min(known) if len(known) == len(values) else None


def _key(config: RunConfig, model: LoadedModel, seed: int, dtype: str) -> str:
    return canonical_sha256(
        {
            "weights": model.fingerprint,
            "protocol": config.section("protocol"),
            "prompts": [asdict(prompt) for prompt in config.protocol.prompts],
            "batch_size": config.section("generate")["batch_size"],
            "seed": seed,
            "dtype": dtype,
            "device": config.device.type,
            "code": code_identity(),
        }
    )
