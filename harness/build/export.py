"""A quantized transformer as a folder, and back: `quantized.safetensors` and `recipe.json`, nothing pickled.

The folder holds the whole transformer: packed codes with all that belongs to them (scales, zero points, online transforms,
low-rank branches, tables over the denoising steps, look-up levels), the rewritten producers of folded transforms, and
everything that stays in float, in the dtype it ran in. Nothing in it is a backend's own layout, so any backend can run it.
The float weights and the calibration are not needed again: the model that it is loaded into lends its code and its
configuration only. recipe.json carries the SHA-256 of itself and of the tensors' file, and the timesteps that tables by denoising
step were made for (`build.step_finder`).

    tensors "layers/<layer>/…" or, where it changes with the range of denoising steps, "layers/<layer>/<range>/…", "folds/<block>/…", "attention/<module>/…": see `quant.serialize`
    tensors "float/<parameter>": the transformer's parameters and buffers that no recipe touches
"""

from __future__ import annotations

import copy
import json
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import ditbench
from ditbench.harness.backends.base import AUTO
from ditbench.harness.backends.few_rows import steady
from ditbench.harness.build.attention import quantize_attention
from ditbench.harness.build.build import cast, clock_of, copy_without, dtype_of, set_submodule
from ditbench.harness.build.export_checks import (
    ABOUT,
    OF_VERSION_2,
    check_attention,
    check_finite,
    check_folds,
    check_layer,
    check_place,
    check_recipe,
    expect,
    find,
)
from ditbench.harness.build.fusion import fuse
from ditbench.harness.build.layer import EffectiveLinear, QuantLinear, QuantPatchEmbed, RangedLinear
from ditbench.harness.build.modulation import hang
from ditbench.harness.build.shared_inputs import share_inputs
from ditbench.harness.build.step_finder import Schedule, StepCounter, StepFinder
from ditbench.harness.common.artifacts import write_manifest
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path, canonical_sha256, file_sha256
from ditbench.harness.common.tensor_files import save_tensors
from ditbench.harness.quant.effective import effective_linear, touched_layers
from ditbench.harness.quant.experts import experts_in
from ditbench.harness.quant.folds import block_folds, block_of
from ditbench.harness.quant.layer_names import aliases, carries_adapters, fused_layers
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.serialize import content_sha256, decode, encode
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.quant.target import Target

FORMAT, VERSION = "ditbench quantized transformer", 2
VERSIONS = (1, 2)  # that can be read; 1 has no hash of recipe.json and no schedule
RECIPE, TENSORS = "recipe.json", "quantized.safetensors"


def save_quantized(
    folder: Path,
    target: Target,
    recipe: ModelRecipe,
    *,
    dtype: torch.dtype,
    about: dict[str, Any],
    schedule: Schedule | None = None,
) -> dict[str, Any]:
    """Write the folder, which appears whole or not at all → what is in its recipe.json.

    dtype: of what is not quantized. about: what recipe.json says beside (method, params, bits, model, …; see
    `export_checks.ABOUT`). schedule: of the steps that the recipe's tables were made for; without it, whoever samples sets the
    loaded model's clock.

    Raises:
        UserError: the folder exists, or the recipe has a part that files cannot make.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; an export overwrites nothing, choose another --out")
    assert set(about) <= {*ABOUT, *OF_VERSION_2}, f"recipe.json has no place for {set(about) - {*ABOUT, *OF_VERSION_2}}"
    tensors: dict[str, Tensor] = {}
    transforms = {name: layer.transform for name, layer in recipe.layers.items()}
    touched = touched_layers(target, recipe)
    described = {
        "format": FORMAT,
        "version": VERSION,
        "ditbench": ditbench.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "transformer": architecture(target.transformer),
        "fused_projections": bool(fused_layers(target.transformer)),
        "num_steps": recipe.num_steps,
        "starts": list(recipe.starts),
        "schedule": None if schedule is None or recipe.num_steps is None else asdict(schedule),
        **about,
        "folded": sorted(recipe.folded),
        "layers": {name: _encode_layer(target, recipe, name, dtype, tensors) for name in touched},
        "folds": {
            name: encode(folds, f"folds/{name}", tensors)
            for name, folds in block_folds(target, recipe, transforms, dtype).items()
        },
        "attention": {name: encode(each, f"attention/{name}", tensors) for name, each in recipe.attention.items()},
    }
    elsewhere = {*touched, *fused_layers(target.transformer)}
    elsewhere |= {other for other, name in aliases(target.transformer).items() if name in elsewhere}
    for key, tensor in target.transformer.state_dict().items():
        if key.rpartition(".")[0] not in elsewhere:
            kept = tensor.to(dtype_of(target.transformer, key, dtype)) if tensor.is_floating_point() else tensor
            tensors[f"float/{key}"] = kept.cpu().clone(memory_format=torch.contiguous_format)
    with atomic_path(folder) as part:
        part.mkdir()
        save_tensors(tensors, part / TENSORS)
        described["tensors"] = {
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "file_bytes": (part / TENSORS).stat().st_size,
            "sha256": file_sha256(part / TENSORS),
        }
        write_manifest(part / RECIPE, json.loads(json.dumps(described)))  # as it will be read: its hash is of that
    return described


def load_quantized(folder: str | Path, pipeline: Any, *, backend: str = AUTO, nearest: bool = False) -> nn.Module:
    """The quantized transformer of an export, on the device of the one that it stands for.

    pipeline: a diffusers pipeline, which gets it as its transformer (of two experts, in the place of both); or the transformer alone, which is left as it is. Put it on
        its device before, not after. Whatever pipeline calls the result, tables by denoising step are read at the step that
        was fitted at the call's timestep; a call at another timestep is a ValueError.
    nearest: such a call takes the nearest step, so that other schedulers, numbers of steps and sizes can be tried.

    Raises:
        UserError: no export, damaged, of another version, or of another model.
    """
    folder = Path(folder)
    described = read_recipe(folder)
    alone = isinstance(pipeline, nn.Module)
    experts = None if alone else experts_in(pipeline)
    transformer = pipeline if alone else experts or pipeline.transformer
    _check_architecture(folder, described, transformer)
    tensors = _read_tensors(folder, described)
    with _explained(folder):
        if schedule := described.get("schedule"):
            expect(
                schedule["argument"] in signature(transformer.forward).parameters,
                "schedule/argument",
                "an argument of the transformer",
                schedule["argument"],
            )
        check_finite(tensors)
        model = _assembled(transformer, described, tensors, backend)
    clock = clock_of(model)
    if schedule:
        found = Schedule(schedule["argument"], tuple(schedule["timesteps"]))
        StepFinder(found, clock, nearest=nearest).attach(model)
    if not alone:
        pipeline.transformer = model
        if experts is not None:  # which of them a timestep is for, the model knows
            pipeline.transformer_2 = model
        if clock.num_steps is not None and not schedule:
            StepCounter(pipeline, clock).attach(model)
    return model


def read_recipe(folder: Path) -> dict[str, Any]:
    """What recipe.json says, but for its own hash.

    Raises:
        UserError: there is none, it is damaged, or it is of another version.
    """
    path = folder / RECIPE
    try:
        described = json.loads(path.read_bytes(), parse_constant=_no_number)
        is_ours = isinstance(described, dict) and described.get("format") == FORMAT
        if is_ours and described.get("version") == VERSION:
            is_whole = described.pop("sha256", None) == canonical_sha256(described)
    except OSError as error:
        raise UserError(f"{folder} is no export: {RECIPE} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({_first_line(error)}); export again") from error
    if not is_ours:
        raise UserError(f"{path}: not a ditbench export")
    if described.get("version") not in VERSIONS or isinstance(described["version"], bool):
        raise UserError(
            f"{path}: format version {str(described.get('version'))[:40]}, this ditbench reads "
            f"{' and '.join(map(str, VERSIONS))}; export again, or use the ditbench that wrote it"
        )
    if described["version"] == VERSION and not is_whole:
        raise UserError(
            f"{path}: damaged or edited, it does not have the SHA-256 that it was written with; copy it again, or export again"
        )
    try:
        check_recipe(str(path), described)
    except ValueError as error:
        raise UserError(f"{error}; export again") from error
    return described


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while a model is put together from files is said in one line."""
    try:
        yield
    except (
        UserError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as error:
        said = str(error) if type(error) in (UserError, ValueError) else f"{type(error).__name__}: {error}"
        line = said.strip().split("\n")[0][:300]
        raise UserError(f"{folder}: {RECIPE} does not fit its tensors ({line}); export again") from error


def architecture(transformer: nn.Module) -> dict[str, Any]:
    """Class and configuration of a diffusers model, as JSON has them; private keys (where it came from) left out."""
    config = {key: value for key, value in getattr(transformer, "config", {}).items() if not key.startswith("_")}
    return {"class": type(transformer).__name__, "config": json.loads(json.dumps(config, default=str, sort_keys=True))}


def _encode_layer(
    target: Target, recipe: ModelRecipe, name: str, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """One rebuilt layer. If it changes with the range of steps: {"variants": […], "of_range": [the variant of each range]};
    parts that are equal in several variants are one tensor.
    """
    if name not in recipe.variants:
        return _encode_variant(
            target, recipe, name, dtype, f"layers/{name}", lambda v, where: encode(v, where, tensors)
        )
    known: dict[str, Any] = {}

    def once(value: Any, where: str) -> Any:
        content = content_sha256(value)
        if content not in known:
            known[content] = encode(value, where, tensors)
        return known[content]

    first_ranges, of_range = recipe.distinct(name)
    variants = [
        _encode_variant(target, recipe.of_range(index), name, dtype, f"layers/{name}/{index}", once)
        for index in first_ranges
    ]
    return {"variants": variants, "of_range": of_range}


def _encode_variant(
    target: Target,
    recipe: ModelRecipe,
    name: str,
    dtype: torch.dtype,
    where: str,
    encoded: Callable[[Any, str], Any],
) -> dict[str, Any]:
    """In the precision that `QuantLinear` keeps its parts in."""
    layer = recipe.layers.get(name, LayerRecipe())
    transforms = {n: each.transform for n, each in recipe.layers.items()}
    effective = effective_linear(target, name, transforms, recipe.folded)
    folded = any(name in site.consumers for site in target.sites if site.name in recipe.folded)
    online = copy.deepcopy(layer.transform.rotations_only() if folded else layer.transform)
    low_rank = layer.low_rank and type(layer.low_rank)(layer.low_rank.down_rC.to(dtype), layer.low_rank.up_Or.to(dtype))
    stored = LayerRecipe(online.to(torch.promote_types(dtype, torch.float32)), layer.weight, layer.act, low_rank)
    weight_OC = None if layer.weight is not None else effective.weight_OC.to(dtype)
    bias = effective.bias and effective.bias.map(lambda rows_GO: rows_GO.to(dtype))
    return {
        "shape": list(effective.weight_OC.shape),
        "weight_OC": encoded(weight_OC, f"{where}/weight_OC"),
        "bias": encoded(bias, f"{where}/bias"),
        "recipe": {"type": LayerRecipe.__name__}
        | {part: encoded(value, f"{where}/recipe/{part}") for part, value in vars(stored).items()},
    }


def _assembled(
    transformer: nn.Module, described: dict[str, Any], tensors: dict[str, Tensor], backend: str
) -> nn.Module:
    device, dtype = next(transformer.parameters()).device, getattr(torch, described["dtype"])
    clock = StepClock(described["num_steps"], tuple(described.get("starts", (0,)))).to(device)
    for name, parts in described["layers"].items():
        for each in parts.get("variants", [parts]):
            check_place(f"layers/{name}", each, transformer, name)
    model = copy_without(transformer, list(described["layers"]))
    cast(model, dtype, device)
    _fill(model, {key.removeprefix("float/"): t for key, t in tensors.items() if key.startswith("float/")})
    for name, parts in described["layers"].items():
        variants = [
            _decode_variant(f"layers/{name}", each, tensors, clock=clock, dtype=dtype, device=device, backend=backend)
            for each in parts.get("variants", [parts])
        ]
        linear = RangedLinear(variants, parts["of_range"]) if "variants" in parts else variants[0]
        original = transformer.get_submodule(name)
        set_submodule(model, name, QuantPatchEmbed(original, linear) if isinstance(original, nn.Conv2d) else linear)
    steady(model)
    share_inputs(model)
    fuse(model, device, dtype)
    folds = {name: decode(each, tensors, f"folds/{name}") for name, each in described["folds"].items()}
    for name, of_block in folds.items():
        check_folds(f"folds/{name}", of_block, find(f"folds/{name}", transformer, block_of(name)), clock.num_steps)
    hang(model, folds, clock, device)
    for name, each in described["attention"].items():
        attention = decode(each, tensors, f"attention/{name}")
        check_attention(f"attention/{name}", attention, clock.num_steps)
        find(f"attention/{name}", transformer, name)
        quantize_attention(model, name, attention, clock, device)
    model.clock = clock  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise RuntimeError for names or shapes that do not fit; what has been fused into another layer is not stored."""
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    fused = fused_layers(model)
    missing = [key for key in missing if key.rpartition(".")[0] not in fused]
    if missing or unexpected:
        raise RuntimeError(
            f"{len(missing)} tensors missing and {len(unexpected)} too many, {(*missing, *unexpected)[0]}"
        )


def _decode_variant(
    where: str,
    parts: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    clock: StepClock,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> QuantLinear:
    stored = {part: decode(value, tensors, f"{where}/{part}") for part, value in parts.items()}
    check_layer(where, stored, clock.num_steps)
    recipe = stored["recipe"]
    return QuantLinear(
        recipe,
        # Of a quantized weight there is nothing but its codes; a kernel that asked for more would fail here.
        EffectiveLinear(
            torch.empty(stored["shape"], device="meta") if recipe.weight else stored["weight_OC"], stored["bias"]
        ),
        folded=False,  # what is folded is in the producers' rows; the stored transform is what is left
        clock=clock,
        dtype=dtype,
        device=device,
        backend=backend if recipe.weight else AUTO,
    ).to(device)


def _check_architecture(folder: Path, described: dict[str, Any], transformer: nn.Module) -> None:
    wanted, found = described["transformer"], architecture(transformer)
    if wanted["class"] != found["class"]:
        raise UserError(f"{folder} is an export of a {wanted['class']}, this pipeline has a {found['class']}")
    if hasattr(transformer, "clock"):
        raise UserError(f"{folder}: this pipeline's transformer is quantized already; load the float pipeline again")
    if carries_adapters(transformer):
        raise UserError(f"{folder}: this pipeline carries LoRA adapters, which an export replaces; unload them first")
    if described.get("fused_projections", False) != bool(fused_layers(transformer)):
        call = "unfuse_qkv_projections" if fused_layers(transformer) else "fuse_qkv_projections"
        raise UserError(f"{folder}: its projections are not fused as this pipeline's; call transformer.{call}() first")
    for key, ours in wanted["config"].items():  # a newer diffusers may have more
        theirs = found["config"].get(key)
        if ours != theirs:
            raise UserError(
                f"{folder} is an export of another {wanted['class']}: {key} is {reprlib.repr(ours)} there and "
                f"{reprlib.repr(theirs)} here"
            )


def _read_tensors(folder: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    path, expected = folder / TENSORS, described["tensors"]
    try:
        size = path.stat().st_size
        if size != expected["file_bytes"]:
            raise UserError(f"{path}: {size} bytes, expected {expected['file_bytes']}; truncated? copy it again")
        if file_sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: corrupt, its SHA-256 is not the one in {RECIPE}; copy it again")
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); export again") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]
