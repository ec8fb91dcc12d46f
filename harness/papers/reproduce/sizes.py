"""How much a reproduction takes, by the plans of its runs (`sweep/plan.py`): operations, hours, memory, disk.

Weights that are not on this machine are planned with a model of the same shapes that has none (`conf/model/*-random.yaml`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ditbench.harness.build.offload import OFFLOAD, RESIDENT
from ditbench.harness.common.devices import device_name
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import options
from ditbench.harness.fitting import registry
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.counts import Counts, counted
from ditbench.harness.models.skeleton import module_parts, skeleton
from ditbench.harness.papers.reproduce.rows import prompts_here
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.sweep.compose import composed
from ditbench.harness.sweep.estimate import Estimate, Stage
from ditbench.harness.sweep.rates import Earlier, Rates, probed

RANDOM = "-random"  # what a model of the same shapes is called
# Of those that have no file of their own: a model with random weights, and what is different.
SAME_SHAPES: dict[str, tuple[str, ...]] = {
    "dit-xl-2-512": ("model=dit-xl-2-256-random", "model.random.sample_size=64"),
    "pixart-alpha-xl-2-512": (
        "model=pixart-xl-2-1024-random", "model.random.sample_size=64", "model.size.height=512", "model.size.width=512",
        "model.random.inputs.hidden_states=[4,64,64]", "model.random.inputs.encoder_hidden_states=[120,4096]",
        "model.random.inputs.encoder_attention_mask.shape=[120]",
    ),
    "pixart-alpha-xl-2-1024": ("model=pixart-xl-2-1024-random",),
    "pixart-sigma-xl-2-1024": ("model=pixart-xl-2-1024-random",),
    "flux.1-schnell": (
        "model=flux.1-dev-random", "model.random.guidance_embeds=false", "model.random.inputs.guidance=null",
    ),
    "z-image-turbo": ("model=z-image-random",),
    "cogvideox-5b": (  # without its rotations of q and k, which are no products of matrices
        "model=cogvideox-2b-random", "model.random.num_attention_heads=48", "model.random.num_layers=42",
    ),
    "hunyuan-video": (  # diffusers' own defaults are its shapes; 61 frames of 544 × 960 are 16 of 68 × 120
        "model=hunyuan-video", "model.source=null",
        "model.random={inputs:{hidden_states:[16,16,68,120],timestep:{shape:[],value:500},encoder_hidden_states:[256,4096],"
        "encoder_attention_mask:{shape:[256],value:1},pooled_projections:[768],guidance:{shape:[],value:6000}}}",
    ),
    "sana-1600m-1024": (  # likewise
        "model=sana-1600m-1024", "model.source=null", "model.size={height:1024,width:1024}",
        "model.random={inputs:{hidden_states:[32,32,32],encoder_hidden_states:[300,2304],"
        "encoder_attention_mask:{shape:[300],value:1},timestep:{shape:[],value:500}}}",
    ),
}  # fmt: skip
# Dense multiply-accumulates a second that the data sheet of an H100 SXM gives, and the part of them that is taken to be reached.
PEAK_MACS_S = {"bfloat16": 494.7e12, "float16": 494.7e12, "float32": 33.5e12}
REACHED = 1 / 3


@dataclass
class Sizes:
    """Of all runs. at_least: stages of which more is known to come. device: {memory=…: (host, device) bytes at most}.

    unplanned: {model: why nothing is known of it}. unknown: what could not be counted. stand_ins: {model: planned with}.
    """

    macs: float = 0.0
    gpu_s: float = 0.0
    here_s: float = 0.0
    disk_bytes: float = 0.0
    at_least: set[str] = field(default_factory=set)
    device: dict[str, tuple[float, float]] = field(default_factory=dict)
    transformer: dict[str, float] = field(default_factory=dict)  # bytes of its weights
    unplanned: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)
    stand_ins: dict[str, str] = field(default_factory=dict)
    runs: int = 0
    here: str = ""
    measured: bool = False  # this machine has an accelerator, so that here_s are hours of it


def sizes(configs: Iterable[Mapping[str, Any]]) -> Sizes:
    """Add up the plans of these configurations; rates are probed once for each model, on a method that rounds."""
    found, made = Sizes(), set[Path]()
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for config in configs:
        by_model.setdefault(config["model"]["name"], []).append(config)
    for name, runs in by_model.items():
        try:
            model, spec = _shapes(name, runs[0])
        except UserError as error:
            found.unplanned[name] = str(error).replace("\n", " ")
            continue
        if spec is not None:
            found.stand_ins[name] = "random weights" if spec["name"] == name else str(spec["name"])
        _add_model(found, model, spec, runs, made)
    return found


def _shapes(name: str, config: Mapping[str, Any]) -> tuple[LoadedModel, dict[str, Any] | None]:
    """The model without its weights, and the section `model` of another that stands in for it where they are not here."""
    try:
        return skeleton(_parsed(config, None).model), None
    except UserError as error:
        chosen = SAME_SHAPES.get(name)
        if chosen is None:
            if name + RANDOM not in {path.stem for path in options("model")}:
                raise error
            chosen = (f"model={name}{RANDOM}",)
    (raw,) = composed([chosen])
    spec = raw["model"] | {"dtype": config["model"]["dtype"]}
    return skeleton(_parsed(config, spec).model), spec


def _parsed(config: Mapping[str, Any], model: dict[str, Any] | None) -> RunConfig:
    raw = copy.deepcopy(dict(config)) | prompts_here(config)
    return parse(raw if model is None else raw | {"model": copy.deepcopy(model)})


def _add_model(
    found: Sizes,
    model: LoadedModel,
    spec: dict[str, Any] | None,
    runs: Sequence[Mapping[str, Any]],
    made: set[Path],
) -> None:
    counts: dict[tuple[str, float], Counts] = {}
    rates: Rates | None = None
    rounding = sorted(runs, key=lambda run: run["method"]["name"] == registry.FLOAT)
    for raw in rounding:
        try:
            config = _parsed(raw, spec)
        except UserError:
            continue  # refused when it is run, which the table says
        sampler = config.protocol.sampler
        key = (sampler.kind, sampler.guidance)
        if key not in counts:
            counts[key] = counted(model, sampler)
        rates = rates or probed(config, model, counts[key])
        _add_run(found, Estimate(config, model, counts[key], rates, Earlier(), 0.0, config.device.type != "cpu"), made)
        found.here, found.measured = device_name(config.device), config.device.type != "cpu"
    name = runs[0]["model"]["name"]
    found.transformer[name] = max((each.weights for each in counts.values()), default=0)
    if spec is not None and "vae" not in module_parts(model.pipe):
        found.unknown[f"what of {name} is not its transformer: VAE, text encoders, their weights and time"] = None
    else:
        found.unknown |= dict.fromkeys(line for each in counts.values() for line in each.unknown)


def _add_run(found: Sizes, estimate: Estimate, made: set[Path]) -> None:
    before = set(made)
    dtypes = estimate.config.section("generate")
    of_stage = {"calibrate": estimate.config.model.dtype, "quantize": "float32", "layer errors": "float32"}
    of_stage["reference"] = dtypes["reference_dtype"]
    for stage in estimate.stages(made):
        found.macs += stage.macs
        found.gpu_s += stage.macs / (REACHED * PEAK_MACS_S[of_stage.get(stage.name, dtypes["dtype"])])
        found.here_s += stage.seconds or 0.0
        found.disk_bytes += stage.disk_bytes
        if stage.seconds is None or stage.at_least:
            found.at_least.add(stage.name)
    for memory in (RESIDENT, OFFLOAD):
        there = replace(estimate, config=replace(estimate.config, memory=memory), accelerated=True).stages(set(before))
        so_far = found.device.get(memory, (0.0, 0.0))
        found.device[memory] = (_most(there, "host_bytes", so_far[0]), _most(there, "device_bytes", so_far[1]))
    found.runs += 1


def _most(stages: Iterable[Stage], what: str, so_far: float) -> float:
    return max([so_far, *(getattr(stage, what) for stage in stages)])
