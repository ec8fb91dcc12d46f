"""QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) on a DiT: a randomised Hadamard rotation before every quantizer.

    Y = X Wᵀ = (X Q)(W Q)ᵀ,   Q = diag(±1) · H / √C  orthogonal, so outlier channels are spread over all channels

    paper   here                        meaning
    Q       Hadamard(C, signs)          one per layer input, signs drawn once with `seed`
    clip    clip                        share of each token's range that dynamic quantizers keep; 1 keeps all

Departs from the paper: no rotation of the residual stream. adaLN multiplies by 1 + γ(c) after the norm, which does not
commute with Q, so each linear rotates its own input online. Weights are rounded to nearest (the paper's RTN variant).
Widths without a Hadamard matrix take block-diagonal blocks of the largest admissible size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Hadamard, Transform, random_signs


@dataclass(frozen=True)
class Params:
    """Defaults are the paper's."""

    seed: int = 0
    block_size: int | None = None  # None: the full width, or the largest admissible block
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.clip <= 1.0:
            raise ValueError(f"quarot: clip must be in (0, 1], got {self.clip}")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"quarot: block_size must be at least 2, got {self.block_size}")


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(params.seed)
    state = {
        f"{site.name}/signs": random_signs(target.module(site.consumers[0]).in_features, generator)
        for site in target.linear_sites()
    }
    return state | static_ranges(target, bits, calibration, rotations(target, state, params))


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    recipe = nearest(target, bits, state, rotations(target, state, params))
    layers = {name: clipped(layer, params.clip) for name, layer in recipe.layers.items()}
    return replace(recipe, layers=layers)


def clipped(layer: LayerRecipe, clip: float) -> LayerRecipe:
    """Dynamic ranges times `clip`; static ones are what the calibration found."""
    if layer.act is None or not layer.act.spec.dynamic:
        return layer
    return replace(layer, act=replace(layer.act, clip=clip))


def rotations(target: Target, state: dict[str, Tensor], params: Params) -> dict[str, Transform]:
    """One rotation per site, shared by the target layers that read it; layers in float are left alone."""
    transforms = {}
    for site in target.linear_sites():
        signs_C = state[f"{site.name}/signs"]
        shared = Transform(rotations=(rotation(site.name, signs_C, params),))
        transforms |= {name: shared for name in site.consumers if name in target.layers}
    return transforms


def rotation(site: str, signs_C: Tensor, params: Params) -> Hadamard:
    try:
        return Hadamard(len(signs_C), signs_C, params.block_size)
    except ValueError as error:
        raise UserError(f"{site}: method.block_size={params.block_size}: {error}") from error
