"""ConvRot (Huang et al. 2025, arXiv:2512.03673): inputs and weights rotated by regular Hadamard matrices, in groups of channels.

    Y = X Wᵀ = (X R)(W R)ᵀ,   R = blockdiag(H, …, H) / √N₀,   H = H₄ ⊗ H₄ ⊗ …,   H₄ = [1 1 1 −1; 1 1 −1 1; 1 −1 1 1; −1 1 1 1]

All rows and columns of a regular H sum to ±√N₀, the least that the largest column sum of a Hadamard matrix can be. Sylvester's has a
column of ones with the sum N₀: a token whose channels have one sign (a row-wise outlier) is gathered there instead of spread.

    paper   here                       meaning
    N₀      block_size                 256: a power of four, of which the largest that divides the width is taken
    RHT     RegularHadamard            one for all layers; nothing is drawn, and nothing looks at data
            hadamard=standard          the same groups, with the matrices of `quant.hadamard`, which are not regular
            wide                       layers that take 8 bits on both sides (form=published: its mixed precision)

Weights are rounded to nearest with a symmetric range per row, activations dynamically per token: the defaults of `bits`.

Departs from the paper: widths that N₀ does not divide are padded with zeros there; here they take smaller groups (192 channels:
64). Which layers its mixed precision has at 8 bits is known second-hand, of FLUX.1; other models have them where their layers have these names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import Tensor

from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.hadamard import largest_power_of_four
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import INT, Bits, QuantSpec
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Hadamard, RegularHadamard, Transform

WIDE_BITS = 8
# Output layers of the attention in two-stream blocks (and in blocks of one kind), V in FLUX's single ones.
WIDE_OF_FLUX = (
    r"(^|\.)transformer_blocks\.\d+\.attn\d*\.to_(out\.0|add_out)$|single_transformer_blocks\.\d+\.attn\.to_v$"
)


@dataclass(frozen=True)
class Params:
    """Defaults are the release's, but for the layers at 8 bits."""

    block_size: int = 256
    hadamard: str = "regular"  # regular | standard
    wide: str = ""  # regular expression of layer names; where `bits` says integers of fewer than 8 bits, these take 8

    def __post_init__(self) -> None:
        if self.block_size < 4 or largest_power_of_four(self.block_size, self.block_size) != self.block_size:
            raise ValueError(f"convrot: block_size must be a power of four, such as 64 or 256, got {self.block_size}")
        if self.hadamard not in ("regular", "standard"):
            raise ValueError(f"convrot: hadamard must be one of regular, standard, got {self.hadamard!r}")
        try:
            re.compile(self.wide)
        except re.error as error:
            raise ValueError(
                f"convrot: wide: {self.wide!r} is not a regular expression of layer names ({error})"
            ) from error


FORMS = {PUBLISHED: Form({"wide": WIDE_OF_FLUX})}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    return static_ranges(target, bits, calibration, rotations(target, params))


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(
        target, bits, state, rotations(target, params), bits_of_layer=wider_layers(target, bits, params.wide)
    )


def rotations(target: Target, params: Params) -> dict[str, Transform]:
    """One rotation per site, shared by the target layers that read it; layers in float are left alone."""
    transforms = {}
    for site in target.linear_sites():
        shared = Transform(rotations=rotation(target.module(site.consumers[0]).in_features, params))
        transforms |= {name: shared for name in site.consumers if name in target.layers}
    return transforms


def rotation(width: int, params: Params) -> tuple[Hadamard | RegularHadamard, ...]:
    """None of a width that four does not divide."""
    block_size = largest_power_of_four(width, params.block_size)
    if block_size == 1:
        return ()
    if params.hadamard == "standard":
        return (Hadamard(width, block_size=block_size),)
    return (RegularHadamard(width, block_size),)


def wider_layers(target: Target, bits: Bits, pattern: str) -> dict[str, Bits]:
    """{layer: its format} of those that take 8 bits instead of fewer."""
    if not pattern:
        return {}
    wide = Bits(wider(bits.weight), wider(bits.act))
    return {name: wide for name in target.layers if re.search(pattern, name)}


def wider(spec: QuantSpec | None) -> QuantSpec | None:
    narrow = spec is not None and spec.number == INT and spec.bits < WIDE_BITS
    return replace(spec, bits=WIDE_BITS) if narrow else spec  # type: ignore[type-var]
