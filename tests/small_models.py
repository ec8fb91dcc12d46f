"""Small random pipelines as `load_model` gives them, without the way over a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from newer_pipelines import NEWER, NEWER_SIZES, family_of
from small_pipelines import SIZES, SMALL

from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.known_families import family

MADE = SMALL | NEWER


def small_model(name: str) -> LoadedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    return around(MADE[name](), name, family_of(name), (SIZES | NEWER_SIZES).get(name))


def around(pipe: Any, name: str, of: str, size: Mapping[str, int] | None) -> LoadedModel:
    """A model of the family `of`. size: of what it draws; None: the family's own."""
    adapter = family(of)
    adapter.prepare(pipe)
    pipe.transformer.eval().requires_grad_(False)
    return LoadedModel(ModelSpec(name, of), pipe, adapter if size is None else replace(adapter, size=size))
