"""What one run will take, stage by stage: operations from shapes, seconds from rates, bytes from sizes. Arithmetic only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log2, prod
from pathlib import Path

import torch

from ditbench.eval.base import known_metrics
from ditbench.harness.backends.base import AUTO
from ditbench.harness.build.offload import OFFLOAD, ROOM
from ditbench.harness.calibration import recording
from ditbench.harness.common.devices import CPU
from ditbench.harness.common.memory import free_memory
from ditbench.harness.fitting import registry
from ditbench.harness.measurement.layer_errors import MAX_STEPS, ROWS
from ditbench.harness.models import batch_sizes
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.counts import Counts, bytes_of
from ditbench.harness.models.transformer_only import TransformerOnly
from ditbench.harness.quant.experts import Experts
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.sweep import kept
from ditbench.harness.sweep.rates import Earlier, Rates

BLOCK = 4096  # bytes that a file takes at least
DISK_BYTES_S = 1e9  # at which weights are read; not measured
OBSERVING = 1.5  # a pass that observes channels, against one that only computes
NO_STATISTICS = (registry.FLOAT, "rtn")  # of the others what they learn beside one pass over the recording is not known
SIMULATED_BYTES, KERNEL_BYTES = 4, 1  # of a weight of a quantized model on the CPU: codes as they are multiplied


MOST = {"calibration": recording.MOST, "generate": batch_sizes.MOST}


def batch_size(config: RunConfig, counts: Counts, section: str, n: int) -> int:
    """Samples side by side. Where the configuration leaves that to tokens and memory, as tokens have it: memory may leave less."""
    asked = config.section(section)["batch_size"]
    return min(n, asked if isinstance(asked, int) else batch_sizes.by_tokens(tokens_of(counts), MOST[section]))


def tokens_of(counts: Counts) -> int:
    """Of one row, in the transformer."""
    return max((rows for rows, _, _ in counts.shapes), default=1)


@dataclass
class Stage:
    """state: "" (to do), cached, shared (with an earlier run of the plan), or ? (unknown). at_least: more is known to come."""

    name: str
    state: str = ""
    macs: float = 0.0
    seconds: float | None = 0.0
    disk_bytes: float = 0.0
    host_bytes: float = 0.0
    device_bytes: float = 0.0
    at_least: bool = False


@dataclass
class RunPlan:
    title: str
    run_id: str
    recorded: Path | None
    stages: list[Stage] = field(default_factory=list)
    accelerated: dict[str, tuple[float, float]] = field(default_factory=dict)  # {memory=…: host, device}
    source: str = ""
    unknown: list[str] = field(default_factory=list)

    def total(self, of: Callable[[Stage], float | None]) -> float:
        return sum(of(stage) or 0.0 for stage in self.stages)

    def most(self, of: Callable[[Stage], float]) -> float:
        return max((of(stage) for stage in self.stages), default=0.0)


@dataclass(frozen=True)
class Estimate:
    """base_bytes: what the process holds before anything is loaded. accelerated: what computes is held by the device."""

    config: RunConfig
    model: LoadedModel  # a skeleton
    counts: Counts
    rates: Rates
    earlier: Earlier
    base_bytes: float
    accelerated: bool

    def stages(self, made: set[Path]) -> list[Stage]:
        """made: artifacts that earlier runs of the plan will have made; those of this run are added."""
        ours = self.config.method != registry.EXTERNAL
        found = [self._load(), *((self._calibrate(made), self._quantize()) if ours else ())]
        found += [
            self._generate(made),
            self._reference(made),
            self._evaluate(),
            *self._noise_floor(made),
            *self._measure(),
        ]
        return [*found, *(self._layer_errors() if ours else ())]

    # stages

    def _load(self) -> Stage:
        held = sum(self.counts.part_bytes.values())
        elements = held / getattr(torch, self.config.model.dtype).itemsize
        random = self.config.model.random is not None
        seconds = elements / self.rates.init_elements_s if random else held / DISK_BYTES_S
        return Stage("load", seconds=seconds, host_bytes=self.base_bytes + held)

    def _calibrate(self, made: set[Path]) -> Stage:
        place = kept.recording_at(self.config, self.model)
        n = max(self.config.section("calibration")["n"], recording.MEASURED)
        prompts = len(self.config.calibration_prompts)
        macs = self._drawn_macs(n, min(n, prompts or n), decode=False)
        rows = n * self._steps * self.counts.rows
        stage = Stage("calibrate", self._state(place, made), macs, disk_bytes=rows * self.counts.input_bytes)
        dtype = self.config.model.dtype
        stage.seconds = macs / self.rates.float_macs_s[dtype]
        batch = batch_size(self.config, self.counts, "calibration", n)
        self._hold(stage, self._weights(dtype), self._activations(batch, dtype))
        return self._unless_there(stage)

    def _quantize(self) -> Stage:
        """Rounding and building, and for methods with statistics one pass over the recording."""
        n = self.config.section("calibration")["n"]
        learns = self.config.method not in NO_STATISTICS
        passes = 2 if isinstance(self.model.transformer, Experts) else 1  # the second is calibrated behind the first
        macs = passes * n * self._steps * self.counts.step_macs if learns else 0.0
        known = self.earlier.get("fit", *self._what)
        seconds = self.rates.build_s + OBSERVING * macs / self.rates.float_macs_s["float32"]
        if known is not None:
            seconds = max(
                0.0,
                known * n * self._steps - n * self._steps * self.counts.step_macs / self.rates.float_macs_s["float32"],
            )
        stage = Stage("quantize", "" if known or not learns else "?", macs, seconds, at_least=learns and known is None)
        observed = sum(inputs * times for (_, inputs, _), times in self.counts.shapes.items())
        stage.disk_bytes = 12.0 * observed * self._steps if learns else 0.0
        rows = min(n * self.counts.rows, self._rows_at_once) if learns else 0
        activations = self._activations(rows, self.config.model.dtype) / self.counts.rows
        self._hold(stage, self._quantized_bytes + (self._weights("float32") if learns else 0), activations)
        return stage

    def _generate(self, made: set[Path]) -> Stage:
        n, dtype = self.config.protocol.n, self.config.section("generate")["dtype"]
        place = kept.samples_at(self.config, self.model)
        share = 1.0 if place is None else kept.missing_share(place)
        macs = share * self._drawn_macs(n, self._prompts)
        stage = Stage("generate", self._state(place, made), macs, disk_bytes=share * n * self.sample_bytes)
        known = self.earlier.get("generate", *self._what, dtype)
        stage.seconds = macs / self.rates.quantized_macs_s if known is None else share * known * n * self._steps
        self._hold(stage, self._quantized_bytes, self._activations(self._batch, dtype, quantized=True))
        return self._unless_there(stage)

    def _reference(self, made: set[Path]) -> Stage:
        dtype = self.config.section("generate")["reference_dtype"]
        return self._float_set("reference", self.config.seed, dtype, made)

    def _evaluate(self) -> Stage:
        names = self.config.section("metrics")["names"]
        known = self.earlier.get("evaluate", tuple(names))
        seconds = None if known is None else known * self.config.protocol.n
        return Stage("evaluate", "" if known else "?", seconds=seconds, host_bytes=self.base_bytes)

    def _noise_floor(self, made: set[Path]) -> list[Stage]:
        names = self.config.section("metrics")["names"]
        if all(known_metrics()[name].paired for name in names):
            return []
        dtype = self.config.section("generate")["dtype"]
        sets = [self._float_set("noise floor", seed, dtype, made) for seed in kept.noise_seeds(self.config)]
        if not sets:
            return []
        states = {each.state for each in sets}
        total = Stage("noise floor", states.pop() if len(states) == 1 else "")
        for each in sets:
            total.macs += each.macs
            total.seconds = (total.seconds or 0) + (each.seconds or 0)
            total.disk_bytes += each.disk_bytes
            total.host_bytes, total.device_bytes = each.host_bytes, each.device_bytes
        return [total]

    def _measure(self) -> list[Stage]:
        section = self.config.section("measure")
        if not self.rates.real:
            return []  # what is simulated is not timed
        rows, calls = 2 * section["samples"], section["repeats"] + section["warmup"] + 2
        macs = rows * calls * self.counts.call_macs
        each = (1 / self.rates.quantized_macs_s, 1 / self.rates.float_macs_s["bfloat16"])
        pairs = (
            2 if section["compile"] else 1
        )  # eager, and compiled beside it; what compiling itself takes nobody knows
        stage = Stage("measure", "", 2 * pairs * macs, pairs * macs * sum(each))
        known = self.earlier.get("measure", *self._what)
        stage.seconds = stage.seconds if known is None else known * pairs * section["repeats"] * section["samples"]
        self._hold(
            stage,
            self._quantized_bytes + self._weights("bfloat16"),
            self._activations(rows, "bfloat16") / self.counts.rows,
        )
        return [stage]

    def _layer_errors(self) -> list[Stage]:
        if not self.config.section("measure")["layer_errors"] or self.config.method == registry.FLOAT:
            return []
        rows = min(ROWS, max(self.config.section("calibration")["n"], recording.MEASURED) * self.counts.rows)
        at_once = min(rows, self._rows_at_once)
        macs = min(MAX_STEPS, self._steps) * rows * self.counts.call_macs
        seconds = macs * (1 / self.rates.float_macs_s["float32"] + 2 / self.rates.quantized_macs_s) + self.rates.build_s
        known = self.earlier.get("layer_errors", *self._what, self._steps)
        stage = Stage("layer errors", "", 3 * macs, seconds if known is None else known)
        held = self._quantized_bytes + self._weights("float32")
        self._hold(stage, held, self._activations(at_once, "float32", quantized=True) / self.counts.rows)
        return [stage]

    # what stages share

    @property
    def _steps(self) -> int:
        return self.config.protocol.sampler.steps

    @property
    def _rows_at_once(self) -> int:
        return batch_sizes.rows_by_tokens(tokens_of(self.counts), recording.MOST_ROWS)

    @property
    def _what(self) -> tuple[str, str]:
        return self.config.method, self.config.raw["bits"]["label"]

    @property
    def _prompts(self) -> int:
        """Distinct ones, of which each is encoded once."""
        return min(self.config.protocol.n, len(self.config.protocol.prompts) or self.config.protocol.n)

    @property
    def _batch(self) -> int:
        return batch_size(self.config, self.counts, "generate", self.config.protocol.n)

    @property
    def sample_bytes(self) -> float:
        """On disk. Photographs take 1.8 bytes a pixel at 64², 1.44 at 256², 1.22 at 512², camera moves over them 0.26 of raw frames
        (scikit-learn's two photographs, scaled and cropped).
        """
        shape = self.counts.pixels
        if shape is None:
            return 0.0
        height, width = shape[-2:]
        pixels = prod(shape)
        if len(shape) == 3:
            size = pixels * 3 * 0.26
        elif isinstance(self.model.pipe, TransformerOnly) or self.config.model.random is None:
            per_pixel = max(0.95, 1.47 - 0.25 * log2((height * width) ** 0.5 / 256))
            size = pixels * (per_pixel if height * width >= 64**2 else 3.0)
        else:
            size = pixels * 3.1  # what random weights draw is noise
        return max(1, -(-size // BLOCK)) * BLOCK

    def _float_set(self, name: str, seed: int, dtype: str, made: set[Path]) -> Stage:
        n = self.config.protocol.n
        place = kept.float_samples_at(self.config, self.model, seed, dtype)
        stage = Stage(
            name, self._state(place, made), self._drawn_macs(n, self._prompts), disk_bytes=n * self.sample_bytes
        )
        known = self.earlier.get("float", dtype)
        stage.seconds = stage.macs / self.rates.float_macs_s[dtype] if known is None else known * n * self._steps
        self._hold(stage, self._weights(dtype), self._activations(self._batch, dtype))
        return self._unless_there(stage)

    def _drawn_macs(self, n: int, prompts: int, decode: bool = True) -> float:
        of_one = self._steps * self.counts.step_macs + (self.counts.decode_macs if decode else 0)
        return n * of_one + prompts * self.counts.text_macs

    @staticmethod
    def _state(place: Path | None, made: set[Path]) -> str:
        if place is None:
            return "?"
        if kept.is_there(place):
            return "cached"
        if place in made:
            return "shared"
        made.add(place)
        return ""

    @staticmethod
    def _unless_there(stage: Stage) -> Stage:
        if stage.state in ("cached", "shared"):
            stage.macs = stage.seconds = stage.disk_bytes = 0.0
        return stage

    def _weights(self, dtype: str) -> float:
        """Of a copy of the transformer."""
        return self.counts.weights / getattr(torch, self.config.model.dtype).itemsize * getattr(torch, dtype).itemsize

    @property
    def _quantized_bytes(self) -> float:
        elements = self.counts.weights / getattr(torch, self.config.model.dtype).itemsize
        if self.accelerated:
            return elements * 2  # simulation keeps codes in bfloat16, kernels in less
        return elements * (KERNEL_BYTES if self.rates.real else SIMULATED_BYTES)

    def _offloads(self, weights: float) -> bool:
        """Whether blocks lie on the host, as `build/offload.py` chooses."""
        if self.config.memory == AUTO and self.config.device != CPU:
            free = free_memory(self.config.device)
            return free is not None and weights > ROOM * free
        return self.config.memory == OFFLOAD

    @property
    def _resident_share(self) -> float:
        """Of the transformer's weights, what is on the device beside all blocks' absence: the rest, and the largest block."""
        transformer = self.model.transformer
        blocks = [bytes_of(transformer.get_submodule(name)) for name in self.model.adapter.blocks(transformer)]
        return 1 - (sum(blocks) - max(blocks, default=0)) / self.counts.weights

    def _activations(self, samples: int, dtype: str, quantized: bool = False) -> float:
        """Of a batch in the transformer, or in the VAE, whichever is more."""
        scale = getattr(torch, dtype).itemsize / getattr(torch, self.config.model.dtype).itemsize
        rows = samples * self.counts.rows
        inside = rows * self.counts.call_bytes * scale
        inside += 8.0 * rows * self.counts.layer_elements if quantized else 0.0  # codes and sums in float32
        return max(inside, samples * self.counts.decode_bytes)

    def _hold(self, stage: Stage, weights: float, activations: float) -> None:
        """The pipeline as it was loaded is held by the host, what computes by the device."""
        loaded = self.base_bytes + sum(self.counts.part_bytes.values())
        if not self.accelerated:
            stage.host_bytes = loaded + weights + activations
        elif self._offloads(weights):  # a block is a guest on the device, the copy it belongs to lies on the host
            stage.host_bytes, stage.device_bytes = loaded + weights, weights * self._resident_share + activations
        else:
            encoders = max((held for name, held in self.counts.part_bytes.items() if name != "transformer"), default=0)
            stage.host_bytes, stage.device_bytes = loaded, max(weights + activations, encoders)
