"""What makes a run the run it is: everything that can change one of its numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ditbench.eval.base import plugin_sources
from ditbench.harness.common.code_identity import code_identity
from ditbench.harness.common.file_hashes import files_sha256
from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.fitting import registry
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.samples.others import LINES, files_in
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.loaded import judge_in, reference_of


def run_id(config: RunConfig, model: LoadedModel) -> str:
    return canonical_sha256(identity(config, model))[:12]


def identity(config: RunConfig, model: LoadedModel) -> dict[str, Any]:
    """Everything that can change a number of this run. Of the device its kind, not its place among its equals."""
    return (
        config.identity()
        | {
            "weights": model.fingerprint,
            "prompts": [asdict(p) for p in (*config.protocol.prompts, *config.calibration_prompts)],
            "noise": config.protocol.noise.sha256 or config.protocol.noise.kind,
            "evaluator": evaluator_identity(config, model),
            "device": config.device.type,
            "code": code_identity(),
            "method_source": registry.source_sha256(config.method),
        }
        | ({"files": files_of(config)} if config.method == registry.EXTERNAL else {})
    )


def evaluator_identity(config: RunConfig, model: LoadedModel) -> dict[str, Any]:
    """Everything that makes the evaluation what it is: metrics and plugins, judge, reference."""
    judge = judge_in(model.extras.get("judge"), config.device)
    reference = reference_of(config.section("metrics")["reference"])
    return {
        "metrics": config.section("metrics"),
        "judge": judge and judge.sha256,
        "reference": reference and reference.sha256,
        "metric_plugins": plugin_sources(config.section("metrics")["names"]),
    }


def title(config: RunConfig) -> str:
    if config.method == registry.EXTERNAL:
        return f"{config.model.name} {config.method} {Path(config.params.path).name}"
    return f"{config.model.name} {config.method} {config.bits.label}"


def files_of(config: RunConfig) -> str:
    """SHA-256 of all that method=external loads, wherever it lies."""
    module = registry.method(config.method)
    place = module.place_of(config.params)
    if place.is_file():
        files = [place]
    elif module.holds_samples(place):
        files = [*files_in(place), *place.glob(LINES)]
    else:
        files = sorted(path for path in place.iterdir() if path.is_file())
    folder = place.parent if place.is_file() else place
    return canonical_sha256({str(path.relative_to(folder)): sha256 for path, sha256 in files_sha256(files).items()})
