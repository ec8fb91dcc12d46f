"""How a model is loaded: its family by name, its weights from the zoo, a folder or the hub, and what is said when it cannot be."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.models.base import Adapter, LoadedModel, ModelSpec, fingerprint_of
from ditbench.harness.models.checkpoint import (
    CONFIG,
    FILE,
    FLOAT_NEEDED,
    FOLDER,
    INDEX,
    Checkpoint,
    Place,
    already_quantized,
    locate,
)
from ditbench.harness.models.identity import parts_of, parts_of_adapters, parts_of_random
from ditbench.harness.models.layers import fuse_qkv
from ditbench.harness.models.lora import files, fuse, loras
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.quant.layer_names import carries_adapters

NOT_WHOLE = "the checkpoint lacks weights: it is not whole, or of another model"


def family(name: str) -> Adapter:
    import ditbench.harness.models.families as package

    families = {m.name for m in pkgutil.iter_modules(package.__path__)}
    if name not in families:
        raise unknown_name("model family", name, families)
    module = importlib.import_module(f"ditbench.harness.models.families.{name}")
    return getattr(module, "FAMILY", module)  # type: ignore[return-value]


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load (or draw) a model, fuse what is to be fused, check its weights, apply the stress rescaling if asked for.

    Raises:
        UserError: no such weights, unreadable, truncated or already quantized weights, another architecture, NaN in the weights.
    """
    quiet_libraries()
    adapter, dtype = adapter_of(spec), getattr(torch, spec.dtype)
    extras: dict[str, Path] = {}
    with of_model(spec.name):
        if spec.random is not None:
            _refuse_of_random(spec)
            with _private_seed(spec.seed):
                pipe = adapter.random_pipeline(dict(spec.random), dtype)
            parts = parts_of_random(spec.family, spec.random, spec.seed)
        else:
            checkpoint = found_checkpoint(spec, adapter)
            wanted = loras(spec.lora)
            adapters = list(zip(wanted, files(wanted), strict=True))
            pipe = _load_pipeline(adapter, spec, checkpoint)
            extras = beside(checkpoint)
            _check_pipeline(pipe)
            for lora, file in adapters:
                fuse(pipe, lora, file)
            parts = _parts(adapter, checkpoint, [file for _, file in adapters])
        if spec.fuse_qkv:
            fuse_qkv(pipe.transformer)
        check_only_one_denoises(pipe)
        pipe.transformer.eval().requires_grad_(False)
        _check_values(pipe)
    model = LoadedModel(spec, pipe, adapter, extras, parts)
    if spec.stress:
        model.inject_outliers(**spec.stress)
    return model


def fingerprint_without_loading(spec: ModelSpec) -> str:
    """`load_model(spec).fingerprint`, from the files alone. Nothing is downloaded.

    Raises:
        UserError: no such weights, or they are not on this machine.
    """
    adapter = adapter_of(spec)
    with of_model(spec.name):
        if spec.random is not None:
            _refuse_of_random(spec)
            return fingerprint_of(spec, parts_of_random(spec.family, spec.random, spec.seed))
        return fingerprint_of(spec, parts_on_disk(spec, adapter, found_checkpoint(spec, adapter)))


def parts_on_disk(spec: ModelSpec, adapter: Adapter, checkpoint: Checkpoint) -> dict[str, str]:
    """The hash of each part that would be loaded. Raises UserError: one is not on this machine."""
    return _parts(adapter, checkpoint, files(loras(spec.lora), local_only=True))


def _parts(adapter: Adapter, checkpoint: Checkpoint, adapters: list[Path]) -> dict[str, str]:
    folders = getattr(adapter, "folders", None)
    return parts_of(checkpoint, folders and folders(checkpoint)) | parts_of_adapters(adapters)


def adapter_of(spec: ModelSpec) -> Adapter:
    """The model's family, drawing the model's size."""
    adapter = family(spec.family)
    if not spec.size:
        return adapter
    if not is_dataclass(adapter):
        raise UserError(f"model {spec.name}: family {spec.family} draws one size; leave model.size out")
    return replace(adapter, size=spec.size)


def beside(checkpoint: Checkpoint) -> dict[str, Path]:
    """Files beside the weights: the judge's folder, if there is one."""
    judge = Path(checkpoint.source.where) / "judge"
    return {"judge": judge} if judge.is_dir() else {}


def quiet_libraries() -> None:
    """No progress bars of diffusers and transformers among ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def of_model(name: str) -> Iterator[None]:
    """Says in every error which model it is about."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith("model ") else UserError(f"model {name}: {error}") from error


def _refuse_of_random(spec: ModelSpec) -> None:
    """Raise UserError for what only a checkpoint can have."""
    for option in ("variant", "config", "transformer", "lora"):
        if getattr(spec, option) is not None:
            raise UserError(f"model.{option} needs weights to load, and this model draws random ones; set model.source")


def found_checkpoint(spec: ModelSpec, adapter: Adapter) -> Checkpoint:
    """Where the weights are, looked at.

    Raises:
        UserError: they are not there, or not what can be loaded.
    """
    index, dtype = getattr(adapter, "INDEX", INDEX), getattr(torch, spec.dtype)
    assert spec.source is not None, "a model has a source or random weights"
    if spec.source.startswith("zoo:"):
        folder = WEIGHTS / spec.source.removeprefix("zoo:")
        if not (folder / INDEX).exists():
            raise UserError(f"{folder} is missing; make it with `ditbench zoo train {folder.name}`")
        source = Place(FOLDER, str(folder))
    else:
        source = locate(spec.source, "model.source", "a diffusers pipeline folder")
    config = spec.config and locate(spec.config, "model.config", "the pipeline folder that the file belongs to")
    if source.kind == FILE and not config:
        raise UserError(
            f"{source.where} is one file: set model.config to the folder or hub id of the pipeline that it belongs to, or, if it "
            "holds a transformer only, model.transformer to it and model.source to the pipeline"
        )
    if config and source.kind != FILE:
        raise UserError("model.config belongs to a model.source that is one .safetensors file; leave it out")
    transformer = spec.transformer and locate(spec.transformer, "model.transformer", "a transformer's folder")
    checkpoint = Checkpoint(source, dtype, spec.revision, spec.variant, config or None, transformer or None)
    if checkpoint.base.kind == FOLDER and not (Path(checkpoint.base.where) / index).exists():
        raise UserError(
            f"{checkpoint.base.where} is no diffusers pipeline folder (no {index} in it){_lone_model(checkpoint.base)}"
        )
    checkpoint.check()
    return checkpoint


def _lone_model(place: Place) -> str:
    """What to do with a transformer's folder that was given for a pipeline's."""
    if not (Path(place.where) / CONFIG).is_file():
        return ""
    return f"; if it is a transformer's, set model.transformer={place.where} and model.source to the pipeline"


def _check_pipeline(pipe: Any) -> None:
    """Raise UserError if a library made weights that are codes, or left an adapter beside them."""
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        if config := getattr(getattr(part, "config", None), "quantization_config", None):
            raise already_quantized(name, config)
        if carries_adapters(part):
            raise UserError(
                f"its {name} carries LoRA adapters that are not fused; take the plain weights and set model.lora"
            )


def check_only_one_denoises(pipe: Any) -> None:
    """Raise UserError if the pipeline denoises with more networks than the one that would be quantized (Wan 2.2, Ideogram 4)."""
    parts = pipe.components.items()
    others = [
        name for name, part in parts if "transformer" in name and isinstance(part, nn.Module) and name != "transformer"
    ]
    if others:
        raise UserError(
            f"a {type(pipe).__name__} with two denoising networks, transformer and {' and '.join(others)}; "
            "only transformer would be quantized and the samples would be half the float model's, so it is refused"
        )


def _check_values(pipe: Any) -> None:
    for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        for name, tensor in part.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(f"NaN or infinity in {name}; the checkpoint is damaged, fetch it again")


def _load_pipeline(adapter: Adapter, spec: ModelSpec, checkpoint: Checkpoint) -> Any:
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    where = f"model {spec.name} ({checkpoint.source.where})"
    unreadable = (OSError, SafetensorError, ImportError, SingleFileComponentError)
    no_fit = (ValueError, RuntimeError, AttributeError, TypeError, LookupError)
    try:
        with _nothing_made_up(where):
            return adapter.load(checkpoint)
    except (*unreadable, *no_fit) as error:
        checkpoint.check_cached()  # may know better why
        raise _explained(error, where, spec, checkpoint) from error


def _explained(error: Exception, where: str, spec: ModelSpec, checkpoint: Checkpoint) -> UserError:
    """What a library could not read, in a line."""
    from safetensors import SafetensorError

    if isinstance(error, ImportError):  # of the package that the weights were quantized with, mostly
        return UserError(f"{where}: {_first_line(error)}; if its weights are quantized: {FLOAT_NEEDED}")
    if isinstance(error, OSError | SafetensorError):
        damaged = next((each for each in _with_causes(error) if isinstance(each, SafetensorError)), None)
        if damaged is not None:  # diffusers says OSError, "Unable to load weights", and where, but not why
            return UserError(
                f"{where}: weights cannot be read ({damaged}); the file is corrupt or truncated, fetch it again: "
                f"{_first_line(error)}"
            )
        for option in ("transformer", "source", "config"):
            place = getattr(checkpoint, option)
            if place is not None and not place.local and (option != "transformer" or place.where in str(error)):
                return _missing_weights(spec, option, place.where)
        return UserError(f"{where}: {_first_line(error)}")
    if "meta tensor" in str(error):  # diffusers, of a file that leaves some of its model's weights without a value
        return UserError(f"{where}: {NOT_WHOLE}{_lone_file(checkpoint)}")
    return UserError(
        f"{where}: not a checkpoint of family {spec.family!r}: {_first_line(error)}; choose the matching model="
        f"{_lone_file(checkpoint)}"
    )


def _lone_file(checkpoint: Checkpoint) -> str:
    if checkpoint.source.kind != FILE:
        return ""
    return (
        f", or, if the file holds a transformer only, set model.transformer={checkpoint.source.where} and "
        f"model.source={checkpoint.base.where}"
    )


@contextmanager
def _nothing_made_up(where: str) -> Iterator[None]:
    """Raise UserError where a library draws weights that a checkpoint lacks: both say so in their logs only."""
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda entry: said.append(entry.getMessage())  # type: ignore[method-assign]
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for library in libraries:
        library.addHandler(listener)
    try:
        yield
    finally:
        for library in libraries:
            library.removeHandler(listener)
    for text in said:
        if "newly initialized" in text:
            first = re.search(r"'([\w.]+)'\]|(\S+)\s*\|\s*MISSING|\['([\w.]+)'", text)
            name = next((each for each in first.groups() if each), "some") if first else "some"
            raise UserError(f"{where}: no weights for {name}, which would be random; {NOT_WHOLE}")


def _missing_weights(spec: ModelSpec, option: str, hub_id: str) -> UserError:
    folder = f"./weights/{hub_id.rsplit('/', 1)[-1]}"
    return UserError(
        f"model {spec.name}: {hub_id} is no folder here, and cannot be downloaded from the hub now.\n"
        f"Where there is a network: `hf download {hub_id} --local-dir {folder}`; then add model.{option}={folder}"
    )


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


class _private_seed:
    """Seeds torch inside the block and gives the global random state back after it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.state)
