"""The error atlas: how far each quantized layer, and each block, is from float, at each denoising step.

A layer is judged alone, on what it would read if everything before it were float (the recipe without rounding, so that
folded transforms are in place on both sides). A block is judged with all the rounding before it.

One call of the recording is in hand at a time. The float blocks' outputs wait for the quantized ones of the same call, on disk
where they take more than `HELD_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditbench.harness.backends.base import AUTO
from ditbench.harness.build.build import build, clock_of, quant_layers
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.calibration.block_stream import HELD_BYTES
from ditbench.harness.calibration.on_disk import Spool, StoredTensor
from ditbench.harness.calibration.recording import Calibration, spread
from ditbench.harness.common.devices import float64_device, in_float64
from ditbench.harness.common.files import atomic_path
from ditbench.harness.quant.blocks import tokens_of
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target

MAX_STEPS = 20  # spread over the trajectory
ROWS = 16  # of each step's recorded calls, spread as well


@dataclass(frozen=True)
class ErrorAtlas:
    """signal_LS, noise_LS: sums of y² and (y − ŷ)² of each output at each step looked at, float64; L counts `names`."""

    names: tuple[str, ...]  # quantized layers, then blocks
    steps: tuple[int, ...]
    signal_LS: np.ndarray
    noise_LS: np.ndarray

    @property
    def sqnr_db_LS(self) -> np.ndarray:
        """10 log10(Σ y² / Σ (y − ŷ)²); NaN where there is no error or no signal."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where((self.noise_LS > 0) & (self.signal_LS > 0), self.signal_LS / self.noise_LS, np.nan)
            return 10 * np.log10(ratio)

    def pooled_db(self, name: str) -> float | None:
        """The SQNR of one output over all steps."""
        row = self.names.index(name)
        signal, noise = self.signal_LS[row].sum(), self.noise_LS[row].sum()
        return float(10 * np.log10(signal / noise)) if signal > 0 and noise > 0 else None

    def save(self, path: Path) -> None:
        """Whole, with the decibels for those who read no more than these."""
        with atomic_path(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file,
                names=np.array(self.names),
                steps=np.array(self.steps),
                sqnr_db=self.sqnr_db_LS.astype(np.float32),
                signal=self.signal_LS,
                noise=self.noise_LS,
            )

    @classmethod
    def load(cls, path: Path) -> ErrorAtlas:
        """What `save` wrote.

        Raises:
            KeyError, ValueError, BadZipFile: it is not that (one of before held decibels alone).
        """
        with np.load(path, allow_pickle=False) as saved:
            names, steps = tuple(saved["names"].tolist()), tuple(saved["steps"].tolist())
            return cls(names, steps, saved["signal"], saved["noise"])


@torch.no_grad()
def error_atlas(target: Target, recipe: ModelRecipe, model: nn.Module, calibration: Calibration) -> ErrorAtlas | None:
    """Compare the built model with its recipe without rounding on the calibration's inputs; None if nothing is rounded."""
    layers = [name for name, shares in _shares(model).items() if any(layer.rounds for layer, _ in shares)]
    if not layers:
        return None
    device = clock_of(model).step.device
    exact = build(target, recipe.without_rounding(), dtype=torch.float32, device=device, memory=AUTO)
    exact_layers = quant_layers(exact)
    names = (*layers, *target.blocks)
    steps = tuple(spread(calibration.num_steps, MAX_STEPS).tolist())
    signal_LS, noise_LS = torch.zeros(2, len(names), len(steps), dtype=torch.float64, device=float64_device(device))
    place = {name: row for row, name in enumerate(names)}
    waiting: dict[str, Tensor | StoredTensor] = {}  # outputs of the float blocks
    current: dict[str, Any] = {}
    spool = cache(lambda: Spool(calibration.cache))  # made if it is needed

    def add(name: str, exact_output: Tensor, output: Tensor) -> None:
        cell = place[name], current["column"]
        expected = in_float64(exact_output)
        signal_LS[cell] += expected.square().sum()
        noise_LS[cell] += (in_float64(output) - expected).square().sum()

    def layer_hook(name: str):
        return lambda _, inputs, output: add(name, output, current["layers"][name](inputs[0]))

    handles = [exact_layers[name].register_forward_hook(layer_hook(name)) for name in layers]

    def keep(name: str):
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            tokens_BTC = tokens_of(output)
            held = sum(each.nbytes for each in waiting.values() if isinstance(each, Tensor))
            waiting[name] = tokens_BTC if held + tokens_BTC.nbytes <= HELD_BYTES else spool().keep(tokens_BTC)

        return hook

    def compare(name: str):
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            expected = waiting[name]
            add(name, expected if isinstance(expected, Tensor) else expected[:], tokens_of(output))

        return hook

    for name in target.blocks:
        handles.append(exact.get_submodule(name).register_forward_hook(keep(name)))
        handles.append(model.get_submodule(name).register_forward_hook(compare(name)))
    for column, step in enumerate(steps):
        clock_of(model).set(step, calibration.num_steps)  # its layers are called while `exact` runs
        current |= {"column": column, "layers": quant_layers(model)}
        for inputs in calibration.rows(step, ROWS):  # one call at a time: a block's two outputs meet
            for each in (exact, model):
                calibration.call(each, step, inputs)
            waiting.clear()
    for handle in handles:
        handle.remove()
    return ErrorAtlas(names, steps, signal_LS.cpu().numpy(), noise_LS.cpu().numpy())


def layer_table(model: nn.Module, atlas: ErrorAtlas | None) -> dict[str, dict[str, Any]]:
    """The record's `layers`: {layer: {sqnr_db, backend, label, weight_bits, act_bits}} for every quantized layer. What changes with the
    range of steps: labels (FP8, W4A8) one after the other, widths as their mean over the steps.
    """
    if atlas is None:
        return {}
    return {
        name: {
            "sqnr_db": atlas.pooled_db(name),
            "backend": "+".join(sorted({layer.backend for layer, _ in shares})),
            "label": "+".join(dict.fromkeys(Bits(layer.weight_spec, layer.act_spec).label for layer, _ in shares)),
            "weight_bits": _mean((layer.weight_spec.bits if layer.weight_spec else 16, part) for layer, part in shares),
            "act_bits": _mean((layer.act_spec.bits if layer.act_spec else 16, part) for layer, part in shares),
        }
        for name, shares in _shares(model).items()
        if any(layer.rounds for layer, _ in shares)
    }


def rounded_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Those of the range of steps that the clock is in."""
    return {name: layer for name, layer in quant_layers(model).items() if layer.rounds}


def _shares(model: nn.Module) -> dict[str, list[tuple[QuantLinear, float]]]:
    """Of every layer what runs in each range of steps, with the range's share of the steps."""
    ranges = clock_of(model).ranges
    total = ranges[-1].stop
    by_range = [(quant_layers(model, index), len(steps) / total) for index, steps in enumerate(ranges)]
    return {name: [(layers[name], part) for layers, part in by_range] for name in by_range[0][0]}


def _mean(values: Iterable[tuple[int, float]]) -> float:
    """Of (value, its share); a value that does not change stays whole."""
    kept = list(values)
    first = kept[0][0]
    return first if all(value == first for value, _ in kept) else sum(value * part for value, part in kept)
