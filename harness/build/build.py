"""A recipe becomes a model: a copy of the float transformer with its layers rebuilt; the original is left alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.backends.base import AUTO
from ditbench.harness.backends.few_rows import steady
from ditbench.harness.build.attention import quantize_attention
from ditbench.harness.build.fusion import fuse
from ditbench.harness.build.layer import QuantLinear, QuantPatchEmbed, RangedLinear
from ditbench.harness.build.modulation import hang
from ditbench.harness.build.offload import OFFLOAD, RESIDENT, chosen, offload
from ditbench.harness.build.shared_inputs import share_inputs
from ditbench.harness.common.devices import CPU
from ditbench.harness.common.memory import trim
from ditbench.harness.quant.effective import effective_linear, touched_layers
from ditbench.harness.quant.folds import block_folds
from ditbench.harness.quant.layer_names import aliases
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe, to_device
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform


def build(
    target: Target,
    recipe: ModelRecipe,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    backend: str = AUTO,
    memory: str = RESIDENT,
) -> nn.Module:
    """The quantized copy of target.transformer; float parts in dtype, everything on device, where each layer is made too.

    The model carries `clock` (a StepClock): whoever samples sets the step before each call; and `memory`, what a record says of
    where its weights lie (`offload.chosen`).
    memory: resident, offload or auto; only of models that learn nothing.
    """
    device = torch.device(device)
    placement = chosen(memory, target, recipe, dtype, device, backend)
    lies_on = CPU if placement["memory"] == OFFLOAD else device
    target = target.on(device)
    clock = StepClock(recipe.num_steps, recipe.starts).to(device)
    model = copy_without(target.transformer, touched_layers(target, recipe))
    cast(model, dtype, lies_on)
    for name in touched_layers(target, recipe):
        layer = build_module(target, recipe, name, clock=clock, dtype=dtype, device=device, backend=backend)
        set_submodule(model, name, layer.to(lies_on))
        trim()
    steady(model)
    share_inputs(model)
    fuse(model, device, dtype)
    hang(model, block_folds(target, recipe, _transforms(recipe), dtype), clock, device)
    for name, attention in recipe.attention.items():
        quantize_attention(model, name, attention, clock, device)
    model.clock = clock  # type: ignore[assignment]
    _check_steps(model, recipe)
    if placement["memory"] == OFFLOAD:
        offload(model, target.blocks, device)
    model.memory = placement  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def cast(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Move and cast in place, as diffusers loads a model."""
    precise = {
        name: tensor.data.clone()
        for name, tensor in tensors_of(model).items()
        if tensor.is_floating_point() and dtype_of(model, name, dtype) != dtype
    }
    nn.Module.to(model, device=device, dtype=dtype)  # not diffusers' own .to, which warns about every cast
    moved = tensors_of(model)  # buffers are others now
    for name, tensor in precise.items():
        moved[name].data = tensor.to(device=device, dtype=torch.float32)


def dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a floating-point parameter or buffer has in a model cast to dtype: what its class keeps in float32 stays so in
    half precision.
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if dtype.itemsize < 4 and not set(kept).isdisjoint(name.split(".")) else dtype


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def build_module(target: Target, recipe: ModelRecipe, name: str, **settings: Any) -> nn.Module:
    """What `build` puts in the place of the layer of that name. settings: see `build_layer`."""
    original, linear = target.module(name), _linear(target.on(settings["device"]), recipe, name, **settings)
    return QuantPatchEmbed(original, linear) if isinstance(original, nn.Conv2d) else linear


def build_layer(
    target: Target,
    recipe: ModelRecipe,
    name: str,
    *,
    clock: StepClock,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = AUTO,
) -> QuantLinear:
    """One layer, of a recipe of one range, as `build` makes it. Layers whose weight stays in float take any backend that
    can run them.
    """
    target = target.on(device)
    folded = {consumer for site in target.sites if site.name in recipe.folded for consumer in site.consumers}
    layer = to_device(recipe.layers.get(name, LayerRecipe()), target.device)
    layer = replace(layer, act=copy.deepcopy(layer.act))  # tables move with the model, and the recipe stays where it is
    return QuantLinear(
        layer,
        effective_linear(target, name, _transforms(recipe), recipe.folded),
        folded=name in folded,
        clock=clock,
        dtype=dtype,
        device=device,
        backend=backend if layer.weight else AUTO,
    ).to(device)


def _linear(target: Target, recipe: ModelRecipe, name: str, **settings: Any) -> QuantLinear | RangedLinear:
    if name not in recipe.variants:
        return build_layer(target, recipe, name, **settings)
    first_ranges, of_range = recipe.distinct(name)
    variants = [build_layer(target, recipe.of_range(index), name, **settings) for index in first_ranges]
    return RangedLinear(variants, of_range)


def _transforms(recipe: ModelRecipe) -> dict[str, Transform]:
    return {name: layer.transform for name, layer in recipe.layers.items()}


def float_copy(
    target: Target, *, dtype: torch.dtype, device: torch.device | str = "cpu", memory: str = RESIDENT
) -> nn.Module:
    """The float transformer in another dtype, with a clock like a quantized one."""
    return build(target, ModelRecipe(layers={}), dtype=dtype, device=device, memory=memory)


def clock_of(model: nn.Module) -> StepClock:
    """The clock of a built model."""
    clock = model.clock
    assert isinstance(clock, StepClock)
    return clock


def quant_layers(model: nn.Module, index: int | None = None) -> dict[str, QuantLinear]:
    """The QuantLinears of a built model by the names of the layers they stand for.

    index: of the range of steps; without one it is the clock's.
    """
    found = {}
    ranged = [module for module in model.modules() if isinstance(module, RangedLinear)]
    variants = {variant for module in ranged for variant in module.variants}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | RangedLinear) and module not in variants:
            if isinstance(module, RangedLinear):
                module = module.of_range(module.clock.range if index is None else index)
            found[name.removesuffix(".linear") if _is_patch_part(model, name) else name] = module
    return found


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that is there, under every name that it has."""
    replaced = model.get_submodule(name)
    for each, found in list(model.named_modules(remove_duplicate=False)):
        if found is replaced:
            parent, _, child = each.rpartition(".")
            owner = model.get_submodule(parent)
            if child.isdigit():
                owner[int(child)] = module  # type: ignore[operator]
            else:
                setattr(owner, child, module)


def _check_steps(model: nn.Module, recipe: ModelRecipe) -> None:
    """Raise ValueError if a table was made for other steps than the clock will check: its rows would be mixed up."""
    tables = [module for module in model.modules() if isinstance(module, StepTable)]
    tables += [
        table
        for quant in recipe.attention_quantizers()
        for table in (quant.scale, quant.zero_point)
        if table is not None
    ]
    for steps in {table.num_steps for table in tables} - {None, recipe.num_steps}:
        raise ValueError(f"the recipe has tables for {steps} denoising steps and says num_steps={recipe.num_steps}")


def _is_patch_part(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), QuantPatchEmbed)


def copy_without(model: nn.Module, names: list[str]) -> nn.Module:
    """A deep copy with empty places where the named layers are: they are replaced right after. A layer with several names
    leaves one place, which has all of them.
    """
    places = {name: nn.Identity() for name in names}
    places |= {other: places[name] for other, name in aliases(model).items() if name in places}
    return copy.deepcopy(model, memo={id(model.get_submodule(name)): place for name, place in places.items()})
