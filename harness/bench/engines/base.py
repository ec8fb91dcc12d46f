"""The contract of another library's engine in a benchmark.

An engine module has NAME; `unavailable(device) -> str | None`, why it cannot run here (with what to install); and
`rivals(work) -> Iterator[Rival]`, each of which is the transformer of the benchmark with `work.layers` in the engine's arithmetic.
It runs in a process of its own (`harness/bench/workers.py`), where nothing but its library and torch is loaded. What goes wrong in it
costs its own rows only.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ditbench.harness.bench.profiles import Profile
from ditbench.harness.common.extras import installed
from ditbench.harness.quant.target import Target

GRAPH = "graph"  # the mode of an engine that has the whole transformer as a graph of its own


@dataclass(frozen=True)
class Work:
    """target: of the benchmark, its transformer in float. layers: the names of what ours quantizes. examples: arguments of two calls
    with different numbers of rows, the second one with more. modes: eager, compiled or both, for engines inside torch.
    """

    target: Target
    layers: tuple[str, ...]
    examples: tuple[dict[str, Any], dict[str, Any]]
    device: torch.device
    modes: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Rival:
    """call: arguments of the transformer, as the family makes them → its prediction. held_bytes: None where nobody can tell. profile: the
    same call, which says where its time went; None of an engine that has no word for it.
    """

    label: str
    mode: str
    call: Callable[[dict[str, Any]], Tensor]
    held_bytes: int | None = None
    profile: Callable[[dict[str, Any]], Profile] | None = None


class Engine(Protocol):
    NAME: str

    def unavailable(self, device: torch.device) -> str | None: ...

    def rivals(self, work: Work) -> Iterator[Rival]: ...


@cache
def known_engines() -> dict[str, Engine]:
    """Every engine module of this folder, by name."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    names = [each.name for each in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {module.NAME: module for module in modules if hasattr(module, "rivals")}  # type: ignore[misc]


def lacks(packages: tuple[str, ...], install: str) -> str | None:
    """Why an engine of these packages is not there."""
    missing = [package for package in packages if not installed(package)]
    return f"{', '.join(missing)} not installed; pip install {install}" if missing else None


def not_on_the_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on the CPU, the device is {device}"
