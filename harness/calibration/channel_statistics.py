"""Observers: what each layer's input looks like, per denoising step and per channel, in one pass over the calibration.

What they gather stays on the calibration's device until the pass is over; what they return lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ditbench.harness.backends.base import AUTO
from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.artifacts import obtain
from ditbench.harness.common.code_identity import STATISTICS, code_identity
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.common.progress import progress
from ditbench.harness.common.tensor_files import save_tensors
from ditbench.harness.models.calls import float_dtype
from ditbench.harness.quant.recipe import to_device
from ditbench.harness.quant.target import Site, Target

FILE = "statistics.safetensors"


@dataclass(frozen=True)
class ChannelStats:
    """Of one layer's input, per step s and channel c, over samples and tokens; float32, on the CPU.

    mean_min_SC, mean_max_SC: extremes over the tokens of one sample, averaged over samples. count_S: tokens seen.
    """

    min_SC: Tensor
    max_SC: Tensor
    mean_min_SC: Tensor
    mean_max_SC: Tensor
    sumsq_SC: Tensor
    count_S: Tensor

    @property
    def absmax_SC(self) -> Tensor:
        return torch.maximum(self.min_SC.abs(), self.max_SC.abs())

    @property
    def centre_SC(self) -> Tensor:
        """The middle of each channel's range, from the extremes averaged over samples."""
        return (self.mean_min_SC + self.mean_max_SC) / 2

    @property
    def absmax_C(self) -> Tensor:
        """Largest |x| over all steps."""
        return self.absmax_SC.amax(0)


def of_site(stats: Mapping[str, ChannelStats], site: Site) -> ChannelStats:
    """Of all that the layers of a site read: the widest extremes and the sums over its tensors (`Site.groups`).

    stats: by layer name, as `channel_stats` gives them.
    """
    each = [stats[name] for name in site.first_readers]
    if len(each) == 1:
        return each[0]
    return ChannelStats(
        min_SC=torch.stack([one.min_SC for one in each]).amin(0),
        max_SC=torch.stack([one.max_SC for one in each]).amax(0),
        mean_min_SC=torch.stack([one.mean_min_SC for one in each]).amin(0),
        mean_max_SC=torch.stack([one.mean_max_SC for one in each]).amax(0),
        sumsq_SC=torch.stack([one.sumsq_SC for one in each]).sum(0),
        count_S=torch.stack([one.count_S for one in each]).sum(0),
    )


def channel_stats(target: Target, calibration: Calibration) -> dict[str, ChannelStats]:
    """Statistics of the input of every layer at a linear site → {layer name: stats}; layers that read one tensor share one
    object. `of_site` puts together what a site's layers read.

    Kept in the recording's cache, so that a sweep over methods pays for it once.

    Raises:
        RuntimeError: a layer saw no calibration batch.
        UserError: it saw none at one of the steps.
    """
    sites = target.linear_sites()
    key = canonical_sha256(
        {
            "recording": calibration.key,
            "tensors": [group for site in sites for group in site.groups],
            "device": calibration.device.type,
            "code": code_identity(*STATISTICS),
        }
    )
    address = calibration.derived("statistics", key, "statistics of the calibration")
    kept = obtain(address, lambda: _observe(target, calibration), _write, _read)
    calibration.saved(f"statistics {key}", kept.saved_s)
    return {consumer: kept.value[group[0]] for site in sites for group in site.groups for consumer in group}


def _observe(target: Target, calibration: Calibration) -> dict[str, ChannelStats]:
    """{first reader: stats} of each tensor that layers at linear sites read."""
    steps = calibration.num_steps
    model = float_copy(target, dtype=float_dtype(target.transformer), device=calibration.device, memory=AUTO)
    running: dict[str, dict[str, Tensor]] = {}
    samples: dict[str, Tensor] = {}

    def observe(name: str, step: int, x: Tensor) -> None:
        x_BTC = x.detach().float().reshape(len(x), -1, x.shape[-1])
        width = x_BTC.shape[-1]
        if name not in running:
            zeros = {field.name: x_BTC.new_zeros(steps, width) for field in fields(ChannelStats)}
            running[name] = zeros | {
                "min_SC": x_BTC.new_full((steps, width), torch.inf),
                "max_SC": x_BTC.new_full((steps, width), -torch.inf),
                "count_S": torch.zeros(steps),
            }
            samples[name] = torch.zeros(steps)
        stats, low_BC, high_BC = running[name], x_BTC.amin(1), x_BTC.amax(1)
        stats["min_SC"][step] = torch.minimum(stats["min_SC"][step], low_BC.amin(0))
        stats["max_SC"][step] = torch.maximum(stats["max_SC"][step], high_BC.amax(0))
        stats["mean_min_SC"][step] += low_BC.sum(0)  # a sum until the end
        stats["mean_max_SC"][step] += high_BC.sum(0)
        stats["sumsq_SC"][step] += x_BTC.square().sum((0, 1))
        stats["count_S"][step] += x_BTC.shape[0] * x_BTC.shape[1]
        samples[name][step] += len(x_BTC)

    readers = [name for site in target.linear_sites() for name in site.first_readers]
    with inputs_observed(model, {name: name for name in readers}, observe) as set_step:
        run_calibration(model, calibration, set_step, "observe")
    missing = [name for name in readers if name not in running]
    if missing:
        raise RuntimeError(f"{missing[0]} saw no calibration batch; is it skipped at every step you calibrate?")
    for name, stats in running.items():
        if not bool(stats["count_S"].all()):
            raise UserError(
                f"{name} saw no token at step {int(stats['count_S'].argmin())} (an expert that none was sent to?); raise "
                "calibration.n"
            )
        for mean in ("mean_min_SC", "mean_max_SC"):
            stats[mean] /= samples[name].to(stats[mean].device)[:, None].clamp(min=1)
    return {name: to_device(ChannelStats(**running[name]), "cpu") for name in readers}


class ChannelMagnitude:
    """How large each channel of one tensor is, over all rows of the calls that it has seen.

    kind: absmax | rms | p999 (the 99.9th percentile of |x| in each call, the largest over the calls).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.running_C: Tensor | None = None
        self.rows = 0

    def see(self, x: Tensor) -> None:
        magnitude_TC = x.detach().abs().flatten(0, -2)
        if self.kind == "rms":
            seen_C = magnitude_TC.double().square().sum(0)
            self.running_C = seen_C if self.running_C is None else self.running_C + seen_C
        else:
            rank = len(magnitude_TC) if self.kind == "absmax" else max(1, round(0.999 * len(magnitude_TC)))
            seen_C = magnitude_TC.kthvalue(rank, dim=0).values
            self.running_C = seen_C if self.running_C is None else torch.maximum(self.running_C, seen_C)
        self.rows += len(magnitude_TC)

    def of_channels(self, name: str) -> Tensor:
        """(C,), in the type of what was seen (rms: float64).

        Raises:
            RuntimeError: nothing was seen; `name` says of what.
        """
        if self.running_C is None:
            raise RuntimeError(f"{name} saw no calibration batch; is it skipped at every step you calibrate?")
        return (self.running_C / self.rows).sqrt() if self.kind == "rms" else self.running_C


def token_sample(target: Target, calibration: Calibration, sites: list[Site], tokens: int) -> dict[str, Tensor]:
    """About `tokens` tokens of each tensor that layers of these sites read, the same number from every model call →
    {layer name: x_NC, float32, on the CPU}; layers that read one tensor share one sample, `tokens_of_site` has all of a site's.

    Raises:
        RuntimeError: a layer saw no calibration batch.
    """
    per_call = -(-tokens // calibration.num_batches())
    found: dict[str, list[Tensor]] = {name: [] for site in sites for name in site.first_readers}

    def observe(name: str, step: int, x: Tensor) -> None:
        x_NC = x.detach().float().flatten(0, -2)
        # evenly spread over rows and tokens, so that conditional and null rows are both seen
        kept = torch.linspace(0, len(x_NC) - 1, min(per_call, len(x_NC))).round().long()
        found[name].append(x_NC[kept.to(x_NC.device)])

    if sites:
        model = float_copy(target, dtype=float_dtype(target.transformer), device=calibration.device, memory=AUTO)
        with inputs_observed(model, {name: name for name in found}, observe) as set_step:
            run_calibration(model, calibration, set_step, "sample")
    missing = [name for name, parts in found.items() if not parts]
    if missing:
        raise RuntimeError(f"{missing[0]} saw no calibration batch; is it skipped at every step you calibrate?")
    sampled = {name: torch.cat(parts).cpu() for name, parts in found.items()}
    return {consumer: sampled[group[0]] for site in sites for group in site.groups for consumer in group}


def tokens_of_site(tokens: Mapping[str, Tensor], site: Site) -> Tensor:
    """x_NC of all that the layers of a site read. tokens: by layer name, as `token_sample` gives them."""
    return torch.cat([tokens[name] for name in site.first_readers])


@contextmanager
def inputs_observed(model: nn.Module, names: dict[str, str], observe: Callable[[str, int, Tensor], None]):
    """Hooks that call observe(label, step, input) for modules {name: label}; yields the setter of the step."""
    current = {"step": 0}

    def hook(label: str) -> Callable:
        return lambda module, inputs: observe(label, current["step"], inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(label)) for name, label in names.items()]
    try:
        yield lambda step: current.update(step=step)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_calibration(model: nn.Module, calibration: Calibration, set_step: Callable[[int], None], title: str) -> None:
    """Feed every recorded call to model, with its clock and set_step on the step of the call."""
    for step, inputs in progress(calibration.batches(), total=calibration.num_batches(), desc=title):
        set_step(step)
        calibration.call(model, step, inputs)


def _write(by_layer: dict[str, ChannelStats], folder: Path) -> None:
    save_tensors(
        {f"{n}/{f.name}": getattr(stats, f.name) for n, stats in by_layer.items() for f in fields(stats)}, folder / FILE
    )


def _read(folder: Path) -> dict[str, ChannelStats]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / FILE).items():
        layer, name = key.rsplit("/", 1)
        parts.setdefault(layer, {})[name] = tensor
    return {layer: ChannelStats(**values) for layer, values in parts.items()}
