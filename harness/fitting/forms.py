"""The forms that a method comes in: as this harness runs it where nothing is said, and as its paper or release runs it.

A form is a named set of parameters, and of what goes with them in `bits` and `calibration`: a method that was published with
asymmetric weights is not what its paper reports when its weights are symmetric. Methods say theirs in `FORMS`; what is set by hand
(`method.iterations=500`, `bits.weight.symmetric=true`) is stronger than any form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT = "default"  # Params and configuration as they stand
PUBLISHED = "published"  # what the paper or its release runs, as far as it is known
SECTIONS = ("bits", "calibration")


@dataclass(frozen=True)
class Form:
    """params: fields of the method's Params that are not as they stand there. settings: values of `bits` and `calibration`, by
    their names with dots.

    Raises:
        ValueError: a setting of another section; what a protocol says has to be equal between methods.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        others = [name for name in self.settings if name.partition(".")[0] not in SECTIONS]
        if others:
            raise ValueError(f"a form sets {' and '.join(SECTIONS)}, not {others[0]}")


ASYMMETRIC_WEIGHTS = {"bits.weight.symmetric": False}
STATIC_ACTIVATIONS = {"bits.act.granularity": "per_tensor", "bits.act.symmetric": False, "bits.act.dynamic": False}
