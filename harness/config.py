"""From a composed configuration to frozen values. Only this file and `run.py` know what a configuration looks like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import methods
from harness.errors import UserError
from harness.models.base import ModelSpec, Sampler
from harness.quant.spec import FLOAT_BITS, Bits, QuantSpec, parse_label

# What can change a number; everything else (where results go, who is told) cannot.
IDENTITY = ("model", "method", "bits", "protocol", "calibration", "generate", "measure", "metrics", "seed", "backend")


@dataclass(frozen=True)
class Protocol:
    """conf/protocol/: what must be equal between methods."""

    name: str
    scope: str
    skip: tuple[str, ...]
    attention: bool
    sampler: Sampler
    n: int
    labels: str


@dataclass(frozen=True)
class RunConfig:
    """One run, all defaults resolved. `raw` is what the record keeps."""

    raw: dict[str, Any]
    name: str
    model: ModelSpec
    method: str
    params: Any
    bits: Bits
    protocol: Protocol
    seed: int
    device: torch.device
    backend: str
    force: bool
    results_dir: Path
    cache_dir: Path

    def section(self, name: str) -> dict[str, Any]:
        return self.raw[name]

    def identity(self) -> dict[str, Any]:
        return {name: self.raw[name] for name in IDENTITY}


def parse(raw: dict[str, Any]) -> RunConfig:
    """Check a resolved configuration and turn it into values.

    Raises:
        UserError: a value that no part of ditbench can use; says which and what to do.
    """
    raw = dict(raw)
    if raw["method"]["name"] == methods.FLOAT:  # the 16-bit reference is one run, whatever bits a sweep is at
        raw["bits"] = raw["bits"] | {"label": "w16a16"}
        raw["bits"]["weight"] = raw["bits"]["weight"] | {"bits": FLOAT_BITS}
        raw["bits"]["act"] = raw["bits"]["act"] | {"bits": FLOAT_BITS}
    bits = _bits(raw["bits"])
    methods.check_bits(raw["method"]["name"], bits)
    protocol = raw["protocol"]
    model = {key: value for key, value in raw["model"].items() if key != "usual"}
    return RunConfig(
        raw=raw,
        name=_folder_name(raw["name"]),
        model=ModelSpec(**model),
        method=raw["method"]["name"],
        params=methods.params_of(raw["method"]),
        bits=bits,
        protocol=Protocol(
            name=protocol["name"],
            scope=protocol["scope"],
            skip=tuple(protocol["skip"]),
            attention=protocol["attention"],
            sampler=Sampler(protocol["sampler"], protocol["steps"], protocol["guidance"]),
            n=protocol["n"],
            labels=protocol["labels"],
        ),
        seed=raw["seed"],
        device=pick_device(raw["device"]),
        backend=raw["backend"],
        force=raw["force"],
        results_dir=Path(raw["results_dir"]).expanduser(),
        cache_dir=Path(raw["cache_dir"]).expanduser(),
    )


def pick_device(name: str) -> torch.device:
    """auto → cuda where there is one, else cpu.

    Raises:
        UserError: a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cuda", "cpu"):
        raise UserError(f"device={name!r}; expected auto, cuda or cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here; use device=auto or device=cpu")
    return torch.device(name)


def _bits(node: dict[str, Any]) -> Bits:
    parse_label(node["label"])
    sides = {}
    for side in ("weight", "act"):
        values = dict(node[side])
        sides[side] = None if values["bits"] >= FLOAT_BITS else QuantSpec(**values)
    return Bits(sides["weight"], sides["act"])


def _folder_name(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"name={name!r} is used as a folder: it must not be empty, start with a dot or hold a slash")
    return name
