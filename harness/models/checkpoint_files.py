"""What is seen of a checkpoint's files before a library reads them: what is broken, missing, quantized or no tensors is refused by its path.

Of a folder only what would be loaded is looked at: the parts that its index names, of each the weights of the variant that is
asked for, safetensors before pickles. Weights are known by their headers; nothing large is read.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ditbench.harness.common.errors import UserError, first_words

INDEX, CONFIG, TRANSFORMER = "model_index.json", "config.json", "transformer"
SUFFIX = ".safetensors"
SHARD = r"(?:-\d{5}-of-\d{5})?"
WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model){SHARD}(?:\.([^.]+?))?{SHARD}\.(?:safetensors|bin)"
)
FLOATS = ("F64", "F32", "F16", "BF16")  # how safetensors names dtypes that hold weights, not codes
INTEGERS = ("I64", "I32", "U8", "BOOL")  # those of buffers that are integers by nature
BUFFER = re.compile(r"(?:^|[._])(?:(?:position|token_type)_ids|index|mask)$")
OF_TORCH = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOAT_NEEDED = "ditbench quantizes float weights: give it a checkpoint in float32, bfloat16 or float16"
FETCH_AGAIN = "the file is corrupt or truncated, fetch it again"
OLD_NAMES = ("Transformer2DModel",)  # which diffusers reads as the class that came of it (DiT, PixArt)


def check_pipeline_folder(folder: Path, variant: str | None, replaced: Collection[str], whole: bool = True) -> None:
    """A pipeline's folder, or three models side by side without an index (Open-Sora).

    replaced: parts whose weights come from elsewhere. whole: False where some parts may not be downloaded yet.

    Raises:
        UserError: a part or a file that cannot be what its index says.
    """
    index = read_object(folder / INDEX) if (folder / INDEX).exists() else None
    if index is not None and not isinstance(index.get("_class_name"), str | list):
        raise UserError(f"{folder / INDEX} names no pipeline (_class_name)")
    classes = {path.parent.name: None for path in sorted(folder.glob(f"*/{CONFIG}"))} if index is None else named(index)
    if whole and (gone := [name for name in classes if name not in replaced and not (folder / name).is_dir()]):
        raise UserError(f"{folder / INDEX} names a {gone[0]}, and no folder {folder / gone[0]} is there")
    parts = [folder / name for name in classes if name not in replaced and (folder / name).is_dir()]
    known = {name for part in parts for name in variants(part) if name}
    if variant is not None and variant not in known:
        there = f"there are those of {', '.join(sorted(known))}" if known else "leave it out"
        raise UserError(f"model.variant={variant}: no part of {folder} has files of that variant; {there}")
    for part in parts:
        check_part(part, variant, classes[part.name])
    for name in replaced:  # whose configuration may be read all the same
        if (folder / name / CONFIG).is_file():
            read_object(folder / name / CONFIG)


def named(index: dict[str, Any]) -> dict[str, str | None]:
    """Of a pipeline's index the parts that it has, with their classes where diffusers has these."""
    pairs = {
        name: of for name, of in index.items() if isinstance(of, list) and len(of) == 2 and not name.startswith("_")
    }
    pairs = {name: of for name, of in pairs.items() if all(isinstance(word, str) for word in of)}
    return {name: word if library == "diffusers" else None for name, (library, word) in pairs.items()}


def check_part(part: Path, variant: str | None, kind: str | None = None) -> None:
    """One part's folder. kind: the class of diffusers that the index names.

    Raises:
        UserError: see above.
    """
    for path in sorted(part.glob("[!.]*.json")):
        values = read_object(path)
        if ".index." in path.name:
            _check_shards(path, values.get("weight_map"))
    if not (part / CONFIG).is_file():
        return  # a tokenizer or a scheduler
    config = read_object(part / CONFIG)
    if config.get("quantization_config"):
        raise already_quantized(part.name, config["quantization_config"])
    own = config.get("_class_name")
    if kind is not None and own not in (None, kind, *OLD_NAMES):
        raise UserError(f"{part / CONFIG} is of a {own}, the pipeline has a {kind}")
    there = variants(part)
    if there and not there & {"", variant}:
        raise UserError(f"{part} has files of a variant only; add model.variant={sorted(there)[0]}")
    wanted = [path for path in _weights(part) if _variant(path) == (variant if variant in there else "")]
    for file in [path for path in wanted if path.suffix == SUFFIX] or wanted:
        check_weights(file)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds {…}. Raises UserError: it does not."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_words(error)}); fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be right: expected a JSON object {{…}}, got {json.dumps(values)[:40]}")
    return values


def variants(part: Path) -> set[str]:
    """Of the weight files in a model's folder, such as "fp16"; "" is none."""
    return {_variant(path) for path in _weights(part)}


def check_weights(file: Path) -> None:
    """By the header of safetensors; of a pickle by the dtypes of its tensors.

    Raises:
        UserError: unreadable, or holds anything but float weights and integer buffers.
    """
    for name, dtype in (_dtypes(file) if file.suffix == SUFFIX else _pickled_dtypes(file)).items():
        if dtype not in FLOATS and not (dtype in INTEGERS and BUFFER.search(name)):
            what = "holds no weights" if dtype in ("BOOL", "C64") else "is already quantized"
            raise UserError(f"{file} {what} ({name} is stored as {dtype}); {FLOAT_NEEDED}")


def already_quantized(part: str, config: Any) -> UserError:
    """config: `quantization_config`, a dictionary or an object of one of many libraries."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    by = f" ({getattr(method, 'value', method)})" if method else ""
    return UserError(f"its {part} is already quantized{by}; {FLOAT_NEEDED}")


def _weights(part: Path) -> list[Path]:
    return sorted(path for path in part.iterdir() if WEIGHTS.fullmatch(path.name))


def _variant(path: Path) -> str:
    match = WEIGHTS.fullmatch(path.name)
    return (match[1] or "") if match else ""


def _check_shards(path: Path, weight_map: Any) -> None:
    """Whether each weight is said to lie in a file beside the index; that the files are there, the library says."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} says of no weight in which file it is (weight_map); fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: weight_map has {name} in {file!r}, which is no file beside it")


def _dtypes(file: Path) -> dict[str, str]:
    """Of all tensors but single numbers, which count something."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, not a dict
            return {name: tensor.get_dtype() for name, tensor in slices.items() if tensor.get_shape()}
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({first_words(error)}); {FETCH_AGAIN}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({first_words(error)})") from error


def _pickled_dtypes(file: Path) -> dict[str, str]:
    """By torch's reader of tensors alone, which runs nothing that a file says; without their values.

    Both libraries read pickles with it too. It is asked first since one of them ends in a traceback of it.
    """
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds something else than tensors, or is damaged; nothing else is unpickled: give it as {SUFFIX}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({first_words(error)}); {FETCH_AGAIN}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{file} holds something else than tensors by name; give it as {SUFFIX}")
    return {str(name): OF_TORCH.get(tensor.dtype, str(tensor.dtype)) for name, tensor in state.items() if tensor.ndim}
