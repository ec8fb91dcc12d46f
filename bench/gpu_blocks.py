"""Blocks of FLUX and PixArt with random weights at 4,096 tokens: bf16 against every backend that runs here, in one process.

    python bench/gpu_blocks.py --out FOLDER            # on a CUDA device
    python bench/gpu_blocks.py --out FOLDER --dry      # tiny, on the CPU, in Triton's interpreter: shows that it runs, times nothing

Writes gpu_blocks.json and gpu_blocks.md, after each candidate and each roofline. Every candidate of a block is called in turn, so that all
see the same clocks; a time is the median over `--repeats` rounds. Until all are made, each has times of its own turns with bf16. Compiling
takes most of the time: what the block's share of `--limit` seconds does not suffice for is named, the rest is timed. Each is called
eagerly, compiled, and as a CUDA graph of its eager call: what the device takes, without Python between the launches. The roofline is what one
product of the block's largest layer, and one copy, reach.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditbench.harness.backends import between, cuda_fp8, cuda_int8, cuda_w4a4_on_int8, cuda_w4a8, cuda_w4a16
from ditbench.harness.build.fusion import fuse
from ditbench.harness.build.graphs import captured
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.shared_inputs import share_inputs
from ditbench.harness.common.devices import device_name
from ditbench.harness.measurement.latency import resident_bytes
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import bits_of
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.transforms import Hadamard, Transform


@dataclass(frozen=True)
class Shape:
    """One transformer block; hidden: width of the feed-forward."""

    width: int
    heads: int
    hidden: int
    tokens: int


SHAPES = {"pixart": Shape(1152, 16, 4608, 4096), "flux": Shape(3072, 24, 12288, 4096)}
SOON = 5  # repeats of a candidate's own turns with bf16
DRY_SHAPES = {"tiny": Shape(32, 2, 64, 8)}

FORMATS = {  # name: (backend, format, Hadamard before every layer)
    "W8A8": (cuda_int8, "w8a8", False),
    "FP8": (cuda_fp8, "fp8", False),
    "W4A8": (cuda_w4a8, "w4a8", False),
    "W4A16": (cuda_w4a16, "w4a16", False),
    "W8A8 rotated": (cuda_int8, "w8a8", True),
    "FP8 rotated": (cuda_fp8, "fp8", True),
    "W4A8 rotated": (cuda_w4a8, "w4a8", True),
    "W4A4 rotated (int8 cores)": (cuda_w4a4_on_int8, "w4a4", True),
}


class Block(nn.Module):
    """Self-attention and a feed-forward with residuals; the linear layers are those of the block named, attention is torch's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(shape.width, shape.width) for _ in range(4))
        self.up, self.down = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y = F.layer_norm(x_BTC, x_BTC.shape[-1:])
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        x_BTC = x_BTC + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x_BTC, x_BTC.shape[-1:])
        return x_BTC + self.down(F.gelu(self.up(y), approximate="tanh"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all candidates to be made")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *DRY_SHAPES])
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU; no times")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry shows on the CPU that this runs")
    device = torch.device("cpu" if options.dry else "cuda")
    torch._dynamo.config.recompile_limit = 64  # every candidate compiles the same forward anew; 8 would stop the ninth
    if options.dry:
        for backend in {entry[0] for entry in FORMATS.values()}:
            backend.unsupported = lambda recipe, device: None
        between.found["cpu"] = between.InTriton()
    options.out.mkdir(parents=True, exist_ok=True)

    found: dict[str, Any] = {
        "device": "dry run, nothing timed" if options.dry else device_name(device),
        "torch": torch.__version__,
        "repeats": options.repeats,
        "blocks": {},
        "roofline": {},
    }
    known = DRY_SHAPES if options.dry else SHAPES
    names, ends_s = options.shapes or list(known), time.monotonic() + options.limit
    for index, name in enumerate(names):
        rows = found["blocks"][name] = {}
        share_s = (ends_s - time.monotonic()) / (len(names) - index)
        for _ in block_times(rows, known[name], device, options.repeats, share_s, timed=not options.dry):
            write(found, options.out)
        if not options.dry:
            found["roofline"][name] = roofline(known[name], device)
            write(found, options.out)
    print(table(found))


def write(found: dict[str, Any], out: Path) -> None:
    """What is done is kept, whatever becomes of the rest."""
    (out / "gpu_blocks.json").write_text(json.dumps(found, indent=1))
    (out / "gpu_blocks.md").write_text(table(found))


@torch.no_grad()
def block_times(
    found: dict[str, dict[str, Any]], shape: Shape, device: torch.device, repeats: int, limit_s: float, *, timed: bool
) -> Iterator[None]:
    """found: gets {candidate: eager_ms, graph_ms, compiled_ms, bytes of its linear layers, error against bf16 (RMS, relative)}, or what failed;
    one candidate at a time, and at last the times of all of them in turns.
    """
    torch.manual_seed(0)
    block = Block(shape).to(device, torch.bfloat16).eval()
    x = torch.randn(1, shape.tokens, shape.width, dtype=torch.bfloat16).to(device)
    makers: dict[str, Callable[[], nn.Module]] = {"bf16": lambda: block}
    for name, entry in FORMATS.items():
        makers[name] = lambda entry=entry: fused(block, *entry, device)
    makers |= torchao_makers(block) if device.type == "cuda" else {}

    expected, started_s = block(x).float(), time.monotonic()
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, make in makers.items():
        if time.monotonic() - started_s > limit_s:
            found[name] = {"failure": f"not reached in {limit_s:g} s"}
            continue
        try:
            candidate = make()
            error = candidate(x).float() - expected
        except Exception as failure:  # one candidate that cannot run must not cost the others their numbers
            found[name] = {"failure": short(failure)}
            continue
        found[name] = {
            "linear_bytes": resident_bytes(candidate),
            "relative_rms_error": float(error.square().mean().sqrt() / (expected - x.float()).square().mean().sqrt()),
        }
        if timed:
            calls[name, "eager_ms"] = eager = lambda candidate=candidate: candidate(x)
            try:
                calls[name, "graph_ms"] = captured(eager, device)[0].replay
            except Exception as failure:
                found[name]["no_graph"] = short(failure)
        try:
            engine = "inductor" if timed else "aot_eager"
            compiled = torch.compile(candidate, fullgraph=True, dynamic=False, backend=engine)
            compiled(x)
        except Exception as failure:
            found[name]["not_compiled"] = short(failure)
        else:
            if timed:
                calls[name, "compiled_ms"] = lambda compiled=compiled: compiled(x)
        keep(found, interleaved({key: call for key, call in calls.items() if key[0] in ("bf16", name)}, SOON))
        yield
    keep(found, interleaved(calls, repeats))
    yield


def keep(found: dict[str, dict[str, Any]], times: dict[tuple[str, str], float]) -> None:
    for (name, kind), median in times.items():
        found[name][kind] = median


def short(failure: Exception) -> str:
    return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')[:200]}"


def quantized(linear: nn.Linear, backend: Any, label: str, rotated: bool, clock: StepClock, device: torch.device):
    """The layer in this format, rounded to nearest."""
    bits = bits_of(label)
    transform = Transform(rotations=(Hadamard(linear.in_features),) if rotated else ())
    weight_OC = transform.of_weight(linear.weight.detach().double().cpu())
    assert bits.weight is not None
    recipe = LayerRecipe(
        transform, quantize_weight(weight_OC, bits.weight), None if bits.act is None else ActQuant(bits.act)
    )
    effective = EffectiveLinear(weight_OC, StepTable.constant(linear.bias.detach().cpu().double()))
    return QuantLinear(
        recipe,
        effective,
        folded=False,
        clock=clock,
        dtype=torch.bfloat16,
        device=device,
        backend=backend.NAME,
    ).to(device)


def fused(block: Block, backend: Any, label: str, rotated: bool, device: torch.device) -> Block:
    """A quantized copy, with what a quantized model has around its layers: run eagerly, its norm hands over codes to q, k and v."""
    clock = StepClock(None).to(device)  # of all: layers share what they made at the same step of the same clock
    made = replaced(block, lambda linear: quantized(linear, backend, label, rotated, clock, device))
    share_inputs(made)
    model = nn.Module()
    model.blocks = nn.ModuleList([made])
    fuse(model, device, torch.bfloat16)
    return made


def replaced(block: Block, make: Callable[[nn.Linear], nn.Module]) -> Block:
    """A copy of the block with every linear layer made anew."""
    copy = Block.__new__(Block)
    nn.Module.__init__(copy)
    copy.heads = block.heads
    for name, linear in block.named_children():
        copy.add_module(name, make(linear))
    return copy.eval()


def torchao_makers(block: Block) -> dict[str, Callable[[], nn.Module]]:
    """torchao's dynamic W8A8 in int8 and FP8, where it is installed; a second opinion."""
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except Exception as failure:  # not there, or not for this torch
        print(f"without torchao: {failure}", file=sys.stderr)
        return {}

    def make(config: Any) -> nn.Module:
        twin = replaced(block, lambda linear: nn.Linear(linear.in_features, linear.out_features))
        twin.to(next(block.parameters()).device, torch.bfloat16).load_state_dict(block.state_dict())
        quantize_(twin, config)
        return twin

    return {
        "torchao int8": lambda: make(Int8DynamicActivationInt8WeightConfig()),
        "torchao FP8": lambda: make(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
    }


def interleaved(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median milliseconds of each, called in turn on the current CUDA stream."""
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times[key].append(start.elapsed_time(end))
    return {key: statistics.median(values) for key, values in times.items()}


@torch.no_grad()
def roofline(shape: Shape, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of one product (tokens × width × hidden) and GB/s of one copy, as measured on random data."""
    from ditbench.harness.backends.triton_kernels import launch

    m, c, o = shape.tokens, shape.width, shape.hidden
    x_MC, weight_OC = torch.randn(m, c, device=device).bfloat16(), torch.randn(o, c, device=device).bfloat16()
    codes_MC, codes_OC = (torch.randint(-127, 128, t.shape, device=device, dtype=torch.int8) for t in (x_MC, weight_OC))
    nibbles = torch.randint(0, 256, (o, c // 2), device=device, dtype=torch.uint8)
    scale_M, zero_M = torch.ones(m, device=device), torch.zeros(m, device=device, dtype=torch.int32)
    scale_O1 = torch.ones(o, 1, device=device)
    outer = (None, None, None, torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {
        "bf16 product (torch)": lambda: x_MC @ weight_OC.T,
        "int8 product (torch._int_mm)": lambda: torch._int_mm(codes_MC, codes_OC.T),
        "int8 product (ours)": lambda: launch.int_product(
            codes_MC, scale_M, zero_M, codes_OC, scale_O1, None, None, 0, *outer
        ),
        "4-bit × int8 product (ours)": lambda: launch.int_product(
            codes_MC, scale_M, zero_M, nibbles, scale_O1, None, None, 7, *outer
        ),
        "rows to int8 (ours)": lambda: launch.quantize_rows(
            x_MC, *[None] * 3, [], None, None, 1.0, -127, 127, False, False
        ),
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        x8_MC, weight8_OC = x_MC.to(torch.float8_e4m3fn), weight_OC.to(torch.float8_e4m3fn)
        calls["FP8 product (torch._scaled_mm)"] = lambda: torch._scaled_mm(
            x8_MC, weight8_OC.t(), scale_M[:, None], scale_O1.t(), out_dtype=torch.bfloat16
        )
    source = torch.empty(2**28, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    found: dict[str, Any] = {}
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as failure:
            found[name] = {"failure": short(failure)}
            del calls[name]
    times = interleaved(calls, repeats=20)
    for name, ms in times.items():
        found[name] = {"ms": ms}
        if "product" in name:
            found[name]["TFLOP/s"] = 2 * m * c * o / ms / 1e9
    for name, moved in (("copy", 2 * source.nbytes), ("rows to int8 (ours)", 3 * m * c)):
        if name in times:
            found[name]["GB/s (read and written)"] = moved / times[name] / 1e6
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown. Speed-ups are against bf16 of the same kind: eager, a graph or compiled."""
    lines = [f"{found['device']}, torch {found['torch']}, medians of {found['repeats']} interleaved calls", ""]
    for shape, rows in found["blocks"].items():
        lines += [
            f"| {shape} block | eager ms | × | graph ms | × | compiled ms | × | weights MB | × smaller | error |",
            "|---|" + "--:|" * 9,
        ]
        base = rows["bf16"]
        for name, row in rows.items():
            if "failure" in row:
                lines.append(f"| {name} | {row['failure']} |" + " |" * 8)
                continue
            cells = [name]
            for kind in ("eager_ms", "graph_ms", "compiled_ms"):
                cells.append(f"{row[kind]:.3f}" if kind in row else "–")
                cells.append(f"{base[kind] / row[kind]:.2f}" if kind in row and kind in base else "–")
            size = row["linear_bytes"]
            smaller = f"{base['linear_bytes'] / size:.2f}" if "linear_bytes" in base else "–"
            cells += [f"{size / 1e6:.1f}", smaller, f"{row['relative_rms_error']:.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            "",
            *(f"{name}, compiled: {row['not_compiled']}" for name, row in rows.items() if "not_compiled" in row),
            *(f"{name}, as a graph: {row['no_graph']}" for name, row in rows.items() if "no_graph" in row),
        ]
    for shape, rows in found["roofline"].items():
        lines += [f"| {shape}: one product, one copy | ms | reached |", "|---|--:|--:|"]
        for name, row in rows.items():
            if "failure" in row:
                lines.append(f"| {name} | {row['failure']} | |")
                continue
            reached = next((f"{value:.0f} {unit}" for unit, value in row.items() if unit != "ms"), "–")
            lines.append(f"| {name} | {row['ms']:.4f} | {reached} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
