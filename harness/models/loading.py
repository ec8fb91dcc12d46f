"""How a model is loaded: its family by name, its weights from the zoo, a folder or the hub, and what is said when it cannot be."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ditbench.harness.common.errors import UserError, first_words
from ditbench.harness.models.base import Adapter, LoadedModel, ModelSpec, fingerprint_of
from ditbench.harness.models.bounded import bounded
from ditbench.harness.models.checkpoint import FILE, FOLDER, LACKS, AnotherFamily, Checkpoint, Place, locate
from ditbench.harness.models.checkpoint_files import CONFIG, FETCH_AGAIN, FLOAT_NEEDED, INDEX
from ditbench.harness.models.checkpoint_parts import check_pipeline
from ditbench.harness.models.heard import NOT_WHOLE, listening, refuse_left_out, refuse_made_up
from ditbench.harness.models.identity import parts_of, parts_of_adapters, parts_of_random
from ditbench.harness.models.known_families import family, family_part
from ditbench.harness.models.layers import fuse_qkv
from ditbench.harness.models.lora import files, fuse, loras
from ditbench.harness.models.stray_weights import check_weights_are_of_layers
from ditbench.harness.models.transformer_only import TransformerOnly
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.quant.experts import FIRST, SECOND, experts_in

# What a transformer's class raises for arguments that it was not written for.
NOT_MADE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)


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
                pipe = random_pipeline(adapter, spec, dtype)
            parts = random_parts(spec)
        else:
            checkpoint = found_checkpoint(spec, adapter)
            wanted = loras(spec.lora)
            adapters = list(zip(wanted, files(wanted), strict=True))
            pipe = _load_pipeline(adapter, spec, checkpoint)
            extras = beside(checkpoint)
            check_pipeline(pipe, adapter.CONDITION)
            if wanted and getattr(pipe, SECOND, None) is not None:
                raise UserError(
                    "model.lora would be fused into one of its two transformers; fuse both yourself and save them"
                )
            for lora, file in adapters:
                fuse(pipe, lora, file)
            parts = _parts(spec, adapter, checkpoint, [file for _, file in adapters])
        prepare(adapter, pipe)
        if spec.fuse_qkv:
            fuse_qkv(pipe.transformer)
        check_only_one_denoises(pipe)
        _check_size(spec, pipe)
        pipe.transformer.eval().requires_grad_(False)
        _check_values(pipe)
    model = LoadedModel(spec, pipe, adapter, extras, parts)
    if spec.stress:
        with of_model(spec.name):
            model.inject_outliers(**spec.stress)
    return model


def random_pipeline(adapter: Adapter, spec: ModelSpec, dtype: torch.dtype, *, weightless: bool = False) -> Any:
    """A pipeline around a transformer of random weights. weightless: whoever calls lets weights have no values.

    Raises:
        UserError: the transformer's class cannot be made of model.random, or it would not fit into memory.
    """
    arguments = dict(spec.random or {})
    with suppress(*NOT_MADE), torch.device("meta"), bounded("model.random", weights=not weightless), _unwarned():
        adapter.random_pipeline(arguments, dtype)  # what cannot be made here either is told below
    try:
        with _unwarned():
            pipe = adapter.random_pipeline(arguments, dtype)
        blocks = adapter.blocks(pipe.transformer)
    except NOT_MADE as error:
        said = first_words(error).rstrip(".")
        raise UserError(f"model.random={arguments}: no transformer can be made of it: {said}") from error
    if not blocks:
        raise UserError(f"model.random={arguments}: a transformer without blocks; give it a layer at least")
    return pipe


def fingerprint_without_loading(spec: ModelSpec) -> str:
    """`load_model(spec).fingerprint`, from the files alone. Nothing is downloaded.

    Raises:
        UserError: no such weights, or they are not on this machine.
    """
    adapter = adapter_of(spec)
    with of_model(spec.name):
        if spec.random is not None:
            _refuse_of_random(spec)
            return fingerprint_of(spec, random_parts(spec))
        return fingerprint_of(spec, parts_on_disk(spec, adapter, found_checkpoint(spec, adapter)))


def parts_on_disk(spec: ModelSpec, adapter: Adapter, checkpoint: Checkpoint) -> dict[str, str]:
    """The hash of each part that would be loaded. Raises UserError: one is not on this machine."""
    return _parts(spec, adapter, checkpoint, files(loras(spec.lora), local_only=True))


def random_parts(spec: ModelSpec) -> dict[str, str]:
    """What random weights are drawn from, and by whom."""
    assert spec.random is not None
    return parts_of_random(spec.family, spec.random, spec.seed) | family_part(spec.family)


def _parts(spec: ModelSpec, adapter: Adapter, checkpoint: Checkpoint, adapters: list[Path]) -> dict[str, str]:
    folders = getattr(adapter, "folders", None)
    loaded = parts_of(checkpoint, folders and folders(checkpoint))
    return loaded | parts_of_adapters(adapters) | family_part(spec.family)


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


def prepare(adapter: Adapter, pipe: Any) -> None:
    """What is done to a pipeline once it is there, in place: the family's own, and one transformer of the two that share the steps of
    one with `boundary_ratio`.

    Raises:
        UserError: these two are of different classes, or weights of the blocks belong to no layer.
    """
    if hasattr(adapter, "prepare"):
        adapter.prepare(pipe)
    _join_experts(pipe)
    check_weights_are_of_layers(pipe.transformer, adapter.blocks(pipe.transformer))


def _join_experts(pipe: Any) -> None:
    experts = None if isinstance(pipe, TransformerOnly) or not hasattr(pipe, "config") else experts_in(pipe)
    if experts is None:
        return
    kinds = {type(each).__name__ for each in (experts.transformer, experts.transformer_2)}
    if len(kinds) > 1:
        raise UserError(
            f"its experts are of different classes, {' and '.join(sorted(kinds))}; expected two of one class"
        )
    pipe.register_modules(**{FIRST: experts, SECOND: None})


def check_only_one_denoises(pipe: Any) -> None:
    """Raise UserError if the pipeline denoises with more networks than the one that would be quantized (Ideogram 4);
    those that take turns are one by now (`prepare`).
    """
    parts = pipe.components.items()
    others = [
        name for name, part in parts if "transformer" in name and isinstance(part, nn.Module) and name != "transformer"
    ]
    if others:
        raise UserError(
            f"a {type(pipe).__name__} with two denoising networks, transformer and {' and '.join(others)}; "
            "only transformer would be quantized and the samples would be half the float model's, so it is refused"
        )


def _check_size(spec: ModelSpec, pipe: Any) -> None:
    if spec.size and spec.random is None and getattr(pipe, "vae", None) is None:
        raise UserError(
            f"a {type(pipe).__name__} without a VAE draws the one size it was trained on; leave model.size out"
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
    unreadable = (OSError, SafetensorError, ImportError, SingleFileComponentError, UnpicklingError)
    no_fit = (ValueError, RuntimeError, AttributeError, TypeError, LookupError)
    try:
        with listening() as said:
            pipe = adapter.load(checkpoint)
            refuse_made_up(said, where)
            refuse_left_out(said, where, pipe.components.values())
    except Exception as error:
        if not isinstance(error, (*unreadable, *no_fit)) and type(error) is not Exception:  # which tokenizers raises
            raise
        checkpoint.check_cached()  # may know better why
        raise _explained(error, where, spec, checkpoint) from error
    checkpoint.check_cached()  # of the hub nothing was here to be looked at before
    return pipe


def _explained(error: Exception, where: str, spec: ModelSpec, checkpoint: Checkpoint) -> UserError:
    """What a library could not read, in a line."""
    from safetensors import SafetensorError

    if isinstance(error, ImportError):  # of the package that the weights were quantized with, mostly
        return UserError(f"{where}: {first_words(error)}; if its weights are quantized: {FLOAT_NEEDED}")
    if isinstance(error, OSError | SafetensorError):
        damaged = next((each for each in _with_causes(error) if isinstance(each, SafetensorError)), None)
        if damaged is not None:  # diffusers says OSError, "Unable to load weights", and where, but not why
            return UserError(f"{where}: weights cannot be read ({damaged}); {FETCH_AGAIN}: {first_words(error)}")
        for option in ("transformer", "source", "config"):
            place = getattr(checkpoint, option)
            if place is not None and not place.local and (option != "transformer" or place.where in str(error)):
                return _missing_weights(spec, option, place.where)
        return UserError(f"{where}: {first_words(error)}")
    if LACKS in str(error):
        return UserError(f"{where}: {NOT_WHOLE}{_lone_file(checkpoint)}")
    if isinstance(error, AnotherFamily):
        return UserError(
            f"{where}: not a checkpoint of family {spec.family!r}: {first_words(error)}; choose the matching model="
            f"{_lone_file(checkpoint)}"
        )
    return UserError(
        f"{where}: {_part_of(error)}cannot be loaded: {first_words(error).rstrip('.')}{_lone_file(checkpoint)}"
    )


def _part_of(error: Exception) -> str:
    """ "its tokenizer ", if diffusers was loading that when the error came. It does not say so itself."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_sub_model" and "name" in frame.f_locals:
            return f"its {frame.f_locals['name']} "
    return ""


def _lone_file(checkpoint: Checkpoint) -> str:
    if checkpoint.source.kind != FILE:
        return ""
    return (
        f", or, if the file holds a transformer only, set model.transformer={checkpoint.source.where} and "
        f"model.source={checkpoint.base.where}"
    )


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


@contextmanager
def _unwarned() -> Iterator[None]:
    """torch warns about layers without width; what comes of them is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _private_seed:
    """Seeds torch inside the block and gives the global random state back after it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.state)
