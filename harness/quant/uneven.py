"""Quantizers of activations whose values are not codes times one scale. No kernel multiplies their codes: they are simulated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.quant.block_scales import to_grid
from ditbench.harness.quant.quantizers import (
    MSE_PERCENTILES,
    ActQuant,
    UnevenQuant,
    fake_quantize_activation,
    quantile,
)
from ditbench.harness.quant.spec import INT, QuantSpec
from ditbench.harness.quant.steps import StepTable


@dataclass(frozen=True)
class LogSqrt2Quant(UnevenQuant):
    """Codes of a softmax map that are even in log√2 (RepQ-ViT, arXiv:2212.08254): x̂ = δ · 2^(−q/2), scale: the table of δ.

    q = max(round(−2 log2(x / δ)), 0); where q does not fit the bits, x̂ = 0.
    """

    def rounded(self, x: Tensor, step: Tensor | None) -> Tensor:
        assert self.scale is not None
        return log_sqrt2(x, self.scale.at(step), self.spec.bits)


def log_sqrt2(x: Tensor, delta: Tensor, bits: int) -> Tensor:
    """x >= 0 at the nearest level in the logarithm; see `LogSqrt2Quant`."""
    codes = (-2 * torch.log2(x / delta)).round().clamp(min=0)  # of 0: infinite, and so no level
    return torch.where(codes < 2**bits, delta * 2 ** (-codes / 2), 0.0)


def log_sqrt2_delta(values_N: Tensor, bits: int) -> Tensor:
    """Of three percentiles of a sample, the δ with the least squared error; a scalar."""
    ordered_N = values_N.float().sort().values
    candidates = [quantile(ordered_N, p) for p in MSE_PERCENTILES]
    errors = torch.stack([(log_sqrt2(ordered_N, delta, bits) - ordered_N).square().sum() for delta in candidates])
    return candidates[int(errors.argmin())]


@dataclass(frozen=True)
class DualScaleQuant(UnevenQuant):
    """Positive and negative values with a scale each (SegQuant, arXiv:2507.14811, DualScale): X ≈ s₊ Q₊ + s₋ Q₋, of which one is zero.

    A code still takes the bits of the spec, its sign says which scale is meant; a product of X takes two, one for each sign.
    Symmetric; per_tensor, per_token or per_group. scale: s₊; negative_scale: s₋; tables of static ones.
    """

    negative_scale: StepTable | None = None

    def rounded(self, x: Tensor, step: Tensor | None) -> Tensor:
        shape, spec = x.shape, self.spec
        if spec.granularity == "per_group":
            x = x.unflatten(-1, (-1, spec.group_size))
        if self.scale is not None and self.negative_scale is not None:
            above, below = self.scale.at(step).to(x.dtype), self.negative_scale.at(step).to(x.dtype)
        else:
            over = tuple(range(1, x.ndim)) if spec.granularity == "per_tensor" else -1  # of one sample, as elsewhere
            above, below = dual_scales(
                self.clip * x.amin(over, keepdim=True), self.clip * x.amax(over, keepdim=True), spec
            )
        positive = _codes(x.clamp(min=0) / above, spec, spec.quant_max) * above
        negative = _codes(x.clamp(max=0) / below, spec, largest_below(spec)) * below
        return (positive + negative).reshape(shape)


def largest_below(spec: QuantSpec) -> float:
    """The magnitude of the least code: of integers one more than of the largest."""
    return spec.quant_max + 1 if spec.number == INT else spec.quant_max


def dual_scales(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Ends of ranges → (s₊, s₋); a side without values has scale 1."""
    above, below = high.clamp(min=0) / spec.quant_max, -low.clamp(max=0) / largest_below(spec)
    return above.masked_fill(above == 0, 1), below.masked_fill(below == 0, 1)


def static_dual(low: StepTable, high: StepTable, spec: QuantSpec) -> DualScaleQuant:
    """From tables of range ends."""
    above, below = dual_scales(low.rows, high.rows, spec)
    return DualScaleQuant(spec, StepTable(above, low.group_of_step), negative_scale=StepTable(below, low.group_of_step))


def _codes(x: Tensor, spec: QuantSpec, largest: float) -> Tensor:
    return x.round().clamp(-largest, largest) if spec.number == INT else to_grid(x, spec.number)


@dataclass(frozen=True)
class ChannelScaledQuant(UnevenQuant):
    """Each channel is divided by its largest value over the tokens of the sample, rounded as the spec says, and multiplied again
    (DVD-Quant, arXiv:2505.18663, ARQ): x ≈ Q(x Λ⁻¹) Λ with Λ_j = max over tokens |x_j|. Dynamic.

    channels: consecutive ones that share a Λ_j, of all of them; the last of a width may be fewer. An input of one token per
        sample has no Λ: it would be the input itself.
    """

    channels: int = 1

    def rounded(self, x: Tensor, step: Tensor | None) -> Tensor:
        inner = ActQuant(self.spec, clip=self.clip)
        if x.shape[1:-1].numel() == 1:  # of a (B, C) input, too
            return fake_quantize_activation(x, inner, step)
        scale = channel_absmax(x, self.channels)
        return fake_quantize_activation(x / scale, inner, step) * scale


@dataclass(frozen=True)
class LeadingQuant(UnevenQuant):
    """Only the first `channels` are rounded, as the spec says; the others count as zero here, since a branch in high precision takes
    them (DiRotQ, arXiv:2605.16732).

    scale, zero_point: as of an `ActQuant`, of the leading channels.
    """

    channels: int = 0

    def rounded_share(self, channels: int) -> float:
        return self.channels / channels

    def rounded(self, x: Tensor, step: Tensor | None) -> Tensor:
        inner = ActQuant(self.spec, self.scale, self.zero_point, self.clip)
        leading = torch.arange(x.shape[-1], device=x.device) < self.channels
        return fake_quantize_activation(x * leading, inner, step)  # zeros widen no range, and stay zeros


def channel_absmax(x: Tensor, channels: int) -> Tensor:
    """x (B, …, C) → Λ (B, 1, …, C); 1 where a channel is zero."""
    absmax = x.abs().amax(tuple(range(1, x.ndim - 1)), keepdim=True)
    if channels > 1:
        parts = [part.amax(-1, keepdim=True).expand_as(part) for part in absmax.split(channels, dim=-1)]
        absmax = torch.cat(parts, dim=-1)
    return absmax.masked_fill(absmax == 0, 1)
