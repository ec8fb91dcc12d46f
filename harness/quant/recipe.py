"""What a method returns: per layer, one declarative recipe of transform, low-rank branch, weight codes, activation quantizer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from harness.quant.quantizers import ActQuant, LookupWeight, QuantizedWeight
from harness.quant.transforms import Transform


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


@dataclass(frozen=True)
class ModelRecipe:
    """layers and attention by module name; folded: names of the sites whose shift and scale are folded.

    num_steps: the number of denoising steps that step-dependent tables were made for; None if there are none.
    """

    layers: dict[str, LayerRecipe]
    folded: frozenset[str] = frozenset()
    attention: dict[str, AttentionRecipe] = field(default_factory=dict)
    num_steps: int | None = None

    def without_rounding(self) -> ModelRecipe:
        """Only the transforms: a model that computes what the float model computes."""
        return replace(self, layers={n: r.without_rounding() for n, r in self.layers.items()}, attention={})
