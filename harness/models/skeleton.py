"""A model without its weights: every parameter on `meta`, everything else (schedulers, tokenizers, buffers) as it is loaded.

It has the model's fingerprint, its shapes and its pipeline, and takes neither the time nor the memory of the weights: for
plans, keys and counting. It draws nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.checkpoint import CONFIG, FILE, FOLDER, INDEX, TRANSFORMER, Checkpoint
from ditbench.harness.models.identity import local_folder, named_parts, read_config, transformer_folder
from ditbench.harness.models.layers import fuse_qkv
from ditbench.harness.models.loading import (
    adapter_of,
    beside,
    check_only_one_denoises,
    found_checkpoint,
    load_model,
    of_model,
    parts_on_disk,
    prepare,
    quiet_libraries,
    random_parts,
    random_pipeline,
)
from ditbench.harness.models.macs import on_meta
from ditbench.harness.quant.steps import StepClock

SMALL_BYTES = 2**30  # of a pipeline that we cannot put together ourselves: it is loaded


def skeleton(spec: ModelSpec) -> LoadedModel:
    """The model as `load_model` makes it, without weights.

    Raises:
        UserError: no such model, it is not on this machine, or it cannot be put together without its weights.
    """
    quiet_libraries()
    with of_model(spec.name):
        return _bare(spec)


def _bare(spec: ModelSpec) -> LoadedModel:
    adapter, dtype = adapter_of(spec), getattr(torch, spec.dtype)
    if spec.random is not None:
        with WeightsOnMeta():
            pipe = random_pipeline(adapter, spec, dtype, weightless=True)
        parts, extras = random_parts(spec), {}
    else:
        checkpoint = found_checkpoint(spec, adapter)
        parts, extras = parts_on_disk(spec, adapter, checkpoint), beside(checkpoint)
        if checkpoint.base.kind == FOLDER and not (Path(checkpoint.base.where) / INDEX).exists():
            return _loaded(spec, checkpoint)
        pipe = _pipeline(checkpoint, dtype)
    prepare(adapter, pipe)
    check_only_one_denoises(pipe)
    if spec.fuse_qkv:
        fuse_qkv(pipe.transformer)
    pipe.transformer.eval().requires_grad_(False)
    pipe.transformer.clock = StepClock(None)
    return LoadedModel(spec, pipe, adapter, extras, parts)


class WeightsOnMeta(TorchFunctionMode):
    """What layers make their weights of (`torch.empty`) has no values; tables that a model computes have theirs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _pipeline(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    base = local_folder(checkpoint.base, INDEX, checkpoint.revision)
    index = read_config(base / INDEX)
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None:
        raise UserError(f"diffusers has no pipeline {index.get('_class_name')}, which {base / INDEX} names")
    parts: dict[str, Any] = {}
    for name in named_parts(index):
        folder = base / name
        if name == TRANSFORMER and checkpoint.transformer is not None and checkpoint.transformer.kind != FILE:
            folder = transformer_folder(checkpoint.transformer)
            folder = folder if (folder / CONFIG).exists() else folder / TRANSFORMER
        parts[name] = _part(*index[name], folder, dtype)
    wanted = {name: None for name, of in index.items() if of == [None, None]}
    settings = {
        name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)
    }
    return kind(**wanted, **parts, **settings)


def _part(library: str, name: str, folder: Path, dtype: torch.dtype) -> Any:
    """One part, by the library and the class that the index names; the library may be a folder of diffusers' pipelines."""
    own = hasattr(diffusers.pipelines, library)
    kind = getattr(importlib.import_module(f"diffusers.pipelines.{library}" if own else library), name)
    if issubclass(kind, diffusers.ModelMixin):
        with WeightsOnMeta():
            part = kind.from_config(kind.load_config(folder, local_files_only=True))
    elif issubclass(kind, transformers.PreTrainedModel):
        with WeightsOnMeta():
            part = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    else:
        return kind.from_pretrained(folder, local_files_only=True)
    return nn.Module.to(on_meta(part), dtype=dtype).eval()  # not diffusers' own .to, which warns about every cast


def _loaded(spec: ModelSpec, checkpoint: Checkpoint) -> LoadedModel:
    """Of a family that reads its folder in a way of its own, the model itself, where it is small."""
    held = sum(path.stat().st_size for path in Path(checkpoint.base.where).rglob("*.safetensors"))
    if held > SMALL_BYTES:
        raise UserError(f"a folder without {INDEX} is planned only if it is small")
    model = load_model(spec)
    model.transformer.clock = StepClock(None)
    return model


def module_parts(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
