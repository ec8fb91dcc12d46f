"""What every kernel that multiplies integers asks of a recipe, so that its sums are exact; not a backend itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.quant.quantizers import ActQuant, LookupWeight, QuantizedWeight, UnevenQuant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import INT, QuantSpec

LARGEST_WIDTH = 33_000  # C · 255² < 2³¹: sums of products of codes fit int32


def not_integers(name: str, recipe: LayerRecipe) -> str | None:
    """Why the two sides of this layer are not both codes × scale."""
    if recipe.weight is None or recipe.act is None:
        return f"{name} needs weights and activations quantized, one of them stays in float"
    if isinstance(recipe.weight, LookupWeight):
        return f"{name} multiplies integers; these weights are looked up in a table of uneven levels"
    if problem := uneven(name, recipe.act):
        return problem
    return not_even(name, recipe.weight.spec) or not_even(name, recipe.act.spec)


def uneven(name: str, act: ActQuant | None) -> str | None:
    """Why these activations are not codes × one scale."""
    if not isinstance(act, UnevenQuant):
        return None
    return f"{name} takes activations that are codes times one scale; these are of a {type(act).__name__}"


def not_even(name: str, spec: QuantSpec) -> str | None:
    """Why this side is not made of integers with float32 scales per tensor, channel, token or group."""
    if spec.number != INT:
        return f"{name} takes integers; these codes are {spec.number}"
    return f"{name} does not know scales in blocks, as {spec.name} has them" if spec.in_blocks else None


def not_w8a8(name: str, recipe: LayerRecipe) -> str | None:
    """Why this layer is not what int8 products of other libraries take: symmetric, a scale for each channel and for each token of the call."""
    if problem := not_integers(name, recipe):
        return problem
    weight, act = recipe.weight, recipe.act
    assert isinstance(weight, QuantizedWeight) and act is not None
    told = [(spec.bits, spec.granularity, spec.symmetric) for spec in (weight.spec, act.spec)]
    if told != [(8, "per_channel", True), (8, "per_token", True)] or act.scale is not None:
        return f"{name} takes W8A8, symmetric, weights per channel and activations per token; this is {weight.spec.told}, {act.spec.told}"
    return None


def stored_bits(bits: int) -> int:
    """Of a code on a CPU, where kernels read half bytes and bytes: codes of 2 and 3 bits take four, those of 5 to 7 take eight."""
    return 4 if bits <= 4 else 8


def weight_lacks(name: str, weight: QuantizedWeight) -> str | None:
    if problem := not_even(name, weight.spec):
        return problem
    if weight.codes_OC.shape[1] > LARGEST_WIDTH:
        return f"{name} sums in int32, which {weight.codes_OC.shape[1]} input channels could overflow"
    if not _whole(weight.zero_point_OG):
        return f"{name} takes zero points of weights that are whole numbers"
    return None


def act_lacks(name: str, act: ActQuant) -> str | None:
    if act.zero_point is not None and not _whole(act.zero_point.rows):
        return f"{name} takes zero points of activations that are whole numbers"
    return None


def _whole(zero_point: Tensor | None) -> bool:
    return zero_point is None or torch.equal(zero_point, zero_point.round())
