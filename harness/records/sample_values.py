"""per_sample.npz beside a record: what every metric found sample by sample, of the run and of the float model it is held against.

run:<metric>      float64 (N,), NaN for a sample that does not count
float:<metric>    the same of the float model's samples (same noise), for metrics that are not distances to it already
strata:<metric>   int (N,): the category of each sample, where the metric is the mean of categories
design            int (N,): the stratum of each sample, where labels or prompts are balanced (eval/design.py)
yes_no            names of the metrics whose values are 0 or 1
pseudo            names of the metrics of the whole set, whose values are what each sample contributes (eval/influence.py)
drawn             a hash of seed, labels and prompts: runs with the same one pair row by row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ditbench.eval.base import PerSample
from ditbench.harness.common.files import atomic_path, canonical_sha256
from ditbench.harness.samples.samples import Samples

FILE = "per_sample.npz"


@dataclass(frozen=True)
class Values:
    """run, float_model: {metric: its values}."""

    run: Mapping[str, PerSample]
    float_model: Mapping[str, PerSample]
    drawn: str


def drawn(samples: Samples, seed: int) -> str:
    labels = None if samples.labels_N is None else samples.labels_N.tolist()
    return canonical_sha256([seed, len(samples), labels, [asdict(prompt) for prompt in samples.prompts]])


def save(values: Values, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {"drawn": np.array(values.drawn)}
    for side, found in (("run", values.run), ("float", values.float_model)):
        for name, one in found.items():
            arrays[f"{side}:{name}"] = one.values_N.astype(np.float64)  # read back it must give the same intervals
            if one.strata_N is not None:
                arrays[f"strata:{name}"] = one.strata_N.astype(np.int32)
    both = {**values.float_model, **values.run}
    for kind in ("yes_no", "pseudo"):
        arrays[kind] = np.array([name for name, one in both.items() if getattr(one, kind)], dtype=np.str_)
    designs = [one.design_N for one in both.values() if one.design_N is not None]
    if designs:
        arrays["design"] = designs[0].astype(np.int32)
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Values:
    """Raises ValueError, and whatever zipfile and NumPy say of odd bytes: it is not what `save` writes."""
    with np.load(path) as arrays:
        yes_no = set(arrays["yes_no"].tolist())
        pseudo = set(arrays["pseudo"].tolist()) if "pseudo" in arrays.files else set()
        design_N = arrays["design"] if "design" in arrays.files else None
        found: dict[str, dict[str, PerSample]] = {"run": {}, "float": {}}
        for key in arrays.files:
            side, _, name = key.partition(":")
            if side in found:
                strata_N = arrays[f"strata:{name}"] if f"strata:{name}" in arrays.files else None
                values_N = arrays[key].astype(np.float64)
                odd = any(each is not None and each.shape != values_N.shape for each in (strata_N, design_N))
                if values_N.ndim != 1 or odd:
                    raise ValueError(f"{path}: {key} is of shape {values_N.shape}, expected a value per sample")
                found[side][name] = PerSample(values_N, name in yes_no, strata_N, name in pseudo, design_N)
        return Values(found["run"], found["float"], str(arrays["drawn"]))
