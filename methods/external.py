"""External: what somebody else quantized, a transformer (a diffusers folder or a GGUF file) or samples of one (a row, not a method).

It has `load` in the place of `fit` and `apply`: nothing is calibrated and no recipe is made. diffusers' own quantizers load what was
saved with them, and the layers run as their library runs them. What is stored is read from the tensors (`measurement/stored.py`). Of a
folder of images or videos nothing is loaded; the run scores them (`stages/others_samples.py`).

Departs from the paper: nothing; there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ditbench.harness.common.errors import UserError, first_words, shortened
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.checkpoint_files import CONFIG, TRANSFORMER, read_object
from ditbench.harness.models.heard import listening, refuse_left_out, refuse_made_up
from ditbench.harness.samples.others import files_in

GGUF, QUANTO, BITSANDBYTES = "gguf", "quanto", "bitsandbytes"
PACKAGES = {
    "quanto": "optimum.quanto",
    "auto-round": "auto_round",
}  # what is imported, where it is not called as its format
PIP = {"quanto": "optimum-quanto"}
ONLY_REGISTERED_BY_IMPORT = ("sdnq",)  # quantizers that diffusers has not of its own
FREE = ("quantization_config", "dtype", "torch_dtype")  # what may differ between two configurations of one architecture
UNREADABLE = (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, LookupError)


@dataclass(frozen=True)
class Params:
    """path: a transformer's folder, a pipeline's folder (its transformer is taken), a .gguf file, or a folder of images or videos."""

    path: str | None = None


def place_of(params: Params) -> Path:
    """The transformer's own folder, the file, or the folder of samples.

    Raises:
        UserError: there is none.
    """
    if params.path is None or not params.path.strip():
        raise UserError(
            "method=external needs method.path=…: a folder of a quantized diffusers transformer or pipeline, a .gguf file, or a "
            "folder of samples"
        )
    path = Path(params.path).expanduser()
    if path.is_file() and path.suffix == f".{GGUF}":
        return path
    if path.is_file():
        raise UserError(
            f"method.path={path}: expected a diffusers folder or a .gguf file; give the folder of a single file"
        )
    if not path.is_dir():
        raise UserError(f"method.path={path}: no such folder or file")
    for folder in (path, path / TRANSFORMER):
        if (folder / CONFIG).is_file():
            return folder
    if holds_samples(path):
        return path
    raise UserError(
        f"method.path={path}: no folder of a diffusers transformer or pipeline (no {CONFIG} in it), nor of images or videos"
    )


def holds_samples(place: Path) -> bool:
    """Whether it is a folder of images or videos, not of a model."""
    return place.is_dir() and not (place / CONFIG).is_file() and bool(files_in(place))


def library_of(place: Path) -> str | None:
    """Who quantized it, by its configuration: torchao, quanto, bitsandbytes, …; None: it does not say, its weights are floats, or
    it is a folder of samples.
    """
    if place.is_file():
        return GGUF
    if not (place / CONFIG).is_file():
        return None
    found = read_object(place / CONFIG).get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str):
        raise UserError(
            f"{place / CONFIG}: quantization_config must be an object with quant_method, the library's name; got "
            f"{shortened(repr(found), 80)}"
        )
    return method


def load(model: LoadedModel, params: Params, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The transformer as its library runs it; what is not quantized in dtype.

    Raises:
        UserError: not there, unreadable, of another architecture than the model's, or its library is not installed or refuses.
    """
    place = place_of(params)
    library = library_of(place)
    _check_installed(place, library)
    if library == QUANTO and dtype == torch.bfloat16 and device.type == "cpu":
        raise UserError(
            f"method.path={place}: quanto's product in bfloat16 ends the process on a CPU; set generate.dtype=float32"
        )
    kind = type(model.transformer)
    if place.is_dir():
        _check_class(place, kind)
    with _explained(place), listening() as said:
        if place.is_file():
            theirs = _of_gguf(model, place, dtype)
        elif library == BITSANDBYTES and device.type == "cpu":
            theirs = _of_bitsandbytes_on_a_cpu(kind, place, dtype)
        else:
            theirs = kind.from_pretrained(place, torch_dtype=dtype, local_files_only=True)  # type: ignore[attr-defined]
        refuse_made_up(said, f"method.path={place}")
        refuse_left_out(said, f"method.path={place}", [theirs])
    _check_same(place, theirs, model.transformer)
    with _explained(place):
        return theirs.to(device).eval().requires_grad_(False)


def _check_installed(place: Path, library: str | None) -> None:
    if library is None:
        return
    package = PACKAGES.get(library, library)
    try:
        found = find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(
            f"method.path={place} was quantized with {library}, which is not installed; pip install {PIP.get(library, library)}"
        )
    if library in ONLY_REGISTERED_BY_IMPORT:
        import_module(package)


def _check_class(place: Path, kind: type) -> None:
    found = read_object(place / CONFIG).get("_class_name")
    if found != kind.__name__:
        theirs = f"is a {found}" if isinstance(found, str) else f"has no _class_name in its {CONFIG}"
        raise UserError(f"method.path={place} {theirs}, the model has a {kind.__name__}; choose the matching model=")


def _check_same(place: Path, theirs: Any, ours: Any) -> None:
    """By the configurations, with the class's defaults filled in."""
    for name, wanted in dict(ours.config).items():
        found = dict(theirs.config).get(name)
        if not name.startswith("_") and name not in FREE and _plain(found) != _plain(wanted):
            raise UserError(f"method.path={place} has {name}={found}, the model has {wanted}; it is of another model")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _of_gguf(model: LoadedModel, file: Path, dtype: torch.dtype) -> nn.Module:
    """A file of weights alone: its configuration is the model's."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.loaders import FromOriginalModelMixin

    ours: Any = model.transformer
    if not isinstance(ours, FromOriginalModelMixin):
        raise UserError(f"method.path={file}: diffusers reads no {type(ours).__name__} from a .gguf file")
    with TemporaryDirectory() as folder:
        ours.save_config(folder)
        return type(ours).from_single_file(
            str(file), config=folder, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype), torch_dtype=dtype
        )


def _of_bitsandbytes_on_a_cpu(kind: type, place: Path, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes computes on a CPU, but diffusers (0.42) first asks for a GPU: that question alone is left out."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    asking = [(each, each.validate_environment) for each in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer)]
    try:
        for quantizer, _ in asking:
            quantizer.validate_environment = lambda *_, **__: None
        return kind.from_pretrained(  # type: ignore[attr-defined,no-any-return]
            place, torch_dtype=dtype, local_files_only=True, device_map={"": "cpu"}
        )
    finally:
        for quantizer, asks in asking:
            quantizer.validate_environment = asks


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """What the libraries refuse, in a line."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"method.path={place} cannot be loaded: {first_words(error).rstrip('.')}") from error
