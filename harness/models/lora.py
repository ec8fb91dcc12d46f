"""LoRA adapters: loaded and fused into the float weights by diffusers and peft, before anything is calibrated."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.type_checks import check_types
from ditbench.harness.models.checkpoint import FILE, HUB, SUFFIX, Place, locate

NAME = "ditbench"  # of the adapter while it is being fused
USUAL_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = re.compile(r"\.(?:lora|lokr)[_.]")  # what follows a layer's name in an adapter's keys


@dataclass(frozen=True)
class Lora:
    """path: a .safetensors file, a folder or a hub id. weight_name: the file in it, where there are several."""

    path: str
    scale: float = 1.0
    weight_name: str | None = None


def loras(value: Any) -> tuple[Lora, ...]:
    """model.lora: nothing, a path, {path, scale, weight_name}, or a list of these.

    Raises:
        UserError: something else.
    """
    found = []
    for each in [] if value is None else value if isinstance(value, list | tuple) else [value]:
        values = {"path": each} if isinstance(each, str) else each
        if not isinstance(values, dict) or "path" not in values:
            raise UserError(f"model.lora: expected a path or {{path: …, scale: 1.0}}, got {each!r}")
        names = [field.name for field in fields(Lora)]
        for name in values:
            if name not in names:
                raise unknown_name("setting of model.lora", str(name), names)
        check_types(Lora, values, "model.lora")
        found.append(Lora(**values))
    return tuple(found)


def files(wanted: Sequence[Lora], local_only: bool = False) -> list[Path]:
    """Of each adapter the one file on this machine, before anything large is loaded; local_only: nothing is downloaded.

    Raises:
        UserError: a file is missing, or peft is.
    """
    if wanted and importlib.util.find_spec("peft") is None:
        raise UserError("model.lora needs the package peft, which is not installed: pip install 'ditbench[lora]'")
    return [_file(lora, local_only) for lora in wanted]


def fuse(pipe: Any, lora: Lora, file: Path) -> None:
    """Add an adapter to the pipeline's weights, in their dtype and in place.

    Raises:
        UserError: the pipeline takes no LoRA, or not all layers of this one: nothing is fused by half.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"diffusers loads no LoRA into a {type(pipe).__name__}; leave model.lora out")
    source = {"pretrained_model_name_or_path_or_dict": str(file.parent), "weight_name": file.name}
    parts = {name: getattr(pipe, name) for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None}
    try:
        state = pipe.lora_state_dict(**source, local_files_only=True)
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=NAME, local_files_only=True)
    except (ValueError, RuntimeError, LookupError, AttributeError, OSError) as error:
        first_line = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"model.lora={lora.path} cannot be loaded into a {type(pipe).__name__}: {first_line}"
        ) from error
    _check_all_are_in(lora, state[0] if isinstance(state, tuple) else state, parts, type(pipe).__name__)
    pipe.fuse_lora(components=list(parts), lora_scale=lora.scale, adapter_names=[NAME])
    pipe.unload_lora_weights()


def _file(lora: Lora, local_only: bool) -> Path:
    """The adapter's one file on this machine; from the hub only if the path is a hub id."""
    place = locate(lora.path, "model.lora", f"a {SUFFIX} file, a folder or a hub id")
    if place.kind == FILE:
        return Path(place.where)
    if place.kind == HUB:
        return _downloaded(place, lora.weight_name or USUAL_FILE, local_only)
    folder = Path(place.where)
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
    name = lora.weight_name or (names[0] if len(names) == 1 else USUAL_FILE)
    if name not in names:
        there = ", ".join(names[:5]) or f"no {SUFFIX} file"
        raise UserError(f"model.lora={lora.path}: no {name} in that folder, it has {there}; set weight_name")
    return folder / name


def _downloaded(place: Place, name: str, local_only: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(place.where, name, local_files_only=local_only))
    except (HfHubHTTPError, OSError) as error:
        folder = f"./weights/{place.where.rsplit('/', 1)[-1]}"
        raise UserError(
            f"model.lora={place.where}: {name} cannot be had from the hub now. Where there is a network: "
            f"`hf download {place.where} {name} --local-dir {folder}`; then model.lora={folder}/{name}"
        ) from error


def _check_all_are_in(lora: Lora, state: dict[str, Any], parts: dict[str, nn.Module], pipeline: str) -> None:
    """Every layer that the adapter's file names got its adapter; diffusers leaves out the others with a warning.

    Text encoders are called otherwise in the file than here: of them, that any layer got one.
    """
    wanted = {ADAPTER.split(key)[0] for key in state}
    missing = {name for name in wanted if name.partition(".")[0] not in parts}
    for part, module in parts.items():
        own = {name for name in wanted if name.startswith(f"{part}.")}
        got = {f"{part}.{name}" for name, layer in module.named_modules() if NAME in getattr(layer, "lora_A", ())}
        got |= {f"{part}.{name}" for name, layer in module.named_modules() if NAME in getattr(layer, "lokr_w1", ())}
        missing |= (own - got) if part.startswith("transformer") else (set() if got else own)
    if missing or not wanted:
        which = f"{sorted(missing)[0]}, {len(missing)} of {len(wanted)}" if wanted else "none"
        raise UserError(
            f"model.lora={lora.path}: layers that the {pipeline} does not have ({which}); it is for another model"
        )
