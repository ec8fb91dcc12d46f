"""What a transformer that somebody else quantized stores, read from its tensors: bits and bytes of each linear layer, and their label.

Counted as for our own rows (`quant/accounting.py`): of a quantized layer everything its module holds (codes, scales, zero points, a low-rank branch),
of what is not quantized 16 bits a value, whatever it is computed in. What the tensors do not say is None.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.common.plain_tensors import held_bytes, plain_tensors
from ditbench.harness.quant.layer_names import linear_names
from ditbench.harness.quant.spec import FLOAT_BITS
from ditbench.harness.quant.target import weight_matrix

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IN_FLOAT = "float"
GGUF = "gguf"


@dataclass(frozen=True)
class StoredLayer:
    """weight: its format in a word (int8, fp8, Q4_K). act: that of what it is multiplied with, IN_FLOAT, or None: not known. weight_bytes:
    all but the bias.
    """

    weight: str
    act: str | None
    weight_bytes: int


def stored_layers(theirs: nn.Module, ours: nn.Module, library: str | None) -> dict[str, StoredLayer]:
    """The quantized layers by name. ours: the float model, which says which linear layers there are and how many weights each has."""
    found = {}
    for name in linear_names(ours):
        module, count = theirs.get_submodule(name), weight_matrix(ours.get_submodule(name)).numel()
        tensors = {
            key: tensor for key, tensor in module.state_dict().items() if isinstance(tensor, Tensor) and key != "bias"
        }
        codes = max((plain for each in tensors.values() for plain in plain_tensors(each)), key=_bytes, default=None)
        if codes is not None and codes.dtype not in FLOATS:
            size = sum(map(held_bytes, tensors.values()))
            found[name] = StoredLayer(_format(module, codes, count), _activations(module, library), size)
    return found


def stored(
    theirs: nn.Module, ours: nn.Module, macs: dict[str, int], library: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record's `bits`, and the byte counts of its `efficiency` (as `accounting.account` gives them)."""
    quantized = stored_layers(theirs, ours, library)
    layers = linear_names(ours)
    count = {name: weight_matrix(ours.get_submodule(name)).numel() for name in layers}
    size = {
        name: quantized[name].weight_bytes if name in quantized else count[name] * FLOAT_BITS // 8 for name in layers
    }
    in_float = {name: count[name] * FLOAT_BITS // 8 for name in layers}
    baseline = sum({id(p): p.numel() for p in ours.parameters()}.values()) * FLOAT_BITS // 8
    model_bytes = baseline + sum(size[name] - in_float[name] for name in quantized)
    linear_macs = sum(macs[name] for name in layers)
    act_bits = {name: _act_bits(quantized.get(name)) for name in layers}
    act_known = all(bits is not None for bits in act_bits.values())
    both = [name for name in quantized if (act_bits[name] or FLOAT_BITS) < FLOAT_BITS]

    def bits_of(names: list[str]) -> float | None:
        return 8 * sum(size[n] for n in names) / sum(count[n] for n in names) if names else None

    bits = {
        "label": label_of(list(quantized.values()), library),
        "weight_bits_effective": bits_of(layers),
        "weight_bits_quantized_layers": bits_of(list(quantized)),
        "weight_bits_mac_weighted": sum(macs[n] * 8 * size[n] / count[n] for n in layers) / linear_macs,
        "act_bits_effective": sum(macs[n] * (act_bits[n] or 0) for n in layers) / linear_macs if act_known else None,
        "mac_share_quantized": sum(macs[n] for n in both) / macs[""] if act_known else None,
        "mac_share_weight_quantized": sum(macs[n] for n in quantized) / macs[""],
        "attention_operands_quantized": [],
        "float_layers": [name for name in layers if name not in quantized],
        "weight_format": _listed([each.weight for each in quantized.values()]),
        "act_format": _listed([each.act or "not known" for each in quantized.values()]),
    }
    of_theirs = {name: size[name] + _bias_bytes(ours.get_submodule(name)) for name in quantized}
    of_float = {name: in_float[name] + _bias_bytes(ours.get_submodule(name)) for name in quantized}
    return bits, {
        "model_bytes": model_bytes,
        "baseline_model_bytes": baseline,
        "compression": baseline / model_bytes,
        "compression_quantized_layers": sum(of_float.values()) / sum(of_theirs.values()) if quantized else None,
    }


def label_of(layers: list[StoredLayer], library: str | None) -> str:
    """ "int8 (torchao)"; "W int8 A int8 (torchao)" where activations are quantized too; formats from the commonest on."""
    weight, act = _listed([each.weight for each in layers]), _listed([each.act for each in layers if each.act])
    if weight is None:
        return f"{IN_FLOAT} ({library})" if library else IN_FLOAT
    said = weight if act in (None, IN_FLOAT) else f"W {weight} A {act}"
    return f"{said} ({library})" if library else said


def _listed(words: list[str]) -> str | None:
    return "/".join(word for word, _ in Counter(words).most_common()) or None


def _format(module: nn.Module, codes: Tensor, count: int) -> str:
    weight = module.weight
    for of in (weight, codes):
        quant_type = getattr(of, "quant_type", None) or getattr(getattr(of, "quant_state", None), "quant_type", None)
        if quant_type is not None:  # of gguf an enum, of bitsandbytes text
            return str(getattr(quant_type, "name", quant_type))
    target = getattr(weight, "target_dtype", None)  # of torchao: int4 that lie in int8
    if target is not None:
        return str(target).removeprefix("torch.")
    kind = "fp" if codes.dtype.is_floating_point else "int"
    return f"{kind}{round(8 * _bytes(codes) / count)}"


def _activations(module: nn.Module, library: str | None) -> str | None:
    """What the layer's input becomes, as far as its tensors say."""
    for name in ("act_quant_kwargs", "activation_quantization", "activation_qtype"):
        if hasattr(module.weight, name):
            found = getattr(module.weight, name)
            if found is None:
                return IN_FLOAT
            told = f"{type(found).__name__} {found}".lower()
            return next((short for word, short in ACTIVATIONS.items() if word in told), None)
    if library == GGUF or type(module).__name__ == "Linear4bit":
        return IN_FLOAT  # weights are dequantized, and multiplied in float
    return None


ACTIVATIONS = {"float8": "fp8", "int8": "int8", "int4": "int4"}


def _act_bits(layer: StoredLayer | None) -> int | None:
    if layer is None or layer.act == IN_FLOAT:
        return FLOAT_BITS
    return None if layer.act is None else int(layer.act[-1])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bias_bytes(module: nn.Module) -> int:
    return 0 if module.bias is None else module.bias.numel() * FLOAT_BITS // 8
