"""Our formats against other libraries' quantizers, on tensors that ask for trouble: which codes and scales are equal.

    pip install torchao==0.18.0 comfy-kitchen==0.2.40
    python bench/format_oracles.py               # writes results/formats/oracles.csv, a row per format, rule and library
    python bench/docs_tables.py                  # then fills the table of docs/backends.md

A code counts as equal if its value is (a zero may have either sign), a scale if its float32 value is. Scales of blocks whose
values are all zero are not compared: whatever they are, nothing changes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.quant.block_scales import by_channel
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.spec import E5M2, FLOAT32, QuantSpec, bits_of

OUT = Path(__file__).resolve().parent.parent / "results" / "formats" / "oracles.csv"
FIELDS = ("format", "rule", "oracle", "tensors", "codes", "codes_differ", "scales", "scales_differ", "where")
TORCHAO, COMFY = "torchao", "comfy_kitchen"
ROWS, WIDTH = 48, 512
Rounded = tuple[Tensor, Tensor]  # what codes stand for (R, C), and the scale of each (R, C); float32


def tensors() -> dict[str, Tensor]:
    """{what it is: (R, C)}, float32 or bfloat16."""
    random = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(ROWS, WIDTH, generator=random)

    spread = torch.exp2(torch.randint(-20, 20, (ROWS, WIDTH // 16), generator=random).float()).repeat_interleave(16, 1)
    outlier, holes, lonely = normal(), normal(), torch.zeros(ROWS, WIDTH)
    outlier[3, 5] = 3e4
    holes[:, 128:256] = 0
    holes[5] = 0
    lonely[7, 300] = -2.5
    steps = torch.linspace(-6, 6, ROWS * WIDTH).reshape(ROWS, WIDTH)
    halves = (torch.randint(-24, 25, (ROWS, WIDTH), generator=random) / 4).float()
    halves[:, ::16] = 6.0  # so that scales are 1 and quarters lie between two codes
    return {
        "normal": normal(),
        "heavy tails": normal() * normal().exp().square(),
        "blocks of many sizes": normal() * spread,
        "one outlier": outlier,
        "blocks of zeros": holes,
        "one value": lonely,
        "zeros": torch.zeros(ROWS, WIDTH),
        "powers of two": torch.exp2(torch.randint(-12, 12, (ROWS, WIDTH), generator=random).float()),
        "ties": halves,
        "a ramp": steps,
        "tiny": normal() * 1e-20,
        "float32 subnormals": normal() * 1e-39,
        "bfloat16": normal().bfloat16(),
        "bfloat16 with an outlier": outlier.bfloat16(),
        "width 200": normal()[:, :200].contiguous(),
    }


@dataclass(frozen=True)
class Oracle:
    """Another library's rounding of a tensor whose width it takes. dtypes: of those that it is asked for."""

    library: str
    spec: QuantSpec
    rounded: Callable[[Tensor], Rounded]
    multiple: int = 1  # of widths, and of rows where blocks have several
    float32_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.library} {version(self.library)}"

    @property
    def format(self) -> str:
        spec = self.spec
        if spec.name.isdigit():
            return f"INT{spec.bits}_G{spec.group_size} with float32 scales"
        words = {
            "MXFP6": f" {spec.number}",
            "MXFP8": f" {spec.number}",
            "FP8_BLOCK": f" {spec.block_rows} × {spec.group_size}",
        }
        return spec.name + words.get(spec.name, "")


def ours(x: Tensor, spec: QuantSpec) -> Rounded:
    weight = quantize_weight(x, spec)
    scales = weight.scales()
    wide = by_channel(scales, x.shape[1], spec) if spec.in_blocks else scales.expand(-1, x.shape[1])
    return weight.values(), wide


def compare(oracle: Oracle, x: Tensor) -> tuple[int, int, int, int]:
    """(codes, of which differ, scales of blocks with a value, of which differ)."""
    x = x.float() if oracle.float32_only else x
    rows, width = x.shape
    lacking = (0, -width % oracle.multiple, 0, -rows % oracle.spec.block_rows)
    theirs = oracle.rounded(F.pad(x, lacking).contiguous())
    (code, scale), (their_code, their_scale) = ours(x, oracle.spec), (each[:rows, :width] for each in theirs)
    filled = by_block(x, oracle.spec)
    return code.numel(), int((code != their_code).sum()), int(filled.sum()), int((scale != their_scale)[filled].sum())


def by_block(x: Tensor, spec: QuantSpec) -> Tensor:
    """Where x is in a block with a value that is not zero; (R, C)."""
    size, rows = spec.group_size or x.shape[1], spec.block_rows
    padded = F.pad(x.float().abs(), (0, -x.shape[1] % size, 0, -len(x) % rows))
    largest = padded.unflatten(1, (-1, size)).unflatten(0, (-1, rows)).amax((1, 3))
    return (largest > 0).repeat_interleave(rows, 0).repeat_interleave(size, 1)[: len(x), : x.shape[1]]


def here() -> list[Oracle]:
    return [
        *(torchao_oracles() if find_spec(TORCHAO) else ()),
        *(comfy_oracles() if find_spec(COMFY) else ()),
    ]


def weight_of(label: str, **changed: object) -> QuantSpec:
    spec = bits_of(label).weight
    assert spec is not None
    return replace(spec, **changed)  # type: ignore[arg-type]


def torchao_oracles() -> list[Oracle]:
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.kernels import (
        f4_unpacked_to_f32,
        f6_e2m3_unpacked_to_f32,
        f6_e3m2_unpacked_to_f32,
        unpack_uint4,
    )
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

    def nvfp4(x: Tensor) -> Rounded:
        tensor = per_tensor_amax_to_scale(x.abs().max())
        scales, packed = nvfp4_quantize(x, per_tensor_scale=torch.where(tensor == 0, 1.0, tensor))
        return f4_unpacked_to_f32(unpack_uint4(packed)), (scales.float() * tensor).repeat_interleave(16, 1)

    def mx(elements: object, decode: Callable[[Tensor], Tensor], rule: str) -> Callable[[Tensor], Rounded]:
        def rounded(x: Tensor) -> Rounded:
            scales, data = to_mx(x, elements, 32, ScaleCalculationMode[rule.upper()])
            return decode(data).reshape(x.shape), scales.float().repeat_interleave(32, 1)

        return rounded

    def float8(block: tuple[int, int] | None) -> Callable[[Tensor], Rounded]:
        def rounded(x: Tensor) -> Rounded:
            size = list(block or (1, x.shape[1]))
            scales = _choose_scale_float8(x, size)
            scales = torch.where(scales == 0, 1.0, scales)
            wide = scales.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
            return _quantize_affine_float8(x, wide, torch.float8_e4m3fn).float(), wide

        return rounded

    elements = {
        "mxfp4": (torch.float4_e2m1fn_x2, lambda data: f4_unpacked_to_f32(unpack_uint4(data)), {}),
        "mxfp6": (DTYPE_FP6_E3M2, f6_e3m2_unpacked_to_f32, {}),
        "mxfp6 ": (DTYPE_FP6_E2M3, f6_e2m3_unpacked_to_f32, {"number": "e2m3"}),
        "mxfp8": (torch.float8_e4m3fn, Tensor.float, {}),
        "mxfp8 ": (torch.float8_e5m2, Tensor.float, {"number": E5M2}),
    }
    found = [Oracle(TORCHAO, weight_of("nvfp4", rule="reciprocal"), nvfp4, 16)]
    for label, (kind, decode, changed) in elements.items():
        for rule in ("rceil", "floor", "ceil", "even"):
            spec = weight_of(label.strip(), rule=rule, **changed)
            found.append(Oracle(TORCHAO, spec, mx(kind, decode, rule), 32))
    for spec, block in (
        (weight_of("fp8"), None),
        (weight_of("fp8_block"), (128, 128)),
        (weight_of("fp8_block", block_rows=1), (1, 128)),
    ):
        found.append(Oracle(TORCHAO, spec, float8(block), 1 if block is None else 128, float32_only=True))
    return found


def comfy_oracles() -> list[Oracle]:
    from comfy_kitchen.backends.eager import quantization, svdquant
    from comfy_kitchen.float_utils import e8m0_to_f32, from_blocked

    def nvfp4(x: Tensor) -> Rounded:
        tensor = x.abs().max().float() / (448 * 6)
        tensor = torch.where(tensor == 0, 1.0, tensor)
        packed, scales = quantization.quantize_nvfp4(x, tensor)
        levels = quantization.E2M1_LUT[:, 0]
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten(1)
        rows = from_blocked(scales, num_rows=len(x), num_cols=x.shape[1] // 16)
        return levels[codes.long()], (tensor * rows.float()).repeat_interleave(16, 1)

    def mxfp8(x: Tensor) -> Rounded:
        data, scales = quantization.quantize_mxfp8(x)
        rows = from_blocked(scales.view(torch.uint8), num_rows=len(x), num_cols=x.shape[1] // 32)
        return data.float(), e8m0_to_f32(rows).repeat_interleave(32, 1)

    def int4(x: Tensor) -> Rounded:
        ones, nothing = torch.ones(x.shape[1], dtype=x.dtype), torch.zeros(x.shape[1], 1, dtype=x.dtype)
        packed, scales, _ = svdquant.quantize_svdquant_w4a4(x, ones, nothing, pad_size=1)
        return svdquant._unpack_int4_row_major(packed).float(), scales.T.float().repeat_interleave(64, 1)

    return [
        Oracle(COMFY, weight_of("nvfp4"), nvfp4, 16),
        Oracle(COMFY, weight_of("mxfp8"), mxfp8, 32),
        Oracle(COMFY, weight_of("int4_g64", scale=FLOAT32), int4, 64, float32_only=True),
    ]


def row(oracle: Oracle, cases: dict[str, Tensor]) -> dict[str, object]:
    found = {name: compare(oracle, x) for name, x in cases.items()}
    codes, codes_differ, scales, scales_differ = (sum(each) for each in zip(*found.values(), strict=True))
    where = [name for name, (_, codes, _, scales) in found.items() if codes or scales]
    spec = oracle.spec
    values = (
        oracle.format,
        spec.scale_rule or "–",
        oracle.name,
        len(found),
        codes,
        codes_differ,
        scales,
        scales_differ,
    )
    return dict(zip(FIELDS, (*values, ", ".join(where)), strict=True))


def main() -> None:
    cases = tensors()
    rows = [row(oracle, cases) for oracle in here()]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for each in rows:
        print(*each.values(), sep="  ")


if __name__ == "__main__":
    main()
