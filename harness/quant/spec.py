"""What "W4A8" and "FP8" mean: bit widths, or the e4m3 grid, with granularity and symmetry for each side."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ditbench.harness.common.errors import UserError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
FLOAT_BITS = 16
INT, E4M3 = "int", "e4m3"
NUMBERS = (INT, E4M3)
E4M3_MAX = 448
FP8 = "fp8"  # the label of e4m3 on both sides
FORMATS = ("W8A8", "FP8", "W6A6", "W4A8", "W4A4", "W3A4", "W8A16", "W4A16")  # what tables of formats show
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_group")
_LABEL = re.compile(r"^w(\d+)a(\d+)$")


@dataclass(frozen=True)
class QuantSpec:
    """How one side of a linear layer is rounded.

    granularity: one scale per tensor, per output channel (weights), per token (activations) or per group of
        `group_size` consecutive input channels (of each output channel or token).
    symmetric: codes −(2^(b−1)−1) … 2^(b−1)−1 with zero_point 0; otherwise 0 … 2^b−1 with zero inside the range.
    dynamic: activations only; scales from the input itself. Otherwise static, from calibration.
    number: what a code is: "int", or "e4m3", a value of the grid of float8_e4m3fn, −448 … 448 (8 bits, symmetric).
    """

    bits: int
    granularity: str
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None
    number: str = INT

    def __post_init__(self) -> None:
        if self.number not in NUMBERS:
            raise UserError(f"bits: number {self.number!r} is none of {', '.join(NUMBERS)}")
        if self.number == E4M3 and (self.bits != 8 or not self.symmetric):
            raise UserError(
                f"bits: e4m3 has 8 bits and no zero point; got {self.bits} bits, symmetric={str(self.symmetric).lower()}; "
                "take bits=fp8 with symmetric=true on both sides, or integers such as bits=w8a8"
            )
        if self.bits not in WIDTHS:
            raise UserError(f"bits: a quantized side has 2 to 8 bits, got {self.bits}; 16 leaves it in float")
        if self.granularity not in GRANULARITIES:
            raise UserError(f"bits: granularity {self.granularity!r} is none of {', '.join(GRANULARITIES)}")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise UserError(
                f"bits: group_size goes with granularity per_group; got granularity {self.granularity}, "
                f"group_size {self.group_size}"
            )

    @property
    def quant_min(self) -> int:
        return -self.quant_max if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        if self.number == E4M3:
            return E4M3_MAX
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """In which codes are kept."""
        return torch.float8_e4m3fn if self.number == E4M3 else torch.int8 if self.symmetric else torch.uint8

    def check_width(self, layer: str, channels: int) -> None:
        """Raise UserError if group_size does not divide the layer's input channels."""
        if self.group_size is None or channels % self.group_size == 0:
            return
        fitting = [size for size in (16, 24, 32, 48, 64, 96, 128, 192, 256, 288) if channels % size == 0]
        advice = f"try {', '.join(map(str, fitting))}" if fitting else "it has no usual divisor"
        raise UserError(f"{layer}: group_size {self.group_size} does not divide C={channels}; {advice}")


@dataclass(frozen=True)
class Bits:
    """Both sides; None leaves a side in 16-bit float."""

    weight: QuantSpec | None
    act: QuantSpec | None

    @property
    def label(self) -> str:
        if self.weight and self.act and self.weight.number == self.act.number == E4M3:
            return FP8.upper()
        weight = self.weight.bits if self.weight else FLOAT_BITS
        act = self.act.bits if self.act else FLOAT_BITS
        return f"W{weight}A{act}"

    def check_sides(self) -> None:
        """Raise UserError if one side alone is e4m3."""
        numbers = {side.number if side else None for side in (self.weight, self.act)}
        if E4M3 in numbers and len(numbers) > 1:
            raise UserError(
                f"bits: e4m3 is of both sides or of none (bits=fp8); got weights of {_told(self.weight)} and activations of "
                f"{_told(self.act)}"
            )

    def with_widths(self, weight_bits: int, act_bits: int) -> Bits:
        return Bits(
            replace(self.weight, bits=weight_bits) if self.weight else None,
            replace(self.act, bits=act_bits) if self.act else None,
        )


def _told(side: QuantSpec | None) -> str:
    return f"{FLOAT_BITS} bits" if side is None else E4M3 if side.number == E4M3 else f"{side.bits}-bit integers"


MIXED = "mixed"
BUDGETS = ("bytes", "average_weight_bits", "average_act_bits", "latency_ms")


@dataclass(frozen=True)
class MixedBits:
    """One of `candidates` for every layer in every one of `ranges` ranges of denoising steps, so that the sum of what
    `budget` names (one of BUDGETS) is at most `limit`.
    """

    candidates: tuple[Bits, ...]
    budget: str
    limit: float
    ranges: int = 1

    label = MIXED


class Format(NamedTuple):
    """What a label says: both widths, and the number that codes are."""

    weight: int
    act: int
    number: str = INT

    def sides(self) -> dict[str, dict[str, Any]]:
        """As the sections of a configuration's `bits`."""
        return {
            "weight": {"bits": self.weight, "number": self.number},
            "act": {"bits": self.act, "number": self.number},
        }


def parse_label(label: str) -> Format:
    """ "w4a8" → 4 and 8 bits of integers, "fp8" → e4m3.

    Raises:
        UserError: neither fp8 nor of the form w<bits>a<bits>, or a width that does not exist.
    """
    if label.lower() == FP8:
        return Format(8, 8, E4M3)
    match = _LABEL.match(label.lower())
    if not match:
        raise UserError(f"bits {label!r} is not of the form w<bits>a<bits>, such as w8a8, w4a8 or w4a16, nor {FP8}")
    widths = int(match[1]), int(match[2])
    for side, width in zip(("weight", "activation"), widths, strict=True):
        if width not in (*WIDTHS, FLOAT_BITS):
            raise UserError(f"bits={label}: {side}s cannot have {width} bits; choose 2 to 8, or 16 for float")
    return Format(*widths)


def all_labels() -> list[str]:
    """Every format that `bits=` takes."""
    widths = (*WIDTHS, FLOAT_BITS)
    return [*(f"w{weight}a{act}" for weight in widths for act in widths), FP8]


def needs_integers(who: str, *specs: QuantSpec | None) -> None:
    """Raise UserError if a side's codes are no integers, which `who` (a method, or what it learns) is about."""
    if any(spec is not None and spec.number != INT for spec in specs):
        raise UserError(
            f"{who} is about integer codes, and bits=fp8 has none; take integers such as w8a8, or another method"
        )


def bits_of(label: str) -> Bits:
    """A format in the default granularity: per channel, per token dynamic, symmetric."""
    weight, act, number = parse_label(label)
    return Bits(
        QuantSpec(weight, "per_channel", number=number) if weight < FLOAT_BITS else None,
        QuantSpec(act, "per_token", dynamic=True, number=number) if act < FLOAT_BITS else None,
    )
