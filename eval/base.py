"""What a metric is given, what it gives back, and the registry that finds it.

A metric is a function of `Evidence` in any module of this folder (or of a package with the entry point group
`ditbench.metrics`), marked with `@metric(...)`: docs/add-a-metric.md. It returns a `Measurement`, or raises `MetricSkipped` with the reason
and the command that would help. It never returns a placeholder.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from ditbench.eval.batches import diverged
from ditbench.eval.design import Design, design_of
from ditbench.harness.common.code_identity import files_sha256, source_files
from ditbench.harness.common.devices import CPU
from ditbench.harness.common.errors import UserError, reason, unknown_name
from ditbench.harness.common.files import is_disk_error
from ditbench.harness.common.plugins import Broken, load_plugins
from ditbench.harness.samples.samples import OtherKind, Rows, Samples


@dataclass(frozen=True)
class Reference:
    """Real images that generated ones are compared with, uint8 (N, H, W, 3). sha256 is that of images_NHWC's bytes."""

    name: str
    images_NHWC: Rows
    sha256: str


@dataclass(frozen=True)
class FeatureModel:
    """A judge: module.features(uint8 N3HW) → (N, width), module(uint8 N3HW) → logits (N, num_classes)."""

    name: str
    module: nn.Module
    width: int
    sha256: str


@dataclass(frozen=True)
class Evidence:
    """Everything a metric may look at. `float_model` has the same noise and labels as `generated`, row by row.

    device: where the run computes, and with it the metric's networks and what it does with pixels; rows of samples and of the
    reference are read onto the CPU, and what a metric gives back is there too.
    """

    generated: Samples
    float_model: Samples | None = None
    reference: Reference | None = None
    judge: FeatureModel | None = None
    seed: int = 0  # of what a metric draws: KID's subsets, FD∞'s halves
    resamples: int = 200  # for a plugin's metric that resamples; the intervals of those here need none
    device: torch.device = CPU

    @property
    def design(self) -> Design:
        """How the conditions of the generated samples were chosen: intervals are of other samples of the same design."""
        return design_of(self.generated)


@dataclass(frozen=True, eq=False)
class PerSample:
    """What a metric found for each generated sample, in their order: float64 (N,), NaN for one that does not count.

    yes_no: the values are 0 or 1. strata_N: the category of each sample (int), where the metric is the mean of its
    categories' means; without, it is the mean of the values. pseudo: the metric is a number of the whole set (FID), and the values are
    it plus what each sample contributes (eval/influence.py, Tukey's pseudo-values): their mean is the metric, and those of two runs
    of the same noise are compared like any others. design_N: the stratum of each sample (`Evidence.design`), None if independent.
    """

    values_N: np.ndarray
    yes_no: bool = False
    strata_N: np.ndarray | None = None
    pseudo: bool = False
    design_N: np.ndarray | None = None


@dataclass(frozen=True)
class Measurement:
    """A value with its 95 % interval, the number of samples it rests on and the settings that made it.

    per_sample: None where a sample contributes nothing that could be told.
    """

    value: float
    ci95: tuple[float, float] | None
    n: int
    passport: dict[str, Any] = field(default_factory=dict)
    per_sample: PerSample | None = None


class MetricSkipped(Exception):
    """The metric cannot run here; the message says why and what would help."""


@dataclass(frozen=True)
class Metric:
    """better: one of BETTER; paired: compares with the float model sample by sample (has no noise floor).

    asks, needs: what the metric cannot do without, of the run and of this machine; of_diverged: see `metric`.
    """

    name: str
    compute: Callable[[Evidence], Measurement]
    better: str
    paired: bool
    unit: str
    summary: str
    asks: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    of_diverged: bool = False


ENTRY_POINTS = "ditbench.metrics"
BETTER = ("higher", "lower", "none")  # none: the number describes the samples and ranks nobody
Need = Callable[[], str | None]  # None, or what is missing here and the command that helps; loads nothing

_METRICS: dict[str, Metric] = {}
_broken = Broken()


def metric(
    name: str,
    *,
    better: str,
    paired: bool = False,
    unit: str = "",
    asks: tuple[str, ...] = (),
    needs: tuple[Need, ...] = (),
    of_diverged: bool = False,
) -> Callable:
    """Register a function of Evidence under name; the first line of its docstring is its summary.

    asks: what a run has to have for it, keys of eval.needs.ASKS. needs: what this machine has to have. Without them the
    metric still works, but is not announced as one that will be skipped. of_diverged: it also looks at samples with latents
    that are not finite, whose pixels are no picture; the others are skipped.
    """
    if better not in BETTER:
        raise ValueError(f"metric {name}: better must be one of {', '.join(BETTER)}, got {better!r}")

    def register(compute: Callable[[Evidence], Measurement]) -> Callable[[Evidence], Measurement]:
        if name in _METRICS and (other := _METRICS[name].compute.__module__) != compute.__module__:
            raise UserError(f"metric {name!r} of {compute.__module__} has the name of one of {other}; rename it")
        summary = (compute.__doc__ or "").strip().split("\n")[0]
        _METRICS[name] = Metric(name, compute, better, paired, unit, summary, asks, needs, of_diverged)
        return compute

    return register


@cache
def known_metrics() -> dict[str, Metric]:
    """Every metric of this folder and of installed plugins, by name. A plugin that is broken, or that has a metric with the
    name of another, is said once and left out, with all its metrics.
    """
    import ditbench.eval as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"ditbench.eval.{module.name}")
    whole = dict(_METRICS)

    def take(name: str, plugin: Any) -> None:
        whole.update(_METRICS)

    _broken.clear()
    load_plugins(ENTRY_POINTS, "metrics", take, _broken, undo=lambda: _put_back(whole))
    return dict(sorted(_METRICS.items()))


def _put_back(metrics: dict[str, Metric]) -> None:
    _METRICS.clear()
    _METRICS.update(metrics)


def no_metric(name: str) -> UserError:
    """Why there is no such metric: its plugin is broken, or the name is misspelt, or it is one of those that VBench's own code gives."""
    error = unknown_name("metric", name, known_metrics())
    if "vbench" in name:
        error = UserError(f"{error}. VBench's own scores, and the totals of them, come from `ditbench vbench`")
    return _broken.error(name, error)


def plugin_sources(names: Iterable[str]) -> dict[str, str]:
    """{metric: SHA-256 of its whole package}, of those that are not in this folder: editing a plugin makes new runs of it."""
    modules = {name: known_metrics()[name].compute.__module__ for name in names if name in known_metrics()}
    return {
        name: files_sha256(source_files(sys.modules[module]))
        for name, module in modules.items()
        if not module.startswith("ditbench.eval.")
    }


def evaluate(names: Iterable[str], evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Run the named metrics → the record's `metrics` field: one that cannot run is skipped, one that breaks has failed."""
    return evaluate_samples(names, evidence)[0]


def evaluate_samples(
    names: Iterable[str], evidence: Evidence
) -> tuple[dict[str, dict[str, Any]], dict[str, PerSample]]:
    """As `evaluate`, and what each metric found per sample, of those that look at samples one by one."""
    known, names = known_metrics(), list(names)
    for name in names:
        if name not in known:
            raise no_metric(name)
    entries, samples = {}, {}
    for name in names:
        entries[name], per_sample = _evaluated(known[name], evidence)
        if per_sample is not None:
            samples[name] = per_sample
    return entries, samples


def _evaluated(metric: Metric, evidence: Evidence) -> tuple[dict[str, Any], PerSample | None]:
    """The entry of one metric. Whatever breaks in it, a full GPU or a plugin, must not cost what others found already."""
    try:
        if not metric.of_diverged:
            _need_finite(evidence.generated, "generated")
            _need_finite(evidence.float_model if metric.paired else None, "the float model's")
        result = metric.compute(evidence)
        entry = _entry(metric, result)
        json.dumps(entry, allow_nan=False)  # as the record is written
        _need_one_per_sample(metric, result.per_sample, len(evidence.generated))
        return entry, result.per_sample
    except (MetricSkipped, OtherKind) as skipped:
        return _without_value(metric, "skipped", str(skipped)), None
    except Exception as error:
        if is_disk_error(error):
            raise
        return _without_value(metric, "failed", reason(error)), None


def _need_finite(samples: Samples | None, whose: str) -> None:
    if rows := diverged(samples):
        some = ", ".join(map(str, rows[:3])) + (" …" if len(rows) > 3 else "")
        raise MetricSkipped(f"{whose} latents of {len(rows)} samples are not finite ({some}); the sampler diverged")


def _entry(metric: Metric, result: Measurement) -> dict[str, Any]:
    value, ci95 = float(result.value), [float(limit) for limit in result.ci95 or ()]
    if not np.isfinite([value, *ci95]).all():
        raise ValueError(f"{metric.name} gave {value} {ci95 or ''}, which a record cannot hold")
    return {
        "value": value,
        "ci95": ci95 or None,
        "n": int(result.n),
        "status": "ok",
        "reason": None,
        "passport": result.passport,
    } | _constant(metric)


def _need_one_per_sample(metric: Metric, found: PerSample | None, n: int) -> None:
    """Raises ValueError: what runs are compared by later, where nobody would catch it, is no value for each sample."""
    if found is None:
        return
    for name, each in (("values_N", found.values_N), ("strata_N", found.strata_N), ("design_N", found.design_N)):
        if each is not None and np.shape(each) != (n,):
            raise ValueError(
                f"{metric.name}: per_sample.{name} is of shape {np.shape(each)}, expected ({n},): a value per sample"
            )
    if np.isinf(found.values_N).any():
        raise ValueError(f"{metric.name}: per_sample.values_N has infinities; cap them, or NaN for what does not count")


def _without_value(metric: Metric, status: str, why: str) -> dict[str, Any]:
    found: dict[str, Any] = {"value": None, "ci95": None, "n": 0, "status": status, "reason": why, "passport": {}}
    return found | _constant(metric)


def _constant(metric: Metric) -> dict[str, Any]:
    return {"better": metric.better, "paired": metric.paired, "unit": metric.unit, "noise_floor": None}
