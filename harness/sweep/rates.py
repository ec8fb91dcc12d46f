"""How fast this machine is with a model: from earlier records of it, else from a short probe here. A plan says which.

Earlier records of the same model on the same device give seconds per sample and step of each stage. Without them a small model
is drawn with for a moment, in float and rounded; of a large one single layers of its true shapes are computed, on few rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.common.devices import device_name, synchronize
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.generation.generate import conditions
from ditbench.harness.measurement.latency import kind_of
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.counts import Counts
from ditbench.harness.quant.spec import Bits, MixedBits
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.records.record import Record
from ditbench.harness.samples.conditions import PROMPTS
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.loaded import model_of

SMALL_BYTES, SMALL_MACS = (
    2**28,
    2e10,
)  # weights, and multiply-accumulates of a probe's step, of a model that is drawn with
FEW, MORE = 2, 4  # steps of the two drawings whose difference is the time of a step
MOST_ROWS = 64  # samples that are drawn side by side
ROWS = 256  # of a layer that is computed alone
WEIGHTS = 2**23  # of it, at most: so many of its outputs; FLUX.2's largest has 340 million
SHAPES = 2  # that are computed, those with most of the operations
BUSY_S = 1.0  # of one probe
BESIDE_LAYERS = 1.25  # a whole call against its products alone: norms, activations, residuals
ROUNDER = "rtn"  # of the probe: other methods compute the same products


@dataclass(frozen=True)
class Rates:
    """float_macs_s: by dtype. quantized_macs_s: of the run's format. build_s: to round and build a model once. init_elements_s:
    random weights drawn and checked. real: whether the format runs on a kernel here (False: simulated). source: in words.
    """

    float_macs_s: dict[str, float]
    quantized_macs_s: float
    build_s: float
    init_elements_s: float
    real: bool
    source: str


@dataclass
class Earlier:
    """Seconds of stages in earlier records of the model on this device, per unit of work; by stage and what else decides."""

    seconds: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def get(self, *key: Any) -> float | None:
        return self.seconds.get(key)

    def add(self, seconds: float | None, work: float, *key: Any) -> None:
        """The slowest stays: one that was cached took no time."""
        if seconds and work:
            self.seconds[key] = max(self.seconds.get(key, 0.0), seconds / work)


def earlier(config: RunConfig, records: Iterable[Record]) -> Earlier:
    found, device = Earlier(), device_name(config.device)
    for record in records:
        raw = record.config
        if record.status != "ok" or record.env.get("device") != device or raw.get("model") != config.raw["model"]:
            continue
        try:
            _add(found, record, raw)
        except (KeyError, TypeError):
            continue  # of a version that noted something else
    return found


def _add(found: Earlier, record: Record, raw: dict[str, Any]) -> None:
    n, steps, seconds = raw["protocol"]["n"], raw["protocol"]["steps"], record.timings_s
    what, dtype = (record.method, raw["bits"]["label"]), raw["generate"]["dtype"]
    found.add(seconds.get("reference"), n * steps, "float", raw["generate"]["reference_dtype"])
    found.add(record.cost.get("draw_s", seconds.get("generate")), n * steps, "generate", *what, dtype)
    found.add(record.cost.get("fit_s"), raw["calibration"]["n"] * steps, "fit", *what)
    found.add(seconds.get("evaluate"), n, "evaluate", tuple(raw["metrics"]["names"]))
    found.add(seconds.get("layer_errors"), 1, "layer_errors", *what, steps)
    measured = None if raw["measure"].get("compile") else seconds.get("measure")  # minutes of a compiler are no rate
    found.add(measured, raw["measure"]["repeats"] * raw["measure"]["samples"], "measure", *what)


def probed(config: RunConfig, skeleton: LoadedModel, counts: Counts) -> Rates:
    """Up to ten seconds of computing on the run's device."""
    bits = _dynamic(config.bits)
    asked = config.section("generate")["batch_size"]
    rows = min(asked if isinstance(asked, int) else MOST_ROWS, config.protocol.n)
    drawable = skeleton.adapter.CONDITION != PROMPTS or bool(config.protocol.prompts)
    small = sum(counts.part_bytes.values()) <= SMALL_BYTES and counts.step_macs <= SMALL_MACS
    if small and drawable:
        rows = max(1, min(rows, int(SMALL_MACS / counts.step_macs)))
        return _drawing(config, counts, bits, rows)
    return _layers(config, counts, bits)


def _drawing(config: RunConfig, counts: Counts, bits: Bits, rows: int) -> Rates:
    model, section = model_of(config.model), config.section("generate")
    wanted = conditions(model, rows, config.seed, config.protocol.labels, config.protocol.prompts)

    def drawn(transformer: nn.Module) -> float:
        def draw(steps: int) -> float:
            sampler = Sampler(config.protocol.sampler.kind, steps, config.protocol.sampler.guidance)
            return _seconds(lambda: model.adapter.sample(model.pipe, transformer, wanted, sampler), config.device)

        draw(FEW)  # warm
        few, more = draw(FEW), draw(MORE)
        per_step = max(more - few, more / MORE / 2) / (MORE - FEW)
        return rows * counts.step_macs / per_step

    def of_dtype(dtype: str) -> float:
        return drawn(float_copy(model.target(), dtype=getattr(torch, dtype), device=config.device))

    floats = {dtype: of_dtype(dtype) for dtype in _dtypes(config)}
    target = model.target(config.protocol.scope, config.protocol.skip).on(config.device)
    start = time.perf_counter()
    quantized = _rounded(config, target, bits)
    build_s = time.perf_counter() - start
    source = f"drawing {rows} samples for {FEW} and {MORE} steps here"
    real = kind_of(quantized, False) == "measured"
    return Rates(floats, drawn(quantized), build_s, _init_rate(config), real, f"{source}, {section['dtype']}")


def _layers(config: RunConfig, counts: Counts, bits: Bits) -> Rates:
    """Products of the shapes that have most of the operations."""
    most = sorted(counts.shapes, key=lambda shape: -counts.shapes[shape] * shape[0] * shape[1] * shape[2])[:SHAPES]
    largest = [(rows, inputs, min(outputs, max(1, WEIGHTS // inputs))) for rows, inputs, outputs in most]
    floats: dict[str, float] = {}
    macs = sum(min(rows, ROWS) * inputs * outputs for rows, inputs, outputs in largest)
    for dtype in _dtypes(config):
        seconds = 0.0
        for rows, inputs, outputs in largest:
            x, weight = (_noise(size, inputs, dtype, config.device) for size in (min(rows, ROWS), outputs))
            seconds += _best(lambda x=x, weight=weight: nn.functional.linear(x, weight), config.device)
        floats[dtype] = macs / seconds / BESIDE_LAYERS
    build_s = seconds = 0.0
    real = True
    for rows, inputs, outputs in largest:
        start = time.perf_counter()
        layer = _one_layer(config, bits, inputs, outputs)
        build_s += time.perf_counter() - start
        real = real and kind_of(layer, False) == "measured"
        x = _noise(min(rows, ROWS), inputs, config.section("generate")["dtype"], config.device)
        seconds += _best(lambda x=x, layer=layer: layer.layer(x), config.device)
    build_s *= sum(i * o * times for (_, i, o), times in counts.shapes.items()) / sum(i * o for _, i, o in largest)
    source = f"{len(largest)} layers of its shapes on {ROWS} rows here"
    return Rates(floats, macs / seconds / BESIDE_LAYERS, build_s, _init_rate(config), real, source)


def _rounded(config: RunConfig, target: Target, bits: Bits) -> nn.Module:
    method = registry.method(ROUNDER)
    recipe = method.apply(target, {}, bits, registry.params_of({"name": ROUNDER}))
    dtype = getattr(torch, config.section("generate")["dtype"])
    return build(target, recipe, dtype=dtype, device=config.device, backend=config.backend)


def _one_layer(config: RunConfig, bits: Bits, inputs: int, outputs: int) -> Any:
    linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu").requires_grad_(False)
    linear.weight.normal_(std=inputs**-0.5)
    linear.bias.zero_()
    target = Target(nn.ModuleDict({"layer": linear}), ("layer",), (Site("layer", ("layer",)),))
    return _Alone(_rounded(config, target.on(config.device), bits))


class _Alone(nn.Module):
    def __init__(self, built: nn.Module) -> None:
        super().__init__()
        self.layer = built["layer"]  # type: ignore[index]


def _dynamic(bits: Bits | MixedBits) -> Bits:
    """Static ranges need a calibration; of several formats the first stands for all."""
    one = bits.candidates[0] if isinstance(bits, MixedBits) else bits
    return Bits(one.weight, replace(one.act, dynamic=True) if one.act else None)


def _dtypes(config: RunConfig) -> list[str]:
    section = config.section("generate")
    of_run = [section["reference_dtype"], section["dtype"], config.model.dtype]
    return list(
        dict.fromkeys(["float32", "bfloat16", *of_run])
    )  # layers are observed in the first, latency is against the second


def _noise(rows: int, columns: int, dtype: str, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float32).to(device, getattr(torch, dtype))


def _init_rate(config: RunConfig) -> float:
    """Elements a second of what a random model does with its weights: drawn, and looked at for NaN. Files are read as fast or faster."""
    weight = torch.empty(2**22, dtype=getattr(torch, config.model.dtype))
    return len(weight) / _best(lambda: weight.uniform_().isfinite().all(), torch.device("cpu"))


@torch.no_grad()
def _best(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    _seconds(call, device)
    found = [_seconds(call, device)]
    while sum(found) < BUSY_S / 4 and len(found) < 5:
        found.append(_seconds(call, device))
    return min(found)


@torch.no_grad()
def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def readable(records: Callable[[], list[Record]]) -> list[Record]:
    """Records, or none where one is damaged: a plan can do without."""
    try:
        return records()
    except (UserError, OSError):
        return []
