"""What a sweep loads once and every run of it shares: models, judges, references; and that no method may change them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import nn

from ditbench.eval.base import FeatureModel, Reference
from ditbench.eval.judges import load_judge
from ditbench.eval.reference import load_reference
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import tensor_sums
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.loading import load_model
from ditbench.harness.samples.samples import Samples
from ditbench.harness.samples.store import found_store

KEPT_SETS = 4  # of samples: a run's own, the float model's, and those of its noise floor


def model_of(spec: ModelSpec) -> LoadedModel:
    return _model(json.dumps(asdict(spec), sort_keys=True))


def forget_models() -> None:
    """They are loaded anew when they are next asked for."""
    _model.cache_clear()


@cache
def judge_in(folder: Path | None, device: torch.device) -> FeatureModel | None:
    return None if folder is None else load_judge(folder, device)


@cache
def reference_of(name: str | None) -> Reference | None:
    return None if name is None else load_reference(name)


@lru_cache(maxsize=KEPT_SETS)
def samples_in(folder: Path) -> Samples:
    """What a whole store holds, read when asked for: one object, so that what networks saw in it is known to the next run."""
    return found_store(folder).samples()


@contextmanager
def left_alone(transformer: nn.Module, method: str) -> Iterator[None]:
    """Raise UserError if the block changed the float model: the next run of a sweep, and every cache, would be of another
    model than their records say. The changed one is forgotten, so that the next run loads it anew.
    """
    before = tensor_sums(transformer.state_dict())
    try:
        yield
    finally:
        after = tensor_sums(transformer.state_dict())
        if after != before:
            forget_models()
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if changed:
        raise UserError(
            f"method {method}: changed the float model ({changed[0]}, {len(changed)} in all); copy it first"
        )


@cache
def _model(spec_json: str) -> LoadedModel:
    return load_model(ModelSpec(**json.loads(spec_json)))
