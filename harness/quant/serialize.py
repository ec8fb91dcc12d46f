"""Recipes as JSON with their tensors beside it, for safetensors: nothing is pickled.

One rule serves every class: the arguments of its constructor are its attributes of the same name. A tensor becomes
{"tensor": name}, integer weight codes are packed without gaps ({"packed": name, …}, see `packing`), and int64 indices take the
narrowest integers that hold them. `CLASSES` is all that can be written, and all that a file can make.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256, tensors_sha256
from ditbench.harness.quant.folds import BlockFolds, RowFold
from ditbench.harness.quant.packing import pack, unpack
from ditbench.harness.quant.quantizers import ActQuant, Levels, LogSqrt2Quant, LookupWeight, QuantizedWeight
from ditbench.harness.quant.recipe import AttentionRecipe, LayerRecipe, LowRank
from ditbench.harness.quant.rotations import BlockRotation
from ditbench.harness.quant.spec import E4M3, QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.tlq import TwinLogLevels
from ditbench.harness.quant.transforms import Hadamard, Permutation, Transform

CLASSES: dict[str, type] = {
    each.__name__: each
    for each in (
        *(LayerRecipe, AttentionRecipe, LowRank, QuantSpec, StepTable, BlockFolds, RowFold),
        *(Transform, Hadamard, Permutation, BlockRotation),
        *(QuantizedWeight, LookupWeight, Levels, TwinLogLevels, ActQuant, LogSqrt2Quant),
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


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `encode`; lists become tuples.

    Raises:
        KeyError, TypeError, ValueError: not what `encode` writes, or a tensor is missing.
    """
    if isinstance(value, list):
        return tuple(decode(each, tensors) for each in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.long() if value.get("index") else tensor
    if "packed" in value:
        codes_OC = unpack(tensors[value["packed"]], value["bits"], value["width"])
        return (codes_OC.to(torch.int16) + value["least"]).to(torch.uint8 if value["unsigned"] else torch.int8)
    arguments = {key: decode(each, tensors) for key, each in value.items() if key != "type"}
    return CLASSES[value["type"]](**arguments)


def _encode_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.int64:
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    narrow = next((kind for kind in NARROW if torch.equal(tensor, tensor.to(kind).long())), torch.int64)
    tensors[name] = tensor.to(narrow, copy=True, memory_format=torch.contiguous_format)
    return {"tensor": name, "index": True}


def _encode_codes(weight: QuantizedWeight | LookupWeight, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(weight, LookupWeight) and weight.spec.number == E4M3:
        return _encode_tensor(weight.codes_OC, name, tensors)
    bits, least = (
        (weight.code_bits, 0) if isinstance(weight, LookupWeight) else (weight.spec.bits, weight.spec.quant_min)
    )
    codes_OC = weight.codes_OC.detach().cpu()
    tensors[name] = pack(codes_OC.to(torch.int16) - least, bits).contiguous()
    return {
        "packed": name,
        "bits": bits,
        "width": codes_OC.shape[1],
        "least": least,
        "unsigned": codes_OC.dtype == torch.uint8,
    }
