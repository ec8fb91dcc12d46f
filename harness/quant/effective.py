"""The weight and bias that each layer has after all transforms and folds, before any rounding.

Folding a site's shift z and scale s into its producer (DiT's `modulate` with 1 + γ; HTG Alg. 2, PTQ4DiT Eq. 18–21):

    adaLN rows   W_β ← W_β / s,  b_β ← (b_β − z) / s;   W_γ ← W_γ / s,  b_γ ← (b_γ + 1) / s − 1
    V rows       W_v ← W_v / s,  b_v ← (b_v − z) / s     (softmax rows sum to one, so the shift passes through)
    table rows   see `harness.quant.folds`

Consumers take W ← W · diag(s) · R and b ← b + W z. Row operations on a producer commute with the column operations that
the same layer undergoes as a consumer; the bias is built consumer first. Everything is computed in float64 on the target's
device, layer by layer, so that memory does not grow with the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.quant.recipe import ModelRecipe, to_device
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import AdaLNRows, Site, TableRows, Target
from ditbench.harness.quant.transforms import Transform


@dataclass(frozen=True)
class EffectiveLinear:
    """weight_OC: float64; bias: table of rows (G, O), float64, or None; both on the target's device."""

    weight_OC: Tensor
    bias: StepTable | None


def effective_linear(
    target: Target, name: str, transforms: dict[str, Transform], folded: frozenset[str]
) -> EffectiveLinear:
    """Layer `name` after its own input transform and after the folds into its rows.

    transforms: by layer name; layers without an entry are left as they are.
    """
    layer = target.module(name)
    transform = to_device(transforms.get(name, Transform()), target.device)
    weight = target.weight(name).to(torch.float64, copy=True)
    own_bias = None if layer.bias is None else layer.bias.detach().to(target.device).to(torch.float64, copy=True)
    bias = transform.of_bias(own_bias, weight)
    weight = transform.of_weight(weight)
    for site in target.sites:
        for producer in site.rows_of(name) if site.name in folded else ():
            shared = to_device(shared_transform(site, transforms), target.device)
            if isinstance(producer, AdaLNRows):
                weight, bias = _fold_adaln(weight, bias, producer, shared)
            else:
                weight, bias = _fold_rows(weight, bias, producer.rows, shared, offset=0.0)
    return EffectiveLinear(weight, bias)


def shared_transform(site: Site, transforms: dict[str, Transform]) -> Transform:
    """The one transform that all consumers of a folded site share.

    Raises:
        ValueError: they differ, or one of them has none; folding would then change the output.
    """
    first = transforms.get(site.consumers[0])
    if first is None or any(transforms.get(name) is not first for name in site.consumers):
        raise ValueError(
            f"{site.name}: a folded site needs one transform object for all of {', '.join(site.consumers)}"
        )
    return first


def touched_layers(target: Target, recipe: ModelRecipe) -> list[str]:
    """Layers that the recipe rebuilds: those with a recipe and the linear producers that folds rewrite."""
    folded = [site for site in target.sites if site.name in recipe.folded]
    linear = [producer.linear for site in folded for producer in site.producers if not isinstance(producer, TableRows)]
    return list(dict.fromkeys([*recipe.layers, *linear]))


def _fold_adaln(
    weight: Tensor, bias: StepTable | None, producer: AdaLNRows, transform: Transform
) -> tuple[Tensor, StepTable]:
    weight, bias = _fold_rows(weight, bias, producer.shift_rows, transform, offset=0.0)
    scale_only = Transform(scale_C=transform.scale_C)
    return _fold_rows(weight, bias, producer.scale_rows, scale_only, offset=1.0)


def _fold_rows(
    weight: Tensor, bias: StepTable | None, rows: slice, transform: Transform, offset: float
) -> tuple[Tensor, StepTable]:
    """W[rows] ← W[rows] / s and b[rows] ← (b[rows] + offset − z) / s − offset."""
    scale = weight.new_ones(()) if transform.scale_C is None else transform.scale_C
    weight = weight.clone()
    weight[rows] = weight[rows] / (scale.double()[:, None] if scale.ndim else scale.double())
    bias = StepTable.constant(weight.new_zeros(len(weight))) if bias is None else bias

    def rewrite(bias_GO: Tensor, shift_GC: Tensor | float = 0.0) -> Tensor:
        bias_GO = bias_GO.clone() + torch.zeros_like(
            shift_GC[..., :1] if isinstance(shift_GC, Tensor) else bias_GO[..., :1]
        )
        bias_GO[..., rows] = (bias_GO[..., rows] + offset - shift_GC) / scale.double() - offset
        return bias_GO

    if transform.shift is None:
        return weight, bias.map(rewrite)
    shift = transform.shift.map(lambda shift_GC: shift_GC.double())
    return weight, bias.combine(shift, rewrite)
