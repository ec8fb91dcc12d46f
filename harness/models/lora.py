"""LoRA adapters: loaded and fused into the float weights by diffusers and peft, before anything is calibrated."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError, first_words, unknown_name
from ditbench.harness.common.type_checks import check_types
from ditbench.harness.models.checkpoint import FILE, HUB, Place, locate
from ditbench.harness.models.checkpoint_files import FETCH_AGAIN, SUFFIX, check_weights
from ditbench.harness.models.heard import listening

NAME = "ditbench"  # of the adapter while it is being fused
USUAL_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = re.compile(r"\.(?:lora|lokr)[_.]")  # what follows a layer's name in an adapter's keys
HALF = re.compile(r"[._]lora(?:_linear_layer)?[._](down|up)(?=\.)")  # what peft calls .lora_A and .lora_B
LEFT_OUT = re.compile(r"filter out|[Uu]nsupported keys|will be ignored|unexpected keys|missing keys")


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
        UserError: the pipeline takes no LoRA, or not all tensors of this one: nothing is fused by half. The pipeline is spoilt then.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"diffusers loads no LoRA into a {type(pipe).__name__}; leave model.lora out")
    source = {"pretrained_model_name_or_path_or_dict": str(file.parent), "weight_name": file.name}
    parts = {name: getattr(pipe, name) for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None}
    try:
        _check_file(file)
        with listening() as said:
            state = pipe.lora_state_dict(**source, local_files_only=True)
            state = _in_pefts_names(state[0] if isinstance(state, tuple) else state)
            _check_fits(state, parts, type(pipe).__name__)
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=NAME, local_files_only=True)
            _check_all_are_in(state, parts)
            left_out = [entry.getMessage() for entry in said if LEFT_OUT.search(entry.getMessage())]
            if left_out:
                raise UserError(f"diffusers would leave out some of it: {' '.join(left_out[0].split())[:200]}")
            said.clear()  # the rest is of parts that it has nothing for
    except UserError as error:
        raise UserError(f"model.lora={lora.path}: {error}") from error
    except (ValueError, RuntimeError, LookupError, AttributeError, TypeError, OSError) as error:
        raise UserError(
            f"model.lora={lora.path} cannot be loaded into a {type(pipe).__name__}: {first_words(error)}"
        ) from error
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


def _check_file(file: Path) -> None:
    """Whether all its tensors are numbers, and none of a kind that diffusers drops."""
    check_weights(file)
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118, not a dict
            if "dora_scale" in key:
                raise UserError(f"{key} is of a DoRA that diffusers reads without its scales; it cannot be fused")
            if not bool(opened.get_tensor(key).isfinite().all()):
                raise UserError(f"NaN or infinity in {key}; {FETCH_AGAIN}")


def _in_pefts_names(state: dict[str, Any]) -> dict[str, Tensor]:
    """{part.layer.lora_A.weight: …} of other names for the two halves, without what scales them."""
    sides = {"down": "A", "up": "B"}
    state = {_plain(key): tensor for key, tensor in state.items()}
    named = {HALF.sub(lambda match: f".lora_{sides[match[1]]}", key): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in named.items() if isinstance(tensor, Tensor) and not key.endswith(".alpha")}


def _plain(name: str) -> str:
    """Of CLIP's layers, which the versions of transformers call in two ways, the shorter name."""
    return name if name.startswith("transformer") else name.replace(".text_model.", ".", 1)


def _layer(key: str) -> str:
    return ADAPTER.split(key)[0]


def _check_fits(state: dict[str, Tensor], parts: dict[str, nn.Module], pipeline: str) -> None:
    """Each layer of the file is one of the pipeline's, has both halves, and they have its shape.

    Diffusers fills up a half that is too narrow, and widens the model's layer for one that is too wide.
    """
    wanted = sorted({_layer(key) for key in state})
    known = {
        _plain(f"{part}.{name}"): layer for part, module in parts.items() for name, layer in module.named_modules()
    }
    lost = [name for name in wanted if name not in known]
    if lost or not wanted:
        which = f"{lost[0]}, {len(lost)} of {len(wanted)}" if wanted else "none"
        raise UserError(f"layers that the {pipeline} does not have ({which}); it is for another model")
    for name in wanted:
        down, up = (state.get(f"{name}.lora_{side}.weight") for side in "AB")
        if (down is None) != (up is None):
            raise UserError(
                f"{name} has a lora_{'B' if down is None else 'A'} and no lora_{'A' if down is None else 'B'}"
            )
        weight = getattr(known[name], "weight", None)
        if down is None or up is None:
            continue  # LoKr: of two matrices or more, which peft checks
        if down.shape[0] != up.shape[1]:
            raise UserError(f"{name}: its lora_A has rank {down.shape[0]}, its lora_B {up.shape[1]}")
        if weight is not None and (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
            raise UserError(
                f"{name}: its lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} are for another layer than the "
                f"pipeline's, which is {tuple(weight.shape)}; it is for another model"
            )


def _check_all_are_in(state: dict[str, Tensor], parts: dict[str, nn.Module]) -> None:
    """Every tensor of the file is in its layer now, and there is none in a layer that the file does not have."""
    own = {key.removesuffix(".weight") for key in state}
    got = {
        _plain(f"{part}.{name.replace(f'.{NAME}', '')}").removesuffix(".weight")
        for part, module in parts.items()
        for name, _ in module.named_parameters()
        if f".{NAME}" in name
    }
    if own - got:
        raise UserError(f"{min(own - got)} fits no layer of the pipeline; it is for another model")
    if got - own:
        raise UserError(f"it lacks {min(got - own)}, which would be random; the file is not whole")
