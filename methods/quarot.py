"""QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) on a DiT: a randomised Hadamard rotation before every quantizer.

    Y = X Wᵀ = (X Q)(W Q)ᵀ,   Q = diag(±1) · H / √C  orthogonal, so outlier channels are spread over all channels

    paper   here                        meaning
    Q       Hadamard(C, signs)          one per layer input, signs drawn once with `seed`
    signs   signs                       all: every rotation has its random signs; residual: those of inputs that a norm makes, where the
                                        release rotates the residual stream, and none before o_proj and down_proj; none
    clip    clip                        share of each token's range that dynamic quantizers keep; 1 keeps all
    w_clip  ranges=shrink               of each row the shrunken range with the least error (to the power 2.4)

Signs matter where channels have a mean: columns of H are not all balanced (Sylvester's has a constant one), so that without signs a
mean that all channels share (behind a GELU they do) is gathered in a few.

Departs from the paper: no rotation of the residual stream. adaLN multiplies by 1 + γ(c) after the norm, which does not
commute with Q, so each linear rotates its own input online, at full width (the release: by head before o_proj). By default
weights are rounded to nearest with min-max ranges and all rotations have signs; form=published has GPTQ with searched ranges, and
the release's signs.
Widths without a Hadamard matrix take block-diagonal blocks of the largest admissible size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.calibration.block_stream import MAX_BYTES
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.blockwise import round_blockwise, weight_from_state, weight_state
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import RANGES, QuantizedWeight
from ditbench.harness.quant.recipe import ModelRecipe, clipped
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Hadamard, Transform, random_signs

# What reads an attention's output or a feed-forward's hidden layer: o_proj and down_proj of the release.
UNSIGNED = re.compile(r"(to_out\.0|to_add_out|ff(_context)?\.net\.2|single_transformer_blocks\.\d+\.proj_out)$")


@dataclass(frozen=True)
class Params:
    """Defaults need no calibration; the release's are its published form."""

    seed: int = 0
    signs: str = "all"  # all | residual | none
    weights: str = "nearest"  # nearest | gptq
    ranges: str = "minmax"  # of weights: minmax | mse | shrink
    damp: float = 0.01  # of GPTQ
    max_bytes: int = MAX_BYTES  # of the hidden states that GPTQ keeps at a time: so many rows are used
    block_size: int | None = None  # None: the full width, or the largest admissible block
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.clip <= 1.0:
            raise ValueError(f"quarot: clip must be in (0, 1], got {self.clip}")
        known = {"signs": ("all", "residual", "none"), "weights": ("nearest", "gptq"), "ranges": tuple(RANGES)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"quarot: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"quarot: block_size must be at least 2, got {self.block_size}")


FORMS = {
    PUBLISHED: Form({"signs": "residual", "weights": "gptq", "ranges": "shrink"}, {"calibration.n": 128}),
}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(params.seed)
    state = {
        f"{site.name}/signs": random_signs(target.module(site.consumers[0]).in_features, generator)
        for site in target.linear_sites()
    }
    if params.signs != "all":
        for site in target.linear_sites():
            if params.signs == "none" or all(map(UNSIGNED.search, site.consumers)):
                state[f"{site.name}/signs"] = torch.ones_like(state[f"{site.name}/signs"])
    rotated = rotations(target, state, params)
    state |= static_ranges(target, bits, calibration, rotated)
    if bits.weight is None or params.weights == "nearest":
        return state
    spec = bits.weight

    def round_weight(name: str, weight_OC: Tensor, hessian_CC: Tensor) -> QuantizedWeight:
        return gptq(weight_OC, hessian_CC, spec, damp=params.damp, ranges=params.ranges)

    rounded = round_blockwise(target, calibration, round_weight, rotated, max_bytes=params.max_bytes)
    for name, weight in rounded.items():
        state |= weight_state(name, weight)
    return state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    weights = {n: weight_from_state(n, state, bits.weight) for n in target.layers if f"{n}/codes" in state}
    rotated = rotations(target, state, params)
    return clipped(nearest(target, bits, state, rotated, weights=weights, weight_ranges=params.ranges), params.clip)


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
