"""One benchmark, told from top to bottom: candidates → latency by batch → memory → where the time goes → roofline → record."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ditbench.harness.bench.candidates import BASELINE, COMPILED, EAGER, Candidate, baseline, quantized
from ditbench.harness.bench.parts import by_component, shares
from ditbench.harness.bench.profiles import Profile, least, profiled
from ditbench.harness.bench.roofline import roofline
from ditbench.harness.bench.workers import Job, Remote, workers
from ditbench.harness.build.build import float_copy, quant_layers
from ditbench.harness.build.flat_calls import output_of, relative_error
from ditbench.harness.common.errors import UserError, reason
from ditbench.harness.common.files import write_json
from ditbench.harness.common.watch import say
from ditbench.harness.generation.generate import conditions
from ditbench.harness.measurement.latency import peak_memory_bytes, quantiles
from ditbench.harness.measurement.timing import in_turns, timed
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.target import Target
from ditbench.harness.records.environment import environment
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import target_of
from ditbench.harness.sweep.compose import composed

SCHEMA = 3  # 1 had no error and no baseline, 2 no profile
PROFILED = 15  # calls of each
PLACES = ("results_dir=", "model.source=", "device=", "hydra.")  # overrides that say where and not what
FLAGS = {"bits": "--formats", "measure.repeats": "--repeats"}


@dataclass(frozen=True)
class Options:
    """formats: labels such as w8a8. batches: rows of one call of the transformer. others: engines of `engines/`."""

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
    inputs, refused = inputs_of(model, config, options.batches[0]), Refused()
    candidates = usable(candidates, inputs, refused)
    jobs = [
        Job(other, config.raw, quantized_layers(candidates), options.modes, torch.get_num_threads())
        for other in options.others
    ]
    with workers(jobs, config.device, refused) as remotes:
        say(f"bench: {model.spec.name} on {config.device}, {len(candidates) + len(remotes)} candidates take turns")
        rows = []
        for batch in options.batches:
            rows += Round(candidates, remotes, model, target, config, batch).rows(options, refused)
        profile = refused.unless(
            "profile", lambda: profiles(candidates, remotes, inputs, options.batches[0], target, config.device, refused)
        )
    record = {
        "schema": SCHEMA,
        "model": model.spec.name,
        "method": config.method,
        "overrides": [each for each in overrides if not each.startswith(PLACES)],
        "env": environment(config.device, config.seed),
        "rows": rows,
        "profile": profile,
        "shares": refused.unless("shares", lambda: layer_shares(candidates, inputs, config.device)),
        "components": refused.unless("components", lambda: components(candidates, model, config)),
        "roofline": refused.unless("roofline", lambda: roofline(config.device, options.repeats)),
        "refused": refused,
    }
    return record, written(record, config)


def quantized_layers(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The layers of the first format that round anything, which are what others quantize."""
    for candidate in candidates:
        if found := tuple(name for name, layer in quant_layers(candidate.model).items() if layer.rounds):
            return found
    return ()


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


@dataclass(frozen=True)
class Round:
    """All that take turns, at one number of rows."""

    candidates: Sequence[Candidate]
    remotes: Sequence[Remote]
    model: LoadedModel
    target: Target
    config: RunConfig
    batch: int

    @torch.no_grad()
    def rows(self, options: Options, refused: dict[str, str]) -> list[dict[str, Any]]:
        """One row per candidate: its latency, against bf16 and which; its error to float32; its memory."""
        device, inputs = self.config.device, inputs_of(self.model, self.config, self.batch)
        errors = self.errors(inputs)
        remotes = {_key(each): each for each in self.remotes if each.why is None}
        calls = {_key(c): timed(lambda c=c: c.model(**inputs), device) for c in self.candidates}
        calls |= {key: partial(each.seconds, self.batch) for key, each in remotes.items()}
        times = in_turns(calls, repeats=options.repeats, warmup=options.warmup, title="bench")
        refused |= {_key(each): each.why for each in self.remotes if each.why is not None}
        medians = {key: quantiles(found) for key, found in times.items() if key not in refused}
        found = []
        for each in [*self.candidates, *remotes.values()]:
            if (key := _key(each)) not in medians:
                continue
            ours = isinstance(each, Candidate)
            against = baseline_of(each.mode, options.modes)
            theirs = medians.get(f"{BASELINE} {against}")
            found.append(
                {
                    "format": each.label,
                    "mode": each.mode,
                    "backend": each.backend if ours else each.engine,
                    "rows": self.batch,
                    "latency_ms": medians[key],
                    "baseline": f"{BASELINE} {against}" if theirs else None,
                    "speedup": theirs["median"] / medians[key]["median"] if theirs else None,
                    "error": errors[key],
                    "held_bytes": each.held_bytes,
                    "peak_bytes": peak_memory_bytes(each.model, inputs, device)
                    if ours and each.mode == EAGER
                    else None,
                }
            )
        return found

    def errors(self, inputs: dict[str, Any]) -> dict[str, float | None]:
        """{candidate: ‖y − ŷ‖ / ‖ŷ‖} of its prediction y, ŷ being that of the float model in float32."""
        device = self.config.device
        arguments = self.model.step_inputs(self.batch, device)
        float_model = float_copy(self.target, dtype=torch.float32, device=device)
        expected = output_of(float_model(**placed(arguments, torch.float32, device))).cpu()
        del float_model
        outputs = {_key(c): output_of(c.model(**inputs)).float().cpu() for c in self.candidates}
        outputs |= {_key(each): y for each in self.remotes if (y := each.output(self.batch)) is not None}
        return {key: relative_error(y, expected) for key, y in outputs.items()}


def _key(each: Candidate | Remote) -> str:
    return f"{each.label} {each.mode}"


def baseline_of(mode: str, modes: Sequence[str]) -> str:
    """The mode of the bf16 that a row is compared with: its own; eager where it has a mode of its own."""
    return mode if mode in modes else EAGER if EAGER in modes else modes[0]


def inputs_of(model: LoadedModel, config: RunConfig, batch: int) -> dict[str, Any]:
    return placed(model.step_inputs(batch, config.device), torch.bfloat16, config.device)


def layer_shares(
    candidates: Sequence[Candidate], inputs: dict[str, Any], device: torch.device
) -> dict[str, dict[str, float]]:
    """{format: {part: share of an eager step}} of those with our layers."""
    ours = [c for c in candidates if c.mode == EAGER and quant_layers(c.model)]
    return {c.label: shares(c.model, inputs, device) for c in ours}


@torch.no_grad()
def profiles(
    candidates: Sequence[Candidate],
    remotes: Sequence[Remote],
    inputs: dict[str, Any],
    batch: int,
    target: Target,
    device: torch.device,
    refused: dict[str, str],
) -> dict[str, Any]:
    """Where the time of an eager call, and of other engines' calls, goes, all taking turns: {"rows", "calls", "of": {format: {part:
    {node: ms}}}}. Of accelerators nothing: what a kernel takes there is not when its operator is called.
    """
    if device.type != "cpu":
        return {}
    ours = {c.label: c.model for c in candidates if c.mode == EAGER}
    theirs = {each.label: each for each in remotes if each.can_profile and each.why is None}
    found: dict[str, list[Profile]] = {label: [] for label in (*ours, *theirs)}
    for _ in range(PROFILED):
        for label, model in ours.items():
            found[label].append(profiled(model, inputs))
        for label, remote in theirs.items():
            if (profile := remote.profile(batch)) is not None:
                found[label].append(profile)
    refused |= {f"profile of {label}": each.why for label, each in theirs.items() if each.why is not None}
    told = {label: least(calls, target.blocks) for label, calls in found.items() if calls}
    return {"rows": batch, "calls": PROFILED, "of": told} if told else {}


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
