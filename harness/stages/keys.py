"""Where each stage's artifact lies: the hash of all that makes it, and of nothing else (docs/architecture.md, "Identity and artifacts")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ditbench.eval.base import known_metrics, plugin_sources
from ditbench.eval.weights import others_here
from ditbench.harness.common.artifacts import Address
from ditbench.harness.common.code_identity import SAMPLES, STATE, VALUES, code_identity
from ditbench.harness.common.devices import computes_as
from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.fitting import registry
from ditbench.harness.generation.generate import conditions
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.samples import store
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.identity import title
from ditbench.harness.stages.loaded import judge_in, reference_of
from ditbench.harness.stages.states import chosen

SHORT = 32  # hex digits of a key: folders are made of them


def wanted(config: RunConfig, model: LoadedModel, seed: int) -> Conditions:
    """What the protocol asks to be drawn: labels or prompts, and the seed of each sample."""
    asked = config.protocol
    return conditions(model, asked.n, seed, asked.labels, asked.prompts, asked.noise)


def quantized_key(config: RunConfig, model: LoadedModel, recording: str, plan: Mapping[str, Any]) -> str | None:
    """Of the model that samples are drawn with: method, bits, what it was fitted on; None for the float model itself.

    plan: of mixed precision, which may rest on latencies measured here.
    """
    if config.method == registry.FLOAT:
        return None
    protocol = config.section("protocol")
    return _hash(
        {
            "model": model.fingerprint,
            "recording": recording,
            "method": config.section("method"),
            "source": registry.source_sha256(config.method),
            "bits": config.section("bits"),
            "plan": dict(plan),
            "target": {name: protocol[name] for name in ("scope", "skip", "attention")},
            "dtype": config.section("generate")["dtype"],
            "backend": config.backend,
            "seed": config.seed,
            "device": config.device.type,
            "code": code_identity(*STATE),
        }
        | chosen(config)
    )


def samples_address(
    config: RunConfig, model: LoadedModel, *, seed: int, dtype: str, of: str | None = None, recording: str | None = None
) -> Address:
    """Of the float model's samples, or of those of a quantized one (of: its key)."""
    whose = f"{model.spec.name} {dtype}" if of is None else title(config)
    key = _hash(
        {
            "model": model.fingerprint,
            "quantized": of,
            "sampler": vars(config.protocol.sampler),
            "wanted": described(wanted(config, model, seed)),
            "dtype": dtype,
            "batch_size": config.section("generate")["batch_size"],
            "latents": keeps_latents(config),
            "device": config.device.type,
            "computes_as": computes_as(config.device),  # two machines may share the cache
            "code": code_identity(*SAMPLES),
        }
    )
    return Address(
        config.cache_dir,
        store.KIND,
        key,
        f"samples of {whose}, seed {seed}",
        {"recording": recording} if recording else {},
    )


def keeps_latents(config: RunConfig) -> bool:
    """Whether somebody asks for latents, or computes with them."""
    asked = config.section("metrics")["names"]
    return config.section("generate")["keep_latents"] or any("latents" in known_metrics()[n].asks for n in asked)


def values_address(config: RunConfig, model: LoadedModel, metric: str, samples: str, float_model: str) -> Address:
    """Of one metric of some samples (keys of both stores)."""
    judge, reference = (
        judge_in(model.extras.get("judge"), config.device),
        reference_of(config.section("metrics")["reference"]),
    )
    key = _hash(
        {
            "metric": metric,
            "samples": samples,
            "float_model": float_model,
            "seed": config.seed,
            "resamples": config.section("metrics")["resamples"],
            "judge": judge and judge.sha256,
            "reference": reference and reference.sha256,
            "plugin": plugin_sources([metric]),
            "networks": others_here() if known_metrics()[metric].needs or plugin_sources([metric]) else {},
            "device": config.device.type,
            "code": code_identity(*VALUES),
        }
    )
    return Address(
        config.cache_dir,
        "values",
        key,
        f"{metric} of {model.spec.name}",
        {store.KIND: samples, "float_samples": float_model},
    )


def described(wanted: Conditions) -> dict[str, Any]:
    labels = None if wanted.labels_N is None else wanted.labels_N.tolist()
    prompts = [asdict(prompt) for prompt in wanted.prompts]
    return {"seeds": list(wanted.seeds), "labels": labels, "prompts": prompts, "noise": wanted.noise.sha256}


def _hash(values: dict[str, Any]) -> str:
    return canonical_sha256(values)[:SHORT]
