"""What "W4A8" means: bit widths with granularity and symmetry for each side."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from harness.errors import UserError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
FLOAT_BITS = 16
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_group")
_LABEL = re.compile(r"^w(\d+)a(\d+)$")


@dataclass(frozen=True)
class QuantSpec:
    """How one side of a linear layer is rounded.

    granularity: one scale per tensor, per output channel (weights), per token (activations) or per group of
        `group_size` consecutive input channels (of each output channel or token).
    symmetric: codes −(2^(b−1)−1) … 2^(b−1)−1 with zero_point 0; otherwise 0 … 2^b−1 with zero inside the range.
    dynamic: activations only; scales from the input itself. Otherwise static, from calibration.
    """

    bits: int
    granularity: str
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None

    def __post_init__(self) -> None:
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
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

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
        weight = self.weight.bits if self.weight else FLOAT_BITS
        act = self.act.bits if self.act else FLOAT_BITS
        return f"W{weight}A{act}"

    def with_widths(self, weight_bits: int, act_bits: int) -> Bits:
        return Bits(
            replace(self.weight, bits=weight_bits) if self.weight else None,
            replace(self.act, bits=act_bits) if self.act else None,
        )


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


def parse_label(label: str) -> tuple[int, int]:
    """ "w4a8" → (4, 8).

    Raises:
        UserError: not of the form w<bits>a<bits>, or a width that does not exist.
    """
    match = _LABEL.match(label.lower())
    if not match:
        raise UserError(f"bits {label!r} is not of the form w<bits>a<bits>, such as w8a8, w4a8 or w4a16")
    widths = int(match[1]), int(match[2])
    for side, width in zip(("weight", "activation"), widths, strict=True):
        if width not in (*WIDTHS, FLOAT_BITS):
            raise UserError(f"bits={label}: {side}s cannot have {width} bits; choose 2 to 8, or 16 for float")
    return widths


def all_labels() -> list[str]:
    """Every format that `bits=` takes."""
    widths = (*WIDTHS, FLOAT_BITS)
    return [f"w{weight}a{act}" for weight in widths for act in widths]
