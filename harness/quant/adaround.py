"""AdaRound (Nagel et al. 2020, arXiv:2004.10568): each weight learns whether it is rounded down or up.

    Ŵ = δ · (clamp(⌊W/δ⌋ + h(α) + z, q_min, q_max) − z),    h(α) = clamp(sigmoid(α) (ζ − γ) + γ, 0, 1)
    start: h(α) = W/δ − ⌊W/δ⌋, so that Ŵ = W        regulariser: Σ 1 − |2 h(α) − 1|^b        end: h = 1 where α ≥ 0

    paper    here          meaning
    α        alpha_OGg     what is learned, one per weight
    h(α)     up_OGg        share by which a weight is rounded up, 0–1
    ζ, γ     STRETCH       1.1 and −0.1: h reaches 0 and 1 at finite α
    b        sharpness     20 → 2: how close to 0 or 1 the regulariser starts to pull
    δ, z     scale, zero_point   of the start, not learned

`LearnedAct` is the same for a static activation quantizer: its scale is learned through the rounding as if that were the
identity (LSQ, Esser et al. 2020, arXiv:1902.08153, eqs. 3 and 5, without its gradient scale, which Adam takes out). With
q = ⌊x/s⌉ + z:

    ∂x̂/∂s = ⌊x/s⌉ − x/s  where q_min ≤ q ≤ q_max,  otherwise the end's code − z        ∂x̂/∂x = 1 there, otherwise 0

Whether a value is inside is asked of its rounded code, as in the code of BRECQ and QDrop and in torch's own learnable
quantizer; LSQ asks x/s itself, which differs for what lies less than half a step behind an end.

Both ends of both clamps count as inside (`clamp_with_ends`). Many values lie exactly there: the largest weight of a row has
h = 0, and every input near the end of its range gets the end's code. What autograd does with `Tensor.clamp` there is its own
choice, and changed in torch 2.14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, fake_quantize_activation, from_codes
from ditbench.harness.quant.spec import needs_integers

STRETCH = (-0.1, 1.1)
SCALE_FLOOR = 1e-3  # of the starting scale: a learned scale stays positive


class _ClampWithEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        slack = torch.finfo(x.dtype).eps  # h of a weight on the grid is 0 but for the rounding of the sigmoid
        ctx.save_for_backward((x >= low - slack) & (x <= high + slack))
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradients[0], 0.0), None, None


class AdaRound(nn.Module):
    """The rounding of one weight; start gives scale, zero_point and spec."""

    def __init__(self, weight_OC: Tensor, start: QuantizedWeight) -> None:
        super().__init__()
        needs_integers("AdaRound", start.spec)
        self.spec = start.spec
        groups = start.scale_OG.shape[1]
        self.scale_OG, self.zero_point_OG = start.scale_OG, start.zero_point_OG
        ratio_OGg = weight_OC.unflatten(1, (groups, -1)) / start.scale_OG[..., None]
        self.floor_OGg = ratio_OGg.floor()
        self.alpha_OGg = nn.Parameter(alpha_of(ratio_OGg - self.floor_OGg))

    def soft_OC(self) -> Tensor:
        """The weight that is trained: between its two neighbours on the grid."""
        return self._dequantize(rectified_sigmoid(self.alpha_OGg))

    def hard(self) -> QuantizedWeight:
        """The weight that is used: up where α ≥ 0."""
        codes = self._codes((self.alpha_OGg.detach() >= 0).to(self.floor_OGg.dtype)).flatten(1)
        return QuantizedWeight(codes.to(self.spec.code_dtype), self.scale_OG, self.zero_point_OG, self.spec)

    def regulariser(self, sharpness: float) -> Tensor:
        """Σ 1 − |2 h(α) − 1|^b: 0 when every weight has decided."""
        return (1 - (2 * rectified_sigmoid(self.alpha_OGg) - 1).abs() ** sharpness).sum()

    def _codes(self, up_OGg: Tensor) -> Tensor:
        codes = self.floor_OGg + up_OGg
        if self.zero_point_OG is not None:
            codes = codes + self.zero_point_OG[..., None]
        return clamp_with_ends(codes, self.spec.quant_min, self.spec.quant_max)

    def _dequantize(self, up_OGg: Tensor) -> Tensor:
        zero_point = None if self.zero_point_OG is None else self.zero_point_OG[..., None]
        return from_codes(self._codes(up_OGg), self.scale_OG[..., None], zero_point).flatten(1)


class LearnedAct(nn.Module):
    """An activation quantizer that gradients pass through; if it is static, its scale is a parameter (zero_point stays)."""

    def __init__(self, quant: ActQuant) -> None:
        super().__init__()
        needs_integers("LSQ", quant.spec)
        self.quant = quant
        self.scale_G: nn.Parameter | None = None
        if quant.scale is not None:
            self.scale_G = nn.Parameter(quant.scale.rows.detach().clone())
            self.floor_G = SCALE_FLOOR * quant.scale.rows

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        if self.scale_G is None:
            return x + (fake_quantize_activation(x.detach(), self.quant, step) - x).detach()
        assert self.quant.scale is not None
        group = self.quant.scale.group_of_step
        scale = self.scale_G[0 if group is None else group[step]]
        zero_point = None if self.quant.zero_point is None else self.quant.zero_point.at(step)
        spec, codes = self.quant.spec, x / scale
        codes = codes + (codes.round() - codes).detach()  # rounding, with the gradient of the identity
        codes = codes if zero_point is None else codes + zero_point
        codes = clamp_with_ends(codes, spec.quant_min, spec.quant_max)
        return from_codes(codes, scale, zero_point)

    @torch.no_grad()
    def keep_positive(self) -> None:
        if self.scale_G is not None:
            self.scale_G.clamp_(min=self.floor_G)

    def range_state(self, name: str) -> dict[str, Tensor]:
        """The learned scale as the range ends that `rounding.act_quant` makes it from."""
        assert self.scale_G is not None
        spec, scale_G = self.quant.spec, self.scale_G.detach()
        zero_point_G = torch.zeros_like(scale_G) if self.quant.zero_point is None else self.quant.zero_point.rows
        low = -spec.quant_max if spec.symmetric else spec.quant_min
        return {
            f"{name}/act_low": (low - zero_point_G) * scale_G,
            f"{name}/act_high": (spec.quant_max - zero_point_G) * scale_G,
        }


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(α)."""
    low, high = STRETCH
    return clamp_with_ends(torch.sigmoid(alpha) * (high - low) + low, 0, 1)


def clamp_with_ends(x: Tensor, low: float, high: float) -> Tensor:
    """clamp(x, low, high); the gradient passes where low ≤ x ≤ high, both ends to within a rounding, and is 0 elsewhere."""
    return _ClampWithEnds.apply(x, low, high)


def alpha_of(up: Tensor) -> Tensor:
    """The inverse of h on [0, 1]."""
    low, high = STRETCH
    return torch.logit((up - low) / (high - low))
