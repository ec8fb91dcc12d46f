"""What a method returns: per layer, one declarative recipe of transform, low-rank branch, weight codes, activation quantizer.

Recipes lie on the CPU, whole; `build` moves one layer at a time to the model's device.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.quant.quantizers import ActQuant, LookupWeight, QuantizedWeight
from ditbench.harness.quant.sage import SageRecipe
from ditbench.harness.quant.spec import FLOAT_BITS
from ditbench.harness.quant.steps import step_ranges
from ditbench.harness.quant.transforms import Transform


@dataclass(frozen=True)
class LowRank:
    """A branch in high precision beside the quantized weight: y += (x' · downᵀ) · upᵀ."""

    down_rC: Tensor
    up_Or: Tensor


@dataclass(frozen=True)
class LayerRecipe:
    """One layer. Anything missing stays in float; the default leaves the layer as it is.

    transform: of the input. When the layer's site is in `ModelRecipe.folded`, its shift and scale live in the
        producer's rows and only the rotations run online.
    weight: codes of the *transformed* weight (minus the low-rank part, if any).
    """

    transform: Transform = field(default_factory=Transform)
    weight: QuantizedWeight | LookupWeight | None = None
    act: ActQuant | None = None
    low_rank: LowRank | None = None

    def without_rounding(self) -> LayerRecipe:
        return replace(self, weight=None, act=None, low_rank=None)


@dataclass(frozen=True)
class AttentionRecipe:
    """Quantizers of the operands of one attention module; q is quantized after its scaling by 1/√d."""

    query: ActQuant | None = None
    key: ActQuant | None = None
    value: ActQuant | None = None
    probabilities: ActQuant | None = None

    @property
    def operand_bits(self) -> tuple[float, float, float, float]:
        """Of q, k, the map and v."""
        q, k, p, v = (
            FLOAT_BITS if quant is None else quant.spec.stored_bits
            for quant in (self.query, self.key, self.probabilities, self.value)
        )
        return q, k, p, v


@dataclass(frozen=True)
class ModelRecipe:
    """layers and attention by module name (quantizers that a method found, or a form of the protocol's); folded: names of the sites whose shift and scale are folded.

    num_steps: the number of denoising steps that step-dependent tables were made for; None if there are none.
    variants: of a layer that changes with the range of steps, its recipe in each range (one object where it is the same in
        several); `layers` has the first. What is folded and `attention` hold for all steps.
    starts: the first step of each range; (0,) is one range, of all steps.
    """

    layers: dict[str, LayerRecipe]
    folded: frozenset[str] = frozenset()
    attention: dict[str, AttentionRecipe | SageRecipe] = field(default_factory=dict)
    num_steps: int | None = None
    variants: dict[str, tuple[LayerRecipe, ...]] = field(default_factory=dict)
    starts: tuple[int, ...] = (0,)

    def of_range(self, index: int) -> ModelRecipe:
        """The recipe that holds in one range of steps, as one of all steps."""
        own = {name: variants[index] for name, variants in self.variants.items()}
        return replace(self, layers=self.layers | own, variants={}, starts=(0,))

    def attention_quantizers(self) -> list[ActQuant]:
        """All that a method found for the operands of attention."""
        found = [vars(each).values() for each in self.attention.values() if isinstance(each, AttentionRecipe)]
        return [quant for quants in found for quant in quants if quant is not None]

    def distinct(self, name: str) -> tuple[list[int], list[int]]:
        """(the range in which each recipe of a layer is met first, which of these recipes each range has)."""
        variants = self.variants[name]
        first = [index for index, each in enumerate(variants) if all(each is not other for other in variants[:index])]
        return first, [next(at for at, index in enumerate(first) if variants[index] is each) for each in variants]

    def shares(self, name: str) -> list[tuple[LayerRecipe, float]]:
        """The recipes of a layer, each with its share of the steps."""
        if name not in self.variants:
            return [(self.layers.get(name, LayerRecipe()), 1.0)]
        assert self.num_steps is not None, "ranges are ranges of some number of steps"
        steps = step_ranges(self.starts, self.num_steps)
        return [(each, len(of) / self.num_steps) for each, of in zip(self.variants[name], steps, strict=True)]

    def without_rounding(self) -> ModelRecipe:
        """Only the transforms: a model that computes what the float model computes."""
        first = self.of_range(0)  # the ranges differ in what is rounded, and in online transforms that cancel
        return replace(first, layers={n: r.without_rounding() for n, r in first.layers.items()}, attention={})


def clipped(recipe: ModelRecipe, clip: float) -> ModelRecipe:
    """With the ranges of dynamic activations times `clip`; static ones are what the calibration found."""

    def with_clip(layer: LayerRecipe) -> LayerRecipe:
        if layer.act is None or not layer.act.spec.dynamic:
            return layer
        return replace(layer, act=replace(layer.act, clip=clip))

    return replace(recipe, layers={name: with_clip(layer) for name, layer in recipe.layers.items()})


def to_device(value: Any, device: torch.device | str) -> Any:
    """Any part of a recipe (or a tuple of such) with its tensors on the device: itself if they are there, else a copy."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return value if all(t.to(device) is t for t in tensors) else copy.deepcopy(value).to(device)
    if isinstance(value, tuple):
        return tuple(to_device(each, device) for each in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    parts = {each.name: getattr(value, each.name) for each in fields(value)}
    moved = {name: to_device(part, device) for name, part in parts.items()}
    return value if all(moved[name] is part for name, part in parts.items()) else replace(value, **moved)
