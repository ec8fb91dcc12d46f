"""The one engine that the jobs of a sweep name, on the command line or in an experiment's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditbench.harness.common.errors import UserError
from ditbench.harness.sweep.compose import hydra_errors_explained
from ditbench.harness.sweep.engines import local
from ditbench.harness.sweep.engines.base import chosen
from ditbench.harness.sweep.multirun import Multirun

LAUNCHER = "launcher"


def engine_of(multirun: Multirun, first: tuple[int, Sequence[str]]) -> tuple[ModuleType, Any]:
    """The engine that a sweep's first job names, and its settings: an experiment's file is part of the jobs only.

    Raises:
        UserError: no such engine, or one that cannot be here.
    """
    engine, settings = chosen(_section(multirun.composed(*first)))
    if engine is not local and multirun.sweeper is not None:
        raise UserError(f"launcher: {multirun.sweeper} chooses a run by those before; leave launcher=local with it")
    if engine is not local and not multirun.here:
        raise UserError("launcher and hydra/launcher: give one of them")
    return engine, settings


def refuse_several_engines(configs: Sequence[DictConfig]) -> None:
    """Raise UserError unless all jobs name the same engine with the same settings."""
    named = [_section(config) for config in configs]
    different = next((each for each in named if each != named[0]), None)
    if different is not None:
        raise UserError(
            f"launcher: the jobs of a sweep are carried out by one, got {_said(named[0])} and {_said(different)}; write "
            "launcher=… on the command line, once"
        )


def _section(config: DictConfig) -> dict[str, Any]:
    with hydra_errors_explained():
        return OmegaConf.to_container(config[LAUNCHER], resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def _said(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in section.items() if value not in (None, "auto", {}, []))
