"""The settings that made a number, in the same words for every metric."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import harness
from eval.base import Evidence, MetricSkipped, Reference

FLOAT_MODEL = "float model, same noise and labels"


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
        "version": f"{package} {harness.__version__ if package == 'ditbench' else version(package)}",
        "reference": reference.name if isinstance(reference, Reference) else reference,
        "weights_sha256": weights_sha256,
        "resize": resize,
        "antialias": antialias,
        "dtype": dtype,
    }
    if isinstance(reference, Reference):
        fields |= {"reference_sha256": reference.sha256, "reference_n": len(reference.images_NHWC)}
    return fields | settings


def need_samples(evidence: Evidence, at_least: int) -> int:
    """The number of generated samples; too few of them and the metric is skipped."""
    n = len(evidence.generated)
    if n < at_least:
        raise MetricSkipped(f"needs {at_least} or more generated images, got {n}; raise protocol.n")
    return n
