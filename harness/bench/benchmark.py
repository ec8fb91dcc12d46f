"""One benchmark, told from top to bottom: candidates → latency by batch → memory → where the time goes → roofline → record."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ditbench.harness.bench.candidates import BASELINE, COMPILED, EAGER, Candidate, baseline, quantized
from ditbench.harness.bench.others import OTHERS
from ditbench.harness.bench.parts import by_component, shares
from ditbench.harness.bench.roofline import roofline
from ditbench.harness.build.build import quant_layers
from ditbench.harness.common.errors import UserError, reason
from ditbench.harness.common.files import write_json
from ditbench.harness.common.watch import say
from ditbench.harness.generation.generate import conditions
from ditbench.harness.measurement.latency import peak_memory_bytes, quantiles
from ditbench.harness.measurement.timing import interleaved
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import placed
from ditbench.harness.records.environment import environment
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import target_of
from ditbench.harness.sweep.compose import composed

SCHEMA = 1
FLAGS = {"bits": "--formats", "measure.repeats": "--repeats"}


@dataclass(frozen=True)
class Options:
    """formats: labels such as w8a8. batches: rows of one call of the transformer. others: of OTHERS."""

    formats: tuple[str, ...] = ("w8a8", "w4a8")
    modes: tuple[str, ...] = (EAGER, COMPILED)
    batches: tuple[int, ...] = (2,)
    others: tuple[str, ...] = ()
    repeats: int = 15
    warmup: int = 3


def bench(options: Options, overrides: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """→ (the benchmark's record, the file it was written to: <results_dir>/bench/…json).

    Raises:
        UserError: a value that cannot be used or has a flag of its own, or a format that no real backend on this device runs.
    """
    _refuse_flags_of_others(overrides)
    configs = [parse(raw) for raw in composed([[*overrides, f"bits={label}"] for label in options.formats])]
    config = configs[0]
    model = model_of(config.model)
    target = target_of(config, model)
    candidates = list(baseline(target, config.device, options.modes))
    for each in configs:
        candidates += quantized(each, model, target, options.modes)
    for other in options.others:
        candidates += OTHERS[other](target, config.device, options.modes)
    inputs, refused = inputs_of(model, config, options.batches[0]), Refused()
    candidates = usable(candidates, inputs, refused)
    say(f"bench: {model.spec.name} on {config.device}, {len(candidates)} candidates take turns")
    record = {
        "schema": SCHEMA,
        "model": model.spec.name,
        "method": config.method,
        "env": environment(config.device, config.seed),
        "rows": [row for batch in options.batches for row in latencies(candidates, model, config, batch, options)],
        "shares": refused.unless("shares", lambda: layer_shares(candidates, inputs, config.device)),
        "components": refused.unless("components", lambda: components(candidates, model, config)),
        "roofline": refused.unless("roofline", lambda: roofline(config.device, options.repeats)),
        "refused": refused,
    }
    return record, written(record, config)


def _refuse_flags_of_others(overrides: Sequence[str]) -> None:
    """Raise UserError for settings of a run that a benchmark has flags for, and would not look at."""
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if flag := FLAGS.get(name):
            raise UserError(
                f"{override}: of a benchmark this is a flag; write {flag} {value.strip('[]').replace(',', ' ')}"
            )


class Refused(dict[str, str]):
    """{what did not run: why}. One candidate that a compiler gives up, or one view of the time, must not cost the rest."""

    def unless(self, name: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured; empty if it failed."""
        try:
            return measured()
        except Exception as error:
            self[name] = reason(error)[:200]
            return {}


@torch.no_grad()
def usable(candidates: Sequence[Candidate], inputs: dict[str, Any], refused: Refused) -> list[Candidate]:
    """Those that run."""
    able = []
    for candidate in candidates:
        try:
            candidate.model(**inputs)
            able.append(candidate)
        except Exception as error:
            refused[f"{candidate.label} {candidate.mode}"] = reason(error)[:200]
    return able


def latencies(
    candidates: Sequence[Candidate], model: LoadedModel, config: RunConfig, batch: int, options: Options
) -> list[dict[str, Any]]:
    """One row per candidate: its latency, against bf16 in the same mode, and its memory."""
    inputs = inputs_of(model, config, batch)
    calls = {f"{c.label} {c.mode}": (lambda c=c: c.model(**inputs)) for c in candidates}
    times = interleaved(calls, config.device, repeats=options.repeats, warmup=options.warmup)
    medians = {name: quantiles(found) for name, found in times.items()}
    return [
        {
            "format": c.label,
            "mode": c.mode,
            "backend": c.backend,
            "rows": batch,
            "latency_ms": medians[f"{c.label} {c.mode}"],
            "speedup": medians[f"{BASELINE} {c.mode}"]["median"] / medians[f"{c.label} {c.mode}"]["median"],
            "held_bytes": c.held_bytes,
            "peak_bytes": peak_memory_bytes(c.model, inputs, config.device)
            if c.mode == EAGER and c.held_bytes
            else None,
        }
        for c in candidates
    ]


def inputs_of(model: LoadedModel, config: RunConfig, batch: int) -> dict[str, Any]:
    return placed(model.step_inputs(batch, config.device), torch.bfloat16, config.device)


def layer_shares(
    candidates: Sequence[Candidate], inputs: dict[str, Any], device: torch.device
) -> dict[str, dict[str, float]]:
    """{format: {part: share of an eager step}} of those with our layers."""
    ours = [c for c in candidates if c.mode == EAGER and quant_layers(c.model)]
    return {c.label: shares(c.model, inputs, device) for c in ours}


def components(candidates: Sequence[Candidate], model: LoadedModel, config: RunConfig) -> dict[str, dict[str, float]]:
    """{format: {component: ms}} of drawing one sample; empty for a model that draws nothing (random weights)."""
    if model.spec.random is not None:
        return {}
    wanted = conditions(model, 1, config.seed, config.protocol.labels, config.protocol.prompts)
    return {
        c.label: by_component(model, c.model, wanted, config.protocol.sampler, config.device)
        for c in candidates
        if c.mode == EAGER
    }


def written(record: dict[str, Any], config: RunConfig) -> Path:
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    device = re.sub(r"[^A-Za-z0-9]+", "-", record["env"]["device"]).strip("-").lower()
    path = config.results_dir / "bench" / f"{record['model']}-{device}-{now}.json"
    write_json(path, record)
    return path
