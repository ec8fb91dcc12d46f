"""Recipes as JSON with their tensors beside it, for safetensors: nothing is pickled.

One rule serves every class: the arguments of its constructor are its attributes of the same name. A tensor becomes
{"tensor": name}, integer weight codes are packed without gaps ({"packed": name, …}, see `packing`), and int64 indices take the
narrowest integers that hold them. `CLASSES` is all that can be written, and all that a file can make.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256, tensors_sha256
from ditbench.harness.quant.folds import BlockFolds, RowFold
from ditbench.harness.quant.packing import CODES_PER_WORD, pack, unpack
from ditbench.harness.quant.quantizers import ActQuant, Levels, LookupWeight, QuantizedWeight
from ditbench.harness.quant.recipe import AttentionRecipe, LayerRecipe, LowRank
from ditbench.harness.quant.rotations import BlockRotation
from ditbench.harness.quant.sage import SageRecipe
from ditbench.harness.quant.spec import FLOAT8, QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.tlq import TwinLogLevels
from ditbench.harness.quant.transforms import Hadamard, KroneckerMap, Permutation, RegularHadamard, Transform
from ditbench.harness.quant.uneven import ChannelScaledQuant, DualScaleQuant, LeadingQuant, LogSqrt2Quant

CLASSES: dict[str, type] = {
    each.__name__: each
    for each in (
        *(LayerRecipe, AttentionRecipe, SageRecipe, LowRank, QuantSpec, StepTable, BlockFolds, RowFold),
        *(Transform, Hadamard, RegularHadamard, Permutation, BlockRotation, KroneckerMap),
        *(QuantizedWeight, LookupWeight, Levels, TwinLogLevels),
        *(ActQuant, LogSqrt2Quant, DualScaleQuant, ChannelScaledQuant, LeadingQuant),
    )
}
NARROW = (torch.int16, torch.int32)


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of value; its tensors go to `tensors` under names that start with name.

    Raises:
        UserError: a class that files cannot make, such as a plugin's own rotation.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, tensors)
    if isinstance(value, list | tuple | nn.ModuleList):
        return [encode(each, f"{name}/{index}", tensors) for index, each in enumerate(value)]
    kind = type(value).__name__
    if CLASSES.get(kind) is not type(value):
        raise UserError(f"{name}: a {kind} cannot be written to a file; known: {', '.join(CLASSES)}")
    encoded: dict[str, Any] = {"type": kind}
    for argument in inspect.signature(type(value)).parameters:
        if isinstance(value, QuantizedWeight | LookupWeight) and argument == "codes_OC":
            encoded[argument] = _encode_codes(value, f"{name}/{argument}", tensors)
        else:
            encoded[argument] = encode(getattr(value, argument), f"{name}/{argument}", tensors)
    return encoded


def content_sha256(value: Any) -> str:
    """Of what `encode` writes: equal for equal content. A plugin's own class is equal to nothing but itself."""
    tensors: dict[str, Tensor] = {}
    try:
        return canonical_sha256([encode(value, "", tensors), tensors_sha256(tensors)])
    except UserError:
        return f"object {id(value)}"


def decode(value: Any, tensors: Mapping[str, Tensor], where: str = "") -> Any:
    """The inverse of `encode`; lists become tuples. where: what messages call the value.

    Raises:
        ValueError: not what `encode` writes, an argument of another type or value, or a tensor is missing.
    """
    if isinstance(value, list):
        return tuple(decode(each, tensors, f"{where}/{index}") for index, each in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        check_types(where, value, {"tensor": str}, {"index": bool})
        tensor = _named(value["tensor"], tensors, where)
        return tensor.long() if value.get("index") else tensor
    if "packed" in value:
        return _decode_codes(value, tensors, where)
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ValueError(f"{where}: no class {kind!r}; known: {', '.join(CLASSES)}")
    arguments = {key: decode(each, tensors, f"{where}/{key}") for key, each in value.items() if key != "type"}
    hints = _argument_types(CLASSES[kind])
    needed = {name for name, each in inspect.signature(CLASSES[kind]).parameters.items() if each.default is each.empty}
    optional = {name: hint for name, hint in hints.items() if name not in needed}
    check_types(where, arguments, {name: hints[name] for name in hints if name in needed}, optional)
    try:
        made = CLASSES[kind](**arguments)
    except (UserError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(made, QuantizedWeight | LookupWeight) and (codes := value["codes_OC"]).get("packed"):
        bits, least = _code_layout(made)
        if (codes["bits"], codes["least"]) != (bits, least):
            raise ValueError(
                f"{where}/codes_OC: codes of this weight have {bits} bits from {least}; these are said to have "
                f"{codes['bits']} bits from {codes['least']}"
            )
    return made


def check_types(where: str, values: Any, needed: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> None:
    """That a mapping has these fields, of these types, and no others. Types are as annotations write them; an int is a float,
    a bool is no int, and floats are finite.

    Raises:
        ValueError: it has not.
    """
    known = {**needed, **(optional or {})}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected {{{', '.join(known)}}}, got {_told(values)}")
    if unknown := [str(name) for name in values if name not in known]:
        raise ValueError(f"{where}: unknown field {unknown[0][:40]!r}; known: {', '.join(known)}")
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    for name, value in values.items():
        if not _fits(value, known[name]):
            raise ValueError(f"{where}/{name}: expected {_type_name(known[name])}, got {_told(value)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_fits(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, arguments[1]) for each in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _type_name(hint: Any) -> str:
    return (
        "nothing" if hint is NoneType else hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    )


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)}"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value)[:40] if plain else f"a {type(value).__name__}"


@cache
def _argument_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind if is_dataclass(kind) else vars(kind)["__init__"])
    return {name: hints[name] for name in inspect.signature(kind).parameters}


def _named(name: str, tensors: Mapping[str, Tensor], where: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{where}: tensor {name[:120]!r} is missing")
    return tensors[name]


def _encode_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.int64:
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    narrow = next((kind for kind in NARROW if torch.equal(tensor, tensor.to(kind).long())), torch.int64)
    tensors[name] = tensor.to(narrow, copy=True, memory_format=torch.contiguous_format)
    return {"tensor": name, "index": True}


def _encode_codes(weight: QuantizedWeight | LookupWeight, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(weight, LookupWeight) and weight.spec.number in FLOAT8:
        return _encode_tensor(weight.codes_OC, name, tensors)
    bits, least = _code_layout(weight)
    codes_OC = weight.codes_OC.detach().cpu()
    tensors[name] = pack(codes_OC.to(torch.int16) - least, bits).contiguous()
    return {
        "packed": name,
        "bits": bits,
        "width": codes_OC.shape[1],
        "least": least,
        "unsigned": codes_OC.dtype == torch.uint8,
    }


def _code_layout(weight: QuantizedWeight | LookupWeight) -> tuple[int, int]:
    """(bits of a packed code, the code that is packed as 0)."""
    return (weight.code_bits, 0) if isinstance(weight, LookupWeight) else (weight.spec.bits, weight.spec.least_code)


def _decode_codes(value: dict[str, Any], tensors: Mapping[str, Tensor], where: str) -> Tensor:
    check_types(where, value, {"packed": str, "bits": int, "width": int, "least": int, "unsigned": bool})
    packed, bits, width = _named(value["packed"], tensors, where), value["bits"], value["width"]
    if not 1 <= bits <= 8 or width < 0 or not -128 <= value["least"] <= 0:
        raise ValueError(f"{where}: no codes of {bits} bits from {value['least']}, {width} in a row")
    columns = width if bits == 8 else -(-width // CODES_PER_WORD) * bits
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != columns:
        raise ValueError(
            f"{where}: {width} codes of {bits} bits are uint8 (O, {columns}), got {packed.dtype} {tuple(packed.shape)}"
        )
    codes_OC = unpack(packed, bits, width)
    return (codes_OC.to(torch.int16) + value["least"]).to(torch.uint8 if value["unsigned"] else torch.int8)
