"""The settings that made a number, in the same words for every metric."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import ditbench
from ditbench.eval.base import Evidence, MetricSkipped, Reference

FLOAT_MODEL = "float model, same noise and labels"
SCORED_BY = (
    "implementation",
    "version",
    "reference",
    "weights_sha256",
    "resize",
    "antialias",
    "dtype",
    "features",
    "flow",
    "categories",
)


def passport(
    implementation: str,
    package: str,
    *,
    reference: str | Reference | None,
    dtype: str,
    weights_sha256: str | None = None,
    resize: str = "none",
    antialias: bool | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The record's seven passport fields, then whatever else could move this metric's number.

    package is the distribution whose version is recorded; antialias is None where nothing is resized.
    """
    fields = {
        "implementation": implementation,
        "version": f"{package} {ditbench.__version__ if package == 'ditbench' else version(package)}",
        "reference": reference.name if isinstance(reference, Reference) else reference,
        "weights_sha256": weights_sha256,
        "resize": resize,
        "antialias": antialias,
        "dtype": dtype,
    }
    if isinstance(reference, Reference):
        fields |= {"reference_sha256": reference.sha256, "reference_n": len(reference.images_NHWC)}
    return fields | settings


def scored_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two passports are of numbers that may be subtracted: same code, network, resize and reference."""
    return all(one.get(field) == other.get(field) for field in SCORED_BY)


def need_samples(evidence: Evidence, at_least: int) -> int:
    """The number of generated samples; too few of them and the metric is skipped."""
    n = len(evidence.generated)
    if n < at_least:
        raise MetricSkipped(f"needs {at_least} or more generated images, got {n}; raise protocol.n")
    return n
