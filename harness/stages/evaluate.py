"""Score samples with the run's metrics, the float model's own samples beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ditbench.eval.base import Evidence, PerSample, evaluate_samples, known_metrics
from ditbench.eval.needs import lacking, offered
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.timer import say
from ditbench.harness.generation.generate import conditions
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.records import sample_values
from ditbench.harness.samples.samples import Samples
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.float_model import float_values, noise_floor
from ditbench.harness.stages.identity import evaluator_identity, title
from ditbench.harness.stages.loaded import judge_in, reference_of


def evaluate(
    config: RunConfig, model: LoadedModel, images: Samples, float_model: Samples
) -> tuple[dict[str, Any], sample_values.Values]:
    """The record's `metrics`, and the values per sample of the run and of the float model."""
    entries, found = scored(config, model, images, float_model)
    of_float = float_values(
        config,
        model,
        {name: entries[name] for name in found if not entries[name]["paired"]},
        evaluate=lambda names: scored(config, model, float_model, float_model, names)[1],
        evaluator=evaluator_identity(config, model),
    )
    return entries, sample_values.Values(found, of_float, sample_values.drawn(images, config.seed))


def add_noise_floor(config: RunConfig, model: LoadedModel, metrics: dict[str, Any]) -> None:
    """How far apart two seeds of the float model are, into each entry that is not paired with it."""
    noise_floor(
        config,
        model,
        metrics,
        evaluate=lambda ours, theirs: scored(config, model, ours, theirs)[0],
        evaluator=evaluator_identity(config, model),
    )


def scored(
    config: RunConfig, model: LoadedModel, images: Samples, float_model: Samples, names: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, PerSample]]:
    """The record's `metrics`, and the values per sample; names: of some of the run's metrics only."""
    evidence = evidence_of(config, model, images, float_model)
    entries, samples = evaluate_samples(config.section("metrics")["names"] if names is None else names, evidence)
    for name, entry in entries.items():
        if entry["status"] == "failed":
            say(f"{title(config)}: {name} FAILED: {entry['reason']}")
    return entries, samples


def evidence_of(config: RunConfig, model: LoadedModel, images: Samples, float_model: Samples | None) -> Evidence:
    section = config.section("metrics")
    return Evidence(
        generated=images,
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
    wanted = conditions(model, 1, config.seed, config.protocol.labels, config.protocol.prompts)
    unseen = Samples(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), wanted.labels_N, prompts=config.protocol.prompts)
    has = offered(evidence_of(config, model, unseen, None))
    problems = {name: lacking(known_metrics()[name], has) for name in config.section("metrics")["names"]}
    skipped = "\n".join(f"  {name}: {'; '.join(found)}" for name, found in problems.items() if found)
    if skipped:
        raise UserError(f"--strict: {config.model.name}: these metrics would be skipped\n{skipped}")
