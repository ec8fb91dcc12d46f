"""What "W4A8", "FP8" and "NVFP4" mean: for each side the grid that codes lie on, what shares a scale, and how that scale is kept."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ditbench.harness.common.errors import UserError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
FLOAT_BITS = 16
INT, E4M3, E5M2, E3M2, E2M3, E2M1 = "int", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1"
NUMBERS = (INT, E4M3, E5M2, E3M2, E2M3, E2M1)
E4M3_MAX = 448


class Grid(NamedTuple):
    """A small float: widths of exponent and mantissa, the exponent of the least normal number, the largest value."""

    exponent: int
    mantissa: int
    least: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


GRIDS = {  # OCP MX v1.0, tables 2 to 5; e4m3 has no infinity, those below 8 bits have no NaN either
    E4M3: Grid(4, 3, -6, E4M3_MAX),
    E5M2: Grid(5, 2, -14, 57344.0),
    E3M2: Grid(3, 2, -2, 28.0),
    E2M3: Grid(2, 3, 0, 7.5),
    E2M1: Grid(2, 1, 0, 6.0),
}
FLOAT8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}  # the others are kept as patterns of bits

PER_BLOCK = "per_block"
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_group", PER_BLOCK)
FLOAT32, BFLOAT16, E8M0 = "float32", "bfloat16", "e8m0"
SCALES = {  # how a block's scale is kept
    FLOAT32: torch.float32,
    BFLOAT16: torch.bfloat16,
    E8M0: torch.float8_e8m0fnu,  # a power of two
    E4M3: torch.float8_e4m3fn,  # times a float32 of the tensor
}
RCEIL, FLOOR, CEIL, EVEN, DIVIDE, RECIPROCAL = "rceil", "floor", "ceil", "even", "divide", "reciprocal"
RULES = {
    E8M0: (RCEIL, FLOOR, CEIL, EVEN),
    E4M3: (DIVIDE, RECIPROCAL),
}  # of finding the scale; the first where none is said

FP8, NVFP4, FP8_BLOCK = "fp8", "nvfp4", "fp8_block"
_BLOCK = {"granularity": PER_BLOCK}
MOST_IN_BLOCK = 2**16  # rows or channels: a tensor is filled up with zeros to whole blocks
_NVFP4 = {"bits": 4, "number": E2M1, **_BLOCK, "group_size": 16, "scale": E4M3, "rule": DIVIDE, "four_over_six": False}
_MX = {**_BLOCK, "group_size": 32, "scale": E8M0, "rule": RCEIL}
_FP8_BLOCK = {"bits": 8, "number": E4M3, **_BLOCK, "group_size": 128}
_INT4 = {"bits": 4, "number": INT, **_BLOCK, "scale": BFLOAT16}
NAMED: dict[
    str, dict[str, Any]
] = {  # settings of a weight; of an activation, which has rows of its own, `block_rows` is 1
    FP8: {"bits": 8, "number": E4M3},
    NVFP4: _NVFP4,
    "mxfp4": {"bits": 4, "number": E2M1, **_MX},
    "mxfp6": {"bits": 6, "number": E3M2, **_MX},
    "mxfp8": {"bits": 8, "number": E4M3, **_MX},
    FP8_BLOCK: {**_FP8_BLOCK, "block_rows": 128},
    "int4_g64": {**_INT4, "group_size": 64},
    "int4_g128": {**_INT4, "group_size": 128},
}
FORMATS = (  # what tables of formats show
    *("W8A8", "FP8", "W6A6", "W4A8", "W4A4", "W3A4", "W8A16", "W4A16"),
    *("MXFP8", "FP8_BLOCK", "MXFP6", "NVFP4", "MXFP4", "INT4_G64"),
)
NO_FORMAT = ("null", "none", "float", "fp16", "bf16", "fp", "off", "false", "16")  # of those who mean no quantization
_INTEGERS = re.compile(r"^w(\d+)a(\d+)$")
_SIDES = re.compile(r"^w([a-z0-9_]+)_a([a-z0-9_]+)$")


@dataclass(frozen=True)
class QuantSpec:
    """How one side of a linear layer is rounded.

    granularity: one scale per tensor, per output channel (weights), per token (activations), per group of `group_size`
        consecutive input channels (of each output channel or token), which divides C; or per block: the same, but the
        last one may be shorter, and `block_rows` output channels share it.
    symmetric: codes −(2^(b−1)−1) … 2^(b−1)−1 with zero_point 0; otherwise 0 … 2^b−1 with zero inside the range.
    dynamic: activations only; scales from the input itself. Otherwise static, from calibration.
    number: what a code is: "int", or a value of one of GRIDS, such as "e4m3", −448 … 448 (symmetric).
    scale: one of SCALES, how the scale of a block is kept. "e4m3": times a float32 of the whole tensor.
    rule: one of RULES[scale]. Of e8m0: how the power of two is found. Of e4m3: "divide" as comfy-kitchen does, or "reciprocal"
        as torchao: at least 2⁻⁶, and x times the reciprocal.
    four_over_six: of e2m1 with scale e4m3: the largest of a block becomes 6 or 4, whichever errs less (arXiv:2512.02010).
    """

    bits: int
    granularity: str
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None
    number: str = INT
    block_rows: int = 1
    scale: str = FLOAT32
    rule: str | None = None
    four_over_six: bool = False

    def __post_init__(self) -> None:
        if self.number not in NUMBERS:
            raise UserError(f"bits: number {self.number!r} is none of {', '.join(NUMBERS)}")
        if self.number != INT and (self.bits != GRIDS[self.number].bits or not self.symmetric):
            raise UserError(
                f"bits: {self.number} has {GRIDS[self.number].bits} bits and no zero point; got {self.bits} bits, "
                f"symmetric={str(self.symmetric).lower()}; take bits={self._float_label()} with symmetric=true on both sides, "
                "or integers such as bits=w8a8"
            )
        if self.bits not in WIDTHS:
            raise UserError(f"bits: a quantized side has 2 to 8 bits, got {self.bits}; 16 leaves it in float")
        if self.granularity not in GRANULARITIES:
            raise UserError(f"bits: granularity {self.granularity!r} is none of {', '.join(GRANULARITIES)}")
        if (self.granularity in ("per_group", PER_BLOCK)) != (self.group_size is not None):
            raise UserError(
                f"bits: group_size goes with granularity per_group or {PER_BLOCK}; got granularity {self.granularity}, "
                f"group_size {self.group_size}"
            )
        self._check_scale()

    def _check_scale(self) -> None:
        if self.scale not in SCALES:
            raise UserError(f"bits: scale {self.scale!r} is none of {', '.join(SCALES)}")
        if self.granularity != PER_BLOCK and (
            self.scale != FLOAT32 or self.block_rows != 1 or self.number not in (INT, E4M3)
        ):
            raise UserError(
                f"bits: {self.number} with scale {self.scale} and block_rows {self.block_rows} goes with granularity "
                f"{PER_BLOCK}; got {self.granularity}"
            )
        if self.block_rows < 1:
            raise UserError(f"bits: block_rows must be at least 1, got {self.block_rows}")
        for name, value in (("block_rows", self.block_rows), ("group_size", self.group_size or 1)):
            if value > MOST_IN_BLOCK:
                raise UserError(f"bits: {name} must be at most {MOST_IN_BLOCK:,}, got {value}")
        if self.scale in RULES and (self.number == INT or self.block_rows != 1):
            raise UserError(
                f"bits: a scale in {self.scale} is of floats in rows; got {self.number}, block_rows {self.block_rows}"
            )
        known = RULES.get(self.scale, ())
        if self.rule is not None and self.rule not in known:
            wanted = f"is none of {', '.join(known)}" if known else "is of scales in e8m0 or e4m3"
            raise UserError(f"bits: rule {self.rule!r} of scale {self.scale} {wanted}")
        if self.four_over_six and (self.number, self.scale) != (E2M1, E4M3):
            raise UserError(f"bits: four_over_six is of bits=nvfp4; got {self.number} with scale {self.scale}")

    def _float_label(self) -> str:
        return FP8 if self.scale == FLOAT32 else self.name.lower()

    @property
    def quant_min(self) -> float:
        return -self.quant_max if self.symmetric else 0

    @property
    def quant_max(self) -> float:
        if self.number != INT:
            return GRIDS[self.number].largest
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """In which codes are kept: numbers, or the bits of a small float without a dtype of its own."""
        if self.number != INT:
            return FLOAT8.get(self.number, torch.uint8)
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def least_code(self) -> int:
        """What is packed as 0."""
        return int(self.quant_min) if self.number == INT else 0

    @property
    def in_blocks(self) -> bool:
        return self.granularity == PER_BLOCK

    @property
    def scale_rule(self) -> str | None:
        """`rule`, or what holds where none is said; None of scales that have none."""
        return self.rule or next(iter(RULES.get(self.scale, ())), None)

    @property
    def name(self) -> str:
        """As a label names this side: NVFP4, MXFP8, FP8_BLOCK, FP8, INT4_G64; of other integers their width."""
        if self.scale == E4M3:
            return NVFP4.upper()
        if self.scale == E8M0:
            return f"MXFP{self.bits}"
        if self.number != INT:
            return (FP8_BLOCK if self.in_blocks else FP8).upper()
        grouped = f"int{self.bits}_g{self.group_size}"
        return grouped.upper() if self.scale == BFLOAT16 and grouped in NAMED else str(self.bits)

    @property
    def stored_bits(self) -> float:
        """Of a value with its share of a block's scale; scales of whole rows, groups or tensors do not count here."""
        if not self.in_blocks:
            return self.bits
        assert self.group_size is not None
        return self.bits + 8 * SCALES[self.scale].itemsize / (self.group_size * self.block_rows)

    @property
    def told(self) -> str:
        """One line for a record: grid, block, scale and its rule."""
        of = {
            "per_group": f"groups of {self.group_size}",
            PER_BLOCK: f"blocks of {self.block_rows} × {self.group_size}",
        }
        words = [f"{self.number}{self.bits if self.number == INT else ''} {of.get(self.granularity, self.granularity)}"]
        second = " and one float32 of the tensor" if self.scale == E4M3 else ""
        rule = f" ({self.scale_rule})" if self.scale_rule else ""
        words.append(f"scales in {self.scale}{rule}{second}")
        return ", ".join(words + ["four over six"] * self.four_over_six)

    def check_width(self, layer: str, channels: int) -> None:
        """Raise UserError if group_size does not divide the layer's input channels; a block may be shorter."""
        if self.in_blocks or self.group_size is None or channels % self.group_size == 0:
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
        """W4A8 of integers, NVFP4 where both sides are, WNVFP4_AFP8 of a mixture."""
        weight, act = (str(FLOAT_BITS) if side is None else side.name for side in (self.weight, self.act))
        if weight.isdigit() and act.isdigit():
            return f"W{weight}A{act}"
        return weight if weight == act else f"W{weight}_A{act}"

    def check_sides(self) -> None:
        """Raise UserError for what only one of the sides may be."""
        act = self.act
        if act is None or not act.in_blocks:
            return
        if act.block_rows != 1 or not (act.dynamic or act.scale == E4M3):
            raise UserError(
                f"bits: activations in blocks ({act.name.lower()}) are dynamic (nvfp4's second scale may be static), and each token has "
                "its own; set bits.act.dynamic=true and bits.act.block_rows=1"
            )

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


class Format(NamedTuple):
    """What a label says of each side: settings of a configuration's `bits.weight` and `bits.act`."""

    weight: Mapping[str, Any]
    act: Mapping[str, Any]

    def sides(self) -> dict[str, dict[str, Any]]:
        """As the sections of a configuration's `bits`."""
        return {"weight": dict(self.weight), "act": dict(self.act)}


def parse_label(label: str) -> Format:
    """ "w4a8" → 4 and 8 bits of integers; "nvfp4" → both sides; "wnvfp4_afp8" → one each, which may be a width as well.

    Raises:
        UserError: none of these, or a width that does not exist.
    """
    lower = label.lower()
    if lower in NAMED:
        return Format(_side(label, "weight", lower), _side(label, "activation", lower))
    match = _INTEGERS.match(lower) or _SIDES.match(lower)
    if not match:
        raise _no_format(label)
    return Format(_side(label, "weight", match[1]), _side(label, "activation", match[2]))


def _no_format(label: str) -> UserError:
    plain = re.sub(r"[\W_]", "", label.lower())
    spelled = {name.replace("_", ""): name for name in all_labels()}
    meant = [spelled[plain]] if plain in spelled else difflib.get_close_matches(plain, NAMED, n=2, cutoff=0.7)
    meant = meant or [spelled[each] for each in difflib.get_close_matches(plain, spelled, n=1, cutoff=0.8)]
    guess = f"; did you mean {' or '.join(meant)}?" if meant else ";"
    if plain in NO_FORMAT:
        guess = f"; both sides in float are w{FLOAT_BITS}a{FLOAT_BITS};"
    return UserError(
        f"no bits {label!r}{guess} known: w<bits>a<bits> such as w8a8, {', '.join(NAMED)}, one a side as in wnvfp4_afp8; "
        "`ditbench list bits` has all"
    )


def _side(label: str, side: str, name: str) -> dict[str, Any]:
    if name in NAMED:
        settings = NAMED[name]
        return settings if side == "weight" else {k: v for k, v in settings.items() if k != "block_rows"}
    if not name.isdigit():
        raise UserError(f"bits={label}: {side}s cannot be {name!r}; known: {', '.join(NAMED)}, or their bits")
    if int(name) not in (*WIDTHS, FLOAT_BITS):
        raise UserError(f"bits={label}: {side}s cannot have {name} bits; choose 2 to 8, or 16 for float")
    return {"bits": int(name), "number": INT}


def integer_labels() -> list[str]:
    widths = (*WIDTHS, FLOAT_BITS)
    return [f"w{weight}a{act}" for weight in widths for act in widths]


def all_labels() -> list[str]:
    """Every format that `bits=` takes."""
    names = [*NAMED, *WIDTHS, FLOAT_BITS]
    mixtures = [f"w{one}_a{other}" for one in names for other in names if one != other and {one, other} & set(NAMED)]
    return [*integer_labels(), *NAMED, *mixtures]


def needs_integers(who: str, *specs: QuantSpec | None) -> None:
    """Raise UserError if a side's codes are no integers with scales per tensor, channel, token or group, which `who` (a method,
    or what it learns) is about.
    """
    for spec in specs:
        if spec is None or (spec.number == INT and not spec.in_blocks):
            continue
        lacks = "has none" if spec.number != INT else "has scales per block, which it does not fit"
        raise UserError(
            f"{who} is about integer codes, and bits={spec.name.lower()} {lacks}; take integers such as w8a8, or another method"
        )


def bits_of(label: str) -> Bits:
    """A format in the default granularity: per channel, per token dynamic, symmetric."""
    weight, act = parse_label(label)
    return Bits(
        QuantSpec(**{"granularity": "per_channel", **weight}) if weight["bits"] < FLOAT_BITS else None,
        QuantSpec(**{"granularity": "per_token", "dynamic": True, **act}) if act["bits"] < FLOAT_BITS else None,
    )


def label_bits(label: str) -> tuple[float, float] | None:
    """Bits that a value takes on each side by the label, with its share of a block's scale (4.5 of NVFP4); None of a mix."""
    try:
        bits = bits_of(label)
    except UserError:
        return None
    weight, act = (float(FLOAT_BITS) if side is None else side.stored_bits for side in (bits.weight, bits.act))
    return weight, act
