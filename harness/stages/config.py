"""From a composed configuration to frozen values. Only this file and `run.py` know what a configuration looks like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ditbench.harness.backends.base import AUTO
from ditbench.harness.calibration.salient import ALL
from ditbench.harness.common.devices import pick_device
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.paths import CONF
from ditbench.harness.common.type_checks import check_types
from ditbench.harness.fitting import registry
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.known_families import family
from ditbench.harness.models.lora import loras
from ditbench.harness.quant.sage import FORMS
from ditbench.harness.quant.spec import (
    BUDGETS,
    FLOAT_BITS,
    INT,
    MIXED,
    PER_BLOCK,
    WIDTHS,
    Bits,
    MixedBits,
    QuantSpec,
    parse_label,
)
from ditbench.harness.records.attempts import experiment_folder
from ditbench.harness.records.record import PLACES
from ditbench.harness.samples.conditions import PROMPTS
from ditbench.harness.samples.noise import OWN, Noise
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.stages.noise import load_noise
from ditbench.harness.stages.prompt_sets import load_prompts
from ditbench.harness.stages.values import check_parameters, check_sweep, check_values

# What can change a number; everything else (where results go, who is told) cannot.
IDENTITY = ("model", "method", "bits", "protocol", "calibration", "generate", "measure", "metrics", "seed", "backend")
AS_IT_IS = (registry.FLOAT, registry.EXTERNAL)  # rows that nothing is calibrated for, whatever bits a sweep is at
AS_STORED = "as stored"  # bits.label of what somebody else quantized, until its tensors are read


@dataclass(frozen=True)
class Protocol:
    """conf/protocol/: what must be equal between methods."""

    name: str
    scope: str
    skip: tuple[str, ...]
    attention: bool | str  # or one of `sage.FORMS`
    sampler: Sampler
    n: int
    labels: str
    prompts: tuple[Prompt, ...]
    noise: Noise


@dataclass(frozen=True)
class RunConfig:
    """One run, all defaults resolved. `raw` is what the record keeps."""

    raw: dict[str, Any]
    name: str
    model: ModelSpec
    method: str
    params: Any
    bits: Bits | MixedBits
    protocol: Protocol
    calibration_prompts: tuple[Prompt, ...]
    seed: int
    device: torch.device
    backend: str
    memory: str
    force: bool
    strict: bool
    results_dir: Path
    cache_dir: Path
    sweep: str | None = None  # the stamp of the sweep that it is a job of (`records/sweeps.py`)

    def section(self, name: str) -> dict[str, Any]:
        return self.raw[name]

    def identity(self) -> dict[str, Any]:
        """Without what only says where files lie: what lies there is hashed, however its place is spelled."""
        chosen = {name: self.raw[name] for name in IDENTITY}
        of_method = ("path",) if self.method == registry.EXTERNAL else ()
        only_places = {
            "model": PLACES,
            "method": of_method,
            "protocol": ("prompts", "noise"),
            "calibration": ("prompts",),
        }
        for section, places in only_places.items():
            chosen[section] = {key: value for key, value in chosen[section].items() if key not in places}
        return chosen


def parse(raw: dict[str, Any]) -> RunConfig:
    """Check a resolved configuration and turn it into values.

    Raises:
        UserError: a value that no part of ditbench can use; says which and what to do.
    """
    raw = {"memory": AUTO} | raw  # records from before there was a choice have none
    if isinstance(raw.get("measure"), dict):
        raw["measure"] = {"compile": False} | raw["measure"]
    if isinstance(raw.get("calibration"), dict):
        raw["calibration"] = {"select": ALL, "keep": 40} | raw["calibration"]
    sweep, _ = raw.pop("sweep", {}), raw.pop("launcher", None)  # no part of what a run is
    check_sweep(sweep)
    check_values(raw)
    if raw["method"]["name"] in AS_IT_IS:  # one run, whatever bits a sweep is at
        raw["bits"] = {key: raw["bits"][key] for key in ("weight", "act")} | {"label": "w16a16"}
        for side in ("weight", "act"):
            raw["bits"][side] = _in_float(raw["bits"][side], side)
    bits = _mixed(raw["bits"], raw["protocol"]["steps"]) if raw["bits"]["label"] == MIXED else _bits(raw["bits"])
    raw["bits"] = raw["bits"] | {"label": bits.label.lower()}  # of the widths, wherever they were set
    if raw["method"]["name"] == registry.EXTERNAL:
        raw["bits"]["label"] = AS_STORED
    for each in bits.candidates if isinstance(bits, MixedBits) else (bits,):
        registry.check_bits(raw["method"]["name"], each)
        _check_attention(raw["protocol"]["attention"], each)
    _check_given(raw, bits)
    params = registry.params_of(raw["method"])
    check_parameters(raw["method"])
    if raw["calibration"]["n"] == 0 and raw["calibration"]["select"] != ALL and raw["method"]["name"] not in AS_IT_IS:
        raise UserError(
            f"calibration.select={raw['calibration']['select']} chooses among what is recorded, and calibration.n=0 records "
            "nothing; set calibration.n to at least 1, or calibration.select=all"
        )
    if raw["method"]["name"] == registry.EXTERNAL:
        registry.method(registry.EXTERNAL).place_of(params)
    protocol = raw["protocol"]
    model = {key: value for key, value in raw["model"].items() if key != "usual"}
    check_types(ModelSpec, model, "model")
    loras(model.get("lora"))
    if model["source"] is None and model["random"] is None:
        raise UserError("model.source is null; name a folder or a hub id, or set model.random for random weights")
    _refuse_borrowed_name(model)
    protocol_prompts, calibration_prompts = _prompts(raw)
    noise = load_noise(protocol.get("noise", OWN))
    _check_noise(raw, noise, protocol_prompts)
    return RunConfig(
        raw=raw,
        name=experiment_folder(Path(raw["results_dir"]), raw["name"]).name,
        model=ModelSpec(**model),
        method=raw["method"]["name"],
        params=params,
        bits=bits,
        protocol=Protocol(
            name=protocol["name"],
            scope=protocol["scope"],
            skip=tuple(protocol["skip"]),
            attention=protocol["attention"],
            sampler=Sampler(
                protocol["sampler"],
                protocol["steps"],
                protocol["guidance"],
                protocol.get("guidance_2"),
                protocol.get("negative_prompt"),
            ),
            n=protocol["n"],
            labels=protocol["labels"],
            prompts=protocol_prompts,
            noise=noise,
        ),
        calibration_prompts=calibration_prompts,
        seed=raw["seed"],
        device=pick_device(raw["device"]),
        backend=raw["backend"],
        memory=raw["memory"],
        force=raw["force"],
        strict=raw["strict"],
        results_dir=Path(raw["results_dir"]).expanduser(),
        cache_dir=Path(raw["cache_dir"]).expanduser(),
        sweep=sweep.get("of"),
    )


def _refuse_borrowed_name(model: dict[str, Any]) -> None:
    """Raise UserError if another family's model would be recorded under the name of a shipped one."""
    shipped = CONF / "model" / f"{model['name']}.yaml"
    theirs = yaml.safe_load(shipped.read_text()).get("family") if shipped.is_file() else None
    if theirs is not None and theirs != model["family"]:
        raise UserError(
            f"model.name={model['name']} is a shipped model of family {theirs}, and this one is of family {model['family']}; set "
            "model.name=… to a name of your own"
        )


def _check_noise(raw: dict[str, Any], noise: Noise, prompts: tuple[Prompt, ...]) -> None:
    """Raise UserError for what only pipelines that are told by prompts take, and for one noise where prompts are drawn twice."""
    protocol, told = raw["protocol"], family(raw["model"]["family"]).CONDITION == PROMPTS
    if not told and (protocol.get("negative_prompt") is not None or noise.kind != OWN):
        name, usual = ("noise", OWN) if noise.kind != OWN else ("negative_prompt", "null")
        raise UserError(f"protocol.{name} is of models that are told by prompts; set protocol.{name}={usual}")
    if noise.kind != OWN and prompts and protocol["n"] > len(prompts):
        raise UserError(
            f"protocol.noise={protocol['noise']}: all samples begin with one noise, so a prompt that is drawn twice gives one sample twice; set "
            f"protocol.n to at most {len(prompts)}, the number of prompts"
        )


def _prompts(raw: dict[str, Any]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Those that are drawn and those of the calibration.

    Raises:
        UserError: a model that is told by prompts got none, or they cannot be read; both at once, if it is both.
    """
    model = raw["model"]
    places = {f"{section}.prompts": raw[section]["prompts"] for section in ("protocol", "calibration")}
    told = family(model["family"]).CONDITION == PROMPTS and model["random"] is None
    if told and (unset := [place for place, name in places.items() if not name]):
        raise UserError(
            f"model {model['name']} is told by prompts what to draw; set {' and '.join(unset)} to a set (`ditbench list "
            "prompts`) or to a file of your own"
        )
    found, problems = [], []
    for place, name in places.items():
        wanted = raw[place.partition(".")[0]]["n"]
        try:
            found.append(load_prompts(name, wanted) if name else ())
        except UserError as error:
            problems.append((place, name, str(error)))
    if problems:
        said = "; ".join(dict.fromkeys(error for _, _, error in problems))
        absent = [place for place, name, _ in problems if not Path(name).is_file()]
        own = f"; a file of your own will do: {' '.join(f'{place}=FILE' for place in absent)}" if absent else ""
        raise UserError(said + own)
    return found[0], found[1]


GRANULARITIES = {
    "weight": ("per_tensor", "per_channel", "per_group", PER_BLOCK),
    "act": ("per_tensor", "per_token", "per_group", PER_BLOCK),
}
_OF_ALL = ("bits", "number", "granularity", "group_size", "symmetric", "dynamic")  # settings that no label adds


def _in_float(node: dict[str, Any], side: str) -> dict[str, Any]:
    """A side's settings for the 16-bit reference: nothing of what a format in blocks says."""
    kept = {name: value for name, value in node.items() if name in _OF_ALL} | {"bits": FLOAT_BITS, "number": INT}
    if node["granularity"] == PER_BLOCK:
        kept |= {"granularity": "per_channel" if side == "weight" else "per_token", "group_size": None}
    return kept


def _check_attention(attention: bool | str, bits: Bits) -> None:
    """Of attention that methods quantize; a form (int8, …) goes with any bits."""
    if attention is True and bits.act is not None and bits.act.in_blocks:
        raise UserError(
            f"protocol.attention=true quantizes q, k, v and the softmax map per tensor, and bits={bits.label.lower()} has "
            f"activations in blocks; set protocol.attention to {', '.join(FORMS)} (with scales of their own) or false, or take "
            "bits=fp8 or integers"
        )


def _check_given(raw: dict[str, Any], bits: Bits | MixedBits) -> None:
    """Raise UserError where a form of attention has nothing to act on, or its time is not known."""
    attention = raw["protocol"]["attention"]
    if not isinstance(attention, str):
        return
    if raw["method"]["name"] == registry.EXTERNAL:
        raise UserError(
            f"method=external runs as somebody else quantized it, and protocol.attention={attention} would change that; set "
            "protocol.attention=false"
        )
    if isinstance(bits, MixedBits) and bits.budget == "latency_ms":
        raise UserError(
            f"bits.budget.latency_ms: protocol.attention={attention} is simulated, so latency is not known; take another "
            "budget, or protocol.attention=false"
        )


def _bits(node: dict[str, Any]) -> Bits:
    parse_label(node["label"])
    for side, known in GRANULARITIES.items():
        if node[side]["granularity"] not in known:
            raise unknown_name(f"granularity of bits.{side}", str(node[side]["granularity"]), known)
    sides: dict[str, QuantSpec | None] = {}
    for side in ("weight", "act"):
        values = dict(node[side])
        check_types(QuantSpec, values, f"bits.{side}")
        if values["bits"] not in (*WIDTHS, FLOAT_BITS):
            raise UserError(f"bits.{side}.bits must be 2 to 8, or 16 for float; got {values['bits']}")
        if values["group_size"] is not None and values["group_size"] < 1:
            raise UserError(f"bits.{side}.group_size must be at least 1, got {values['group_size']}")
        sides[side] = None if values["bits"] == FLOAT_BITS else QuantSpec(**values)
    bits = Bits(sides["weight"], sides["act"])
    bits.check_sides()
    return bits


def _mixed(node: dict[str, Any], steps: int) -> MixedBits:
    labels = node["candidates"]
    if not isinstance(labels, list) or not labels or len(set(map(str, labels))) < len(labels):
        raise UserError(f"bits.candidates must be a list of different formats such as [w4a8,w8a8], got {labels!r}")
    candidates = []
    for label in labels:
        sides = parse_label(str(label)).sides()
        candidates.append(_bits({"label": label} | {side: node[side] | values for side, values in sides.items()}))
    if not isinstance(node["budget"], dict):
        raise UserError(f"bits.budget must be a section such as bits.budget.bytes=…, got {node['budget']!r}")
    given = {name: limit for name, limit in node["budget"].items() if limit is not None}
    if len(given) != 1:
        raise UserError(
            f"bits=mixed takes one budget ({', '.join(f'bits.budget.{name}' for name in BUDGETS)}), got {len(given)}"
        )
    name, limit = next(iter(given.items()))
    if not isinstance(limit, int | float) or isinstance(limit, bool) or limit <= 0:
        raise UserError(f"bits.budget.{name} must be a number above 0, got {limit!r}")
    ranges = node.get("ranges", 1)  # records from before there were ranges have none
    if not isinstance(ranges, int) or isinstance(ranges, bool) or not 1 <= ranges <= steps:
        raise UserError(f"bits.ranges must be a whole number from 1 to protocol.steps={steps}, got {ranges!r}")
    return MixedBits(tuple(candidates), name, limit, ranges)
