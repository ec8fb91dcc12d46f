"""Labels that are computed: effective bits, share of MACs, float layers, bytes of the stored model.

What is multiplied beside layers and softmax attention (gates that choose experts, linear attention, convolutions along time) stays in float and is
`mac_share_of_no_layer`.

Counted per quantized layer: packed codes, scales (of blocks as they are kept, and of their tensor), zero points, online transforms, low-rank branch, static activation
ranges, bias tables, and what a fold into adaLN-single adds (to the first reader of its site). Float weights, biases, folds
and low-rank factors count at 16 bits, scales and transforms at 32 (scales of blocks: 8, 16 or 32), indices at 16. Constants that can be built again
(Hadamard matrices) do not count. A layer whose recipe changes with the range of steps counts all that its recipes hold,
equal parts once. It is what an export takes (`build.export`), to the byte, but for parameters that their class keeps in
float32 (norms, tables and time embedding of Wan): they count at 16 bits like all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditbench.harness.quant.effective import effective_linear, touched_layers
from ditbench.harness.quant.layer_names import aliases, fused_layers, linear_names
from ditbench.harness.quant.quantizers import ActQuant, LookupWeight, QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.serialize import content_sha256
from ditbench.harness.quant.spec import FLOAT_BITS
from ditbench.harness.quant.target import TableRows, Target, weight_matrix
from ditbench.harness.quant.transforms import Transform

FLOAT_BYTES = FLOAT_BITS // 8
INDEX_BYTES = 2
Part = tuple[str, str]  # what it is of a layer ("weight", "bias", …), and its content


def account(
    target: Target, recipe: ModelRecipe, macs: dict[str, int], label: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record's `bits` field and the byte counts of its `efficiency` field.

    macs: multiply-accumulates per layer and attention module for one sample, "" for the whole transformer (`LoadedModel.macs`).
    """
    shares = {name: recipe.shares(name) for name in recipe.layers}
    quantized = {name for name, share in shares.items() if any(layer.weight or layer.act for layer, _ in share)}
    same, fused = aliases(target.transformer), fused_layers(target.transformer)
    macs = dict(macs)
    for other, name in same.items():  # one layer that is called under two names
        macs[name] += macs.pop(other, 0)
    layers = linear_names(target.transformer)
    weights = {name: weight_matrix(target.module(name)).numel() for name in layers}
    widths = {name: weight_matrix(target.module(name)).shape[1] for name in layers}
    bytes_of = {name: layer_bytes(target, recipe, name) for name in touched_layers(target, recipe)}
    weight_bytes = {name: bytes_of[name][0] if name in bytes_of else weights[name] * FLOAT_BYTES for name in layers}

    rebuilt = {*bytes_of, *(other for other, name in same.items() if name in bytes_of)}
    stored: dict[str, dict[int, int]] = {"all": {}, "kept": {}}  # each parameter once, whatever its names
    for name, parameter in target.transformer.named_parameters(remove_duplicate=False):
        layer = name.rpartition(".")[0]
        if layer not in fused:
            stored["all"][id(parameter)] = parameter.numel()
        if layer not in fused and layer not in rebuilt:
            stored["kept"][id(parameter)] = parameter.numel()
    baseline_bytes, model_bytes = (sum(stored[which].values()) * FLOAT_BYTES for which in ("all", "kept"))
    model_bytes += sum(weight + other for weight, other in bytes_of.values())
    model_bytes += sum(_range_bytes(quant) for quant in recipe.attention_quantizers())
    float_bytes_quantized = sum(
        sum(p.numel() for p in target.module(name).parameters()) * FLOAT_BYTES for name in quantized
    )
    stored_bytes_quantized = sum(sum(bytes_of[name]) for name in quantized)

    def weight_bits(names: list[str]) -> float | None:
        count = sum(weights[n] for n in names)
        return 8 * sum(weight_bytes[n] for n in names) / count if count else None

    def quantized_macs(*sides: str) -> float:
        """Of the layers with these sides quantized, where it changes with the step: the mean over the steps."""
        return sum(
            macs[name] * part * min(rounded_share(layer, side, widths[name]) for side in sides)
            for name in layers
            for layer, part in shares.get(name, [])
            if all(getattr(layer, side) for side in sides)
        )

    linear_macs = sum(macs[name] for name in layers)
    attention_macs = sum(macs.get(name, 0) for name in recipe.attention)
    other_macs = macs[""] - linear_macs - sum(macs[name] for name in macs.keys() - {*weights, *fused, ""})
    bits = {
        "label": label,
        "weight_bits_effective": weight_bits(layers),
        "weight_bits_quantized_layers": weight_bits(sorted(quantized)),
        "weight_bits_mac_weighted": sum(macs[n] * 8 * weight_bytes[n] / weights[n] for n in layers) / linear_macs,
        "act_bits_effective": sum(macs[n] * _act_bits(recipe.shares(n), widths[n]) for n in layers) / linear_macs,
        "mac_share_quantized": (quantized_macs("weight", "act") + attention_macs) / macs[""],
        "mac_share_weight_quantized": quantized_macs("weight") / macs[""],
        "mac_share_of_no_layer": max(other_macs, 0) / macs[""],
        "attention_operands_quantized": sorted(recipe.attention),
        "float_layers": [n for n in layers if n not in quantized],
    }
    if recipe.attention:
        bits["attention_bits_effective"] = _attention_bits(recipe, macs, macs[""] - linear_macs)
    size = {
        "model_bytes": model_bytes,
        "baseline_model_bytes": baseline_bytes,
        "compression": baseline_bytes / model_bytes,
        "compression_quantized_layers": float_bytes_quantized / stored_bytes_quantized if quantized else None,
    }
    return bits, size


def _attention_bits(recipe: ModelRecipe, macs: dict[str, int], of_attention: int) -> float:
    """The mean of q's, k's, the map's and v's bits over the products that no layer makes; 16 where they stay in float."""
    saved = sum(
        macs.get(name, 0) * (FLOAT_BITS - sum(each.operand_bits) / len(each.operand_bits))
        for name, each in recipe.attention.items()
    )
    return FLOAT_BITS - saved / of_attention


def stored_bytes(layer: LayerRecipe, folded: bool) -> int:
    """Bytes of a quantized weight with all that its transform, low-rank branch and static ranges add."""
    assert layer.weight is not None
    return _code_bytes(layer.weight) + sum(_overhead_bytes(layer, folded).values())


def _code_bytes(weight: QuantizedWeight | LookupWeight) -> int:
    rows, width = weight.codes_OC.shape
    if isinstance(weight, LookupWeight):
        code_bits, beside = weight.code_bits, _nbytes(*weight.levels.state_dict().values())
    else:
        code_bits, beside = weight.spec.bits, _nbytes(weight.scale_OG, weight.zero_point_OG, weight.tensor_scale)
    return rows * (-(-width // 8) * code_bits if code_bits < 8 else width) + beside


def _overhead_bytes(layer: LayerRecipe, folded: bool) -> dict[str, int]:
    branch = layer.low_rank
    return {
        "transform": _transform_bytes(_online(layer, folded)),
        "low_rank": 0 if branch is None else (branch.down_rC.numel() + branch.up_Or.numel()) * FLOAT_BYTES,
        "act": _range_bytes(layer.act),
    }


def _online(layer: LayerRecipe, folded: bool) -> Transform:
    return layer.transform.rotations_only() if folded else layer.transform


def _range_bytes(act: ActQuant | None) -> int:
    """Of static ranges; dynamic ones have none."""
    tables = [] if act is None else act.tables
    return sum(table.rows.numel() * 4 + _index_bytes(table.group_of_step) for table in tables)


def layer_bytes(target: Target, recipe: ModelRecipe, name: str) -> tuple[int, int]:
    """(bytes of the weight with its overheads and folds, bytes of the bias table)."""
    if name not in recipe.variants:
        sizes = _part_bytes(target, recipe, name)
        return sum(sizes.values()) - sizes["bias"], sizes["bias"]
    held: dict[Part, int] = {}
    for index in recipe.distinct(name)[0]:
        held |= held_parts(target, recipe.of_range(index), name)
    bias = sum(size for (part, _), size in held.items() if part == "bias")
    return sum(held.values()) - bias, bias


def held_parts(target: Target, recipe: ModelRecipe, name: str) -> dict[Part, int]:
    """Bytes of the parts of one layer, in a recipe of one range; equal parts of other recipes have the same key."""
    layer = recipe.layers.get(name, LayerRecipe())
    contents = {
        "weight": layer.weight or layer.transform,  # in float it is the same wherever its transform is
        "transform": _online(layer, _is_folded(target, recipe, name)),
        "low_rank": layer.low_rank,
        "act": layer.act,
        "folds": None,  # the same in all
        "bias": layer.transform.shift,
    }
    return {(part, content_sha256(contents[part])): n for part, n in _part_bytes(target, recipe, name).items()}


def _part_bytes(target: Target, recipe: ModelRecipe, name: str) -> dict[str, int]:
    layer = recipe.layers.get(name, LayerRecipe())
    transforms = {n: r.transform for n, r in recipe.layers.items()}
    in_float = weight_matrix(target.module(name)).numel() * FLOAT_BYTES
    folds = sum(
        _fold_bytes(layer.transform, sum(isinstance(producer, TableRows) for producer in site.producers))
        for site in target.sites
        if site.name in recipe.folded and site.consumers[0] == name
    )
    return {
        "weight": in_float if layer.weight is None else _code_bytes(layer.weight),
        **_overhead_bytes(layer, _is_folded(target, recipe, name)),
        "folds": folds,
        "bias": _bias_bytes(target, name, transforms, recipe),
    }


def _is_folded(target: Target, recipe: ModelRecipe, name: str) -> bool:
    return any(name in site.consumers for site in target.sites if site.name in recipe.folded)


def _fold_bytes(transform: Transform, producers: int) -> int:
    """Of the rows that adaLN-single is given at the input of a block (`folds.RowFold`), for each producer."""
    if not producers:
        return 0
    if transform.shift is None:
        assert transform.scale_C is not None, "a folded site has a shift or a scale"
        return producers * 3 * transform.scale_C.numel() * FLOAT_BYTES
    groups, width = transform.shift.rows.shape
    return producers * ((2 + groups) * width * FLOAT_BYTES + _index_bytes(transform.shift.group_of_step))


def _bias_bytes(target: Target, name: str, transforms: dict[str, Transform], recipe: ModelRecipe) -> int:
    width = len(target.module(name).weight)
    steps_matter = any(t.shift is not None and t.shift.group_of_step is not None for t in transforms.values())
    if not steps_matter:
        folded_into = any(s.rows_of(name) for s in target.sites if s.name in recipe.folded)
        own_shift = transforms.get(name, Transform()).shift is not None
        return width * FLOAT_BYTES if target.module(name).bias is not None or own_shift or folded_into else 0
    bias = effective_linear(target, name, transforms, recipe.folded).bias
    return 0 if bias is None else len(bias.rows) * width * FLOAT_BYTES + _index_bytes(bias.group_of_step)


def _index_bytes(group_of_step: Tensor | None) -> int:
    return 0 if group_of_step is None else group_of_step.numel() * INDEX_BYTES


def _transform_bytes(transform: Transform) -> int:
    """As stored: float tensors in 32 bits, signs as bytes, permutations as 16-bit indices."""
    total = 0
    for tensor in transform.state_dict().values():
        per_item = 4 if tensor.is_floating_point() else 1 if tensor.dtype == torch.int8 else INDEX_BYTES
        total += tensor.numel() * per_item
    return total


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def act_bits(act: ActQuant | None, channels: int) -> float:
    """The mean over so many input channels, of which a quantizer may leave some in float; scales of blocks with it, as of weights
    and attention operands."""
    rounded = 0.0 if act is None else act.rounded_share(channels)
    return (1 - rounded) * FLOAT_BITS + (rounded * act.spec.stored_bits if act else 0)


def rounded_share(layer: LayerRecipe, side: str, channels: int) -> float:
    """Of so many input channels, how many are multiplied by codes of this side."""
    if side == "act":
        return 0.0 if layer.act is None else layer.act.rounded_share(channels)
    return 1 - _taken_by_branch(layer) / channels


def _taken_by_branch(layer: LayerRecipe) -> int:
    """Input channels that the branch picks one by one, and of whose weights no code keeps anything (DiRotQ's leading axes)."""
    if layer.low_rank is None or layer.weight is None:
        return 0
    picked_rC = layer.low_rank.down_rC != 0
    if not bool((picked_rC.sum(1) == 1).all()):
        return 0
    return int((layer.weight.dequantize()[:, picked_rC.any(0)] == 0).all(0).sum())


def _act_bits(shares: list[tuple[LayerRecipe, float]], channels: int) -> float:
    """The mean over the steps."""
    return sum(part * act_bits(layer.act, channels) for layer, part in shares)
