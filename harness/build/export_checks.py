"""What an export may say: the fields of recipe.json before anything is built, and every layer against the model it is put into.

All raise ValueError in one line: where, what was expected, what came. A flipped bit is found by its hash; these find what was
written wrong, and what belongs to another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.quant.folds import BlockFolds
from ditbench.harness.quant.quantizers import ActQuant, LookupWeight, QuantizedWeight
from ditbench.harness.quant.recipe import AttentionRecipe, LayerRecipe
from ditbench.harness.quant.rotations import BlockRotation
from ditbench.harness.quant.sage import SageRecipe
from ditbench.harness.quant.serialize import check_types
from ditbench.harness.quant.spec import E4M3, FLOAT8, INT, SCALES, QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import is_linear_map, weight_matrix
from ditbench.harness.quant.tlq import TwinLogLevels
from ditbench.harness.quant.transforms import Hadamard, Transform
from ditbench.harness.quant.uneven import DualScaleQuant, LogSqrt2Quant

DTYPES = ("float64", "float32", "bfloat16", "float16")
FIELDS = {
    "format": str, "version": int, "dtype": str, "transformer": dict, "num_steps": int | None, "tensors": dict,
    "layers": dict[str, dict], "folds": dict[str, dict], "attention": dict[str, dict],
}  # fmt: skip
ABOUT = {
    "run_id": str | None, "method": str, "params": dict, "bits": dict, "size": dict, "model": dict, "weights_sha256": str,
    "notes": list[str],
}  # fmt: skip
LATER = {"ditbench": str, "fused_projections": bool, "starts": list[int], "folded": list[str]} | ABOUT
OF_VERSION_2 = {"schedule": dict | None, "sampler": dict}
LAYER = {"shape": list[int], "weight_OC": dict | None, "bias": dict | None, "recipe": dict}


MOST_ROWS = 12  # of what blocks without a table of their own are told: shift, scale, gate, four times


def check_recipe(where: str, described: Mapping[str, Any]) -> None:
    """Fields, their types, and what of them can be told without the tensors."""
    check_types(where, described, FIELDS, LATER | (OF_VERSION_2 if described["version"] > 1 else {}))
    check_types(f"{where}/transformer", described["transformer"], {"class": str, "config": dict})
    check_types(f"{where}/tensors", described["tensors"], {"bytes": int, "file_bytes": int, "sha256": str})
    expect(described["dtype"] in DTYPES, f"{where}/dtype", f"one of {', '.join(DTYPES)}", described["dtype"])
    steps, starts = described["num_steps"], described.get("starts", [0])
    expect(steps is None or steps >= 1, f"{where}/num_steps", "at least 1, or null", steps)
    rising = starts[:1] == [0] and all(a < b for a, b in zip(starts, [*starts[1:], steps or 1], strict=True))
    expect(rising, f"{where}/starts", f"the first step of each range: from 0, rising, below {steps or 1}", starts)
    if (schedule := described.get("schedule")) is not None:
        check_types(f"{where}/schedule", schedule, {"argument": str, "timesteps": list[float]})
        length = len(schedule["timesteps"])
        expect(length == steps, f"{where}/schedule/timesteps", f"one for each of {steps} steps", length)
    for name, parts in described["layers"].items():
        _check_parts(f"{where}/layers/{name}", parts, len(starts))


def _check_parts(where: str, parts: Mapping[str, Any], ranges: int) -> None:
    if "variants" not in parts:
        check_types(where, parts, LAYER)
        return
    check_types(where, parts, {"variants": list[dict], "of_range": list[int]})
    for index, each in enumerate(parts["variants"]):
        check_types(f"{where}/variants/{index}", each, LAYER)
    known, of_range = len(parts["variants"]), parts["of_range"]
    fits = len(of_range) == ranges and all(0 <= index < known for index in of_range)
    expect(fits, f"{where}/of_range", f"one of {known} variants for each of {ranges} ranges", of_range)


def check_place(where: str, parts: Mapping[str, Any], transformer: nn.Module, name: str) -> None:
    """One variant of a layer, as it is written, against the layer that it replaces."""
    module = find(where, transformer, name)
    expect(is_linear_map(module), where, "the name of a linear layer", type(module).__name__)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    shape = list(weight_matrix(module).shape)
    expect(parts["shape"] == shape, f"{where}/shape", f"the model's {shape}", parts["shape"])
    transform = parts["recipe"].get("transform")
    rotations = transform.get("rotations") if isinstance(transform, dict) else None
    for each in rotations if isinstance(rotations, list) else []:  # before they are made: a size may ask for any memory
        size = each.get("size", shape[1]) if isinstance(each, dict) else None
        expect(size == shape[1], f"{where}/recipe/transform/rotations", f"rotations of {shape[1]} channels", size)


def find(where: str, transformer: nn.Module, name: str) -> nn.Module:
    try:
        return transformer.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{where}: the model has no module {name[:80]!r}") from None


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Of all that the export made itself; what stays in float is the model's own."""
    for name, tensor in tensors.items():
        if not name.startswith("float/") and tensor.is_floating_point():
            values = tensor.float() if tensor.element_size() == 1 else tensor
            expect(bool(values.isfinite().all()), name, "finite numbers", "NaN or infinity")


def check_layer(where: str, variant: Mapping[str, Any], num_steps: int | None) -> None:
    """A decoded variant: its recipe against its own shape."""
    (rows, width), layer, weight_OC, bias = (variant[part] for part in ("shape", "recipe", "weight_OC", "bias"))
    expect(isinstance(layer, LayerRecipe), f"{where}/recipe", "a LayerRecipe", type(layer).__name__)
    if layer.weight is None:
        check_shape(f"{where}/weight_OC", weight_OC, (rows, width))
    else:
        expect(weight_OC is None, f"{where}/weight_OC", "null beside a quantized weight", "a tensor")
        check_weight(f"{where}/recipe/weight", layer.weight, rows, width)
    if bias is not None:
        expect(isinstance(bias, StepTable), f"{where}/bias", "a StepTable", type(bias).__name__)
        check_table(f"{where}/bias", bias, (rows,), num_steps)
    check_transform(f"{where}/recipe/transform", layer.transform, width, num_steps)
    if layer.act is not None:
        check_act(f"{where}/recipe/act", layer.act, width, num_steps)
    if layer.low_rank is not None:
        down_rC, up_Or = layer.low_rank.down_rC, layer.low_rank.up_Or
        check_shape(f"{where}/recipe/low_rank/down_rC", down_rC, (None, width))
        check_shape(f"{where}/recipe/low_rank/up_Or", up_Or, (rows, len(down_rC)))


def check_weight(where: str, weight: QuantizedWeight | LookupWeight, rows: int, width: int) -> None:
    spec = weight.spec
    expect(not spec.dynamic, f"{where}/spec/dynamic", "false: weights are known", True)
    check_shape(f"{where}/codes_OC", weight.codes_OC, (rows, width))
    if isinstance(weight, LookupWeight):
        _check_lookup(where, weight, rows)
        return
    of_dtype = weight.codes_OC.dtype == spec.code_dtype
    expect(of_dtype, f"{where}/codes_OC", f"codes of {spec.bits} bits in {spec.code_dtype}", weight.codes_OC.dtype)
    if spec.number not in FLOAT8:
        _check_codes(
            where, weight.codes_OC, spec.least_code, int(spec.quant_max) if spec.number == INT else 2**spec.bits - 1
        )
    scales = -(-rows // spec.block_rows), -(-width // _group(where, spec, width))
    check_shape(f"{where}/scale_OG", weight.scale_OG, scales)
    kept = weight.scale_OG.dtype
    expect(kept == SCALES[spec.scale], f"{where}/scale_OG", f"scales in {spec.scale}", kept)
    expect(bool((weight.scale_OG.float() >= 0).all()), f"{where}/scale_OG", "scales of at least 0", "less")
    if spec.symmetric:
        expect(weight.zero_point_OG is None, f"{where}/zero_point_OG", "null of a symmetric weight", "a tensor")
    else:
        check_shape(f"{where}/zero_point_OG", weight.zero_point_OG, scales)
    if spec.scale == E4M3:
        check_shape(f"{where}/tensor_scale", weight.tensor_scale, ())
        assert weight.tensor_scale is not None
        expect(bool(weight.tensor_scale > 0), f"{where}/tensor_scale", "a scale above 0", float(weight.tensor_scale))
    else:
        expect(weight.tensor_scale is None, f"{where}/tensor_scale", f"null of scales in {spec.scale}", "a tensor")


def _check_lookup(where: str, weight: LookupWeight, rows: int) -> None:
    levels, known = weight.levels, weight.num_levels
    expect(2 <= known <= 256, f"{where}/num_levels", "2 to 256", known)
    expect(weight.codes_OC.dtype == torch.uint8, f"{where}/codes_OC", "uint8", weight.codes_OC.dtype)
    _check_codes(where, weight.codes_OC, 0, known - 1)
    if isinstance(levels, TwinLogLevels):
        bits = weight.spec.bits
        expect(levels.bits == bits and known == 2**bits, f"{where}/levels", f"2^{bits} levels", f"2^{levels.bits}")
        for part, shape in {"low_O2": (rows, 2), "step_O2": (rows, 2), "unit_O1": (rows, 1)}.items():
            check_shape(f"{where}/levels/{part}", getattr(levels, part), shape)
    else:
        check_shape(f"{where}/levels/table_OL", getattr(levels, "table_OL", None), (rows, known))


def _check_codes(where: str, codes_OC: Tensor, low: int, high: int) -> None:
    ends = (int(codes_OC.min()), int(codes_OC.max())) if codes_OC.numel() else (low, high)
    expect(low <= ends[0] and ends[1] <= high, f"{where}/codes_OC", f"codes in {low} … {high}", ends)


def check_transform(where: str, transform: Transform, width: int, num_steps: int | None) -> None:
    if transform.shift is not None:
        check_table(f"{where}/shift", transform.shift, (width,), num_steps)
    if transform.scale_C is not None:
        check_shape(f"{where}/scale_C", transform.scale_C, (width,))
    for index, rotation in enumerate(transform.rotations):
        of = f"{where}/rotations/{index}"
        expect(bool(rotation.size == width), of, f"{width} channels", rotation.size)
        if isinstance(rotation, Hadamard) and rotation.signs_C is not None:
            check_shape(f"{of}/signs_C", rotation.signs_C, (width,))
            expect(bool((rotation.signs_C.abs() == 1).all()), f"{of}/signs_C", "±1 for each channel", "others")
        if isinstance(rotation, BlockRotation):
            check_shape(f"{of}/matrix_gg", rotation.matrix_gg, (rotation.matrix_gg.shape[-1],) * 2)


def check_act(where: str, act: ActQuant, width: int | None, num_steps: int | None) -> None:
    """width: of what it quantizes, where that is known."""
    spec, tables = act.spec, {"scale": act.scale, "zero_point": act.zero_point}
    if isinstance(act, DualScaleQuant):
        tables["negative_scale"] = act.negative_scale
    if width is not None:
        _group(where, spec, width)
    if spec.dynamic:
        for part, table in tables.items():
            expect(table is None, f"{where}/{part}", "null of a dynamic quantizer", "a table")
        return
    for part, table in tables.items():
        wanted = part != "zero_point" or not (spec.symmetric or isinstance(act, LogSqrt2Quant))
        expect((table is not None) == wanted, f"{where}/{part}", "a table" if wanted else "null", table and "a table")
        if table is not None:
            check_table(f"{where}/{part}", table, (), num_steps)
    assert act.scale is not None
    expect(bool((act.scale.rows >= 0).all()), f"{where}/scale", "scales of at least 0", "less")


def check_attention(where: str, attention: Any, num_steps: int | None) -> None:
    if isinstance(attention, SageRecipe):  # which checks itself, and has no tensors
        return
    expect(isinstance(attention, AttentionRecipe), where, "an AttentionRecipe", type(attention).__name__)
    for part, act in vars(attention).items():
        if act is not None:
            check_act(f"{where}/{part}", act, None, num_steps)


def check_folds(where: str, folds: Any, block: nn.Module, num_steps: int | None) -> None:
    """Against the tables that the block adds to what it is told: they have the rows that are rewritten. A block without a table has
    layers that read as many channels.
    """
    expect(isinstance(folds, BlockFolds), where, "BlockFolds", type(folds).__name__)
    width = folds.width
    tables = [p.numel() // width for p in block.parameters(recurse=False) if width > 0 and p.shape[-1:] == (width,)]
    if not tables and any(isinstance(each, nn.Linear) and each.in_features == width for each in block.modules()):
        tables = [MOST_ROWS]
    expect(bool(tables), f"{where}/width", "the width of a table of the block", width)
    for index, fold in enumerate(folds.rows):
        of = f"{where}/rows/{index}"
        for row in (fold.shift_row, fold.scale_row):
            expect(0 <= row < max(tables), of, f"rows 0 … {max(tables) - 1} of the block's table", row)
        check_shape(f"{of}/inverse_C", fold.inverse_C, (width,))
        check_shape(f"{of}/scale_add_C", fold.scale_add_C, (width,))
        check_table(f"{of}/shift_add", fold.shift_add, (width,), num_steps)


def check_table(where: str, table: StepTable, row: tuple[int, ...], num_steps: int | None) -> None:
    check_shape(f"{where}/rows", table.rows, (None, *row))
    groups = table.group_of_step
    if groups is None:
        return
    check_shape(f"{where}/group_of_step", groups, (num_steps,))
    expect(num_steps is not None, f"{where}/group_of_step", "null where num_steps is", "a tensor")
    inside = groups.dtype == torch.int64 and int(groups.min()) >= 0 and int(groups.max()) < len(table.rows)
    expect(inside, f"{where}/group_of_step", f"rows 0 … {len(table.rows) - 1}", f"{groups.dtype} up to {groups.max()}")


def check_shape(where: str, tensor: Tensor | None, shape: tuple[int | None, ...]) -> None:
    """None stands for any length."""
    found = None if tensor is None else tuple(tensor.shape)
    fits = (
        found is not None
        and len(found) == len(shape)
        and all(b in (None, a) for a, b in zip(found, shape, strict=True))
    )
    expect(fits, where, f"shape {shape}", found)


def expect(fits: bool, where: str, wanted: str, got: Any) -> None:
    """Raise ValueError unless it fits."""
    if not fits:
        raise ValueError(f"{where}: expected {wanted}, got {str(got)[:80]}")


def _group(where: str, spec: QuantSpec, width: int) -> int:
    """Channels that share a scale."""
    group = width if spec.group_size is None else spec.group_size
    fits = group >= 1 and (spec.in_blocks or width % group == 0)
    expect(fits, f"{where}/spec/group_size", f"a divisor of {width}", group)
    return group
