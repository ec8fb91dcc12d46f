"""VBench's three totals, from the scores of its dimensions (Huang et al. 2023, arXiv:2311.17982; code Vchitect/VBench).

    normalised   (score − low) / (high − low)                    of each dimension, low and high VBench's own
    quality      Σ weight · normalised / Σ weight                over 7 dimensions, dynamic degree weighing half
    semantic     mean of normalised                              over 9 dimensions
    total        (4 · quality + semantic) / 5

Bounds and weights are those of scripts/constant.py, the sums those of scripts/cal_final_score.py, both of the repository's master. Their
script counts a dimension that is missing as 0; here a total is skipped then, and names it. Nothing is clamped, there or here: a score
outside its bounds makes a total below 0 or above 1. Dimensions are `vbench/…`, scored by VBench itself on its own prompts:
`vbench_style/…` have other judges, and are in no total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditbench.eval.passport import passport

QUALITY = {  # dimension: low, high, weight
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
STANDARD = "vbench_standard"  # the mode of its own prompts
NAMES = ("vbench/quality_score", "vbench/semantic_score", "vbench/total_score")

Bounds = Mapping[str, tuple[float, float, float]]
Entry = Mapping[str, Any]  # of a metric, as a record holds it


def totals(metrics: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """The entries of NAMES from a record's metrics; none at all where no dimension was scored on VBench's own prompts."""
    found = scores(metrics)
    if not found:
        return {}
    quality, semantic = (weighted(found, bounds) for bounds in (QUALITY, SEMANTIC))
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    of_each = zip(NAMES, (quality, semantic, total), (QUALITY, SEMANTIC, QUALITY | SEMANTIC), strict=True)
    return {name: _entry(name, value, bounds, found) for name, value, bounds in of_each}


def scores(metrics: Mapping[str, Entry]) -> dict[str, Entry]:
    """{dimension: entry} of those that VBench scored on its own prompts."""
    found = {
        dimension: metrics[name] for dimension in (*QUALITY, *SEMANTIC) if (name := f"vbench/{dimension}") in metrics
    }
    return {
        dimension: entry
        for dimension, entry in found.items()
        if entry.get("value") is not None and (entry.get("passport") or {}).get("mode") == STANDARD
    }


def weighted(found: Mapping[str, Entry], bounds: Bounds) -> float | None:
    """The weighted mean of normalised scores; None where one is missing."""
    if any(dimension not in found for dimension in bounds):
        return None
    parts = [
        weight * (found[dimension]["value"] - low) / (high - low) for dimension, (low, high, weight) in bounds.items()
    ]
    return sum(parts) / sum(weight for _, _, weight in bounds.values())


def _entry(name: str, value: float | None, bounds: Bounds, found: Mapping[str, Entry]) -> dict[str, Any]:
    filters = {str(found[each]["passport"].get("static_filter", "")) for each in bounds if each in found} - {""}
    settings: dict[str, Any] = {
        "bounds_and_weights": {dimension: list(of_each) for dimension, of_each in bounds.items()}
    }
    if filters:
        settings["static_filter"] = "; ".join(sorted(filters))
    return filed(name, value, tuple(bounds), found, "VBench's dimensions", settings)


def filed(
    name: str, value: float | None, dimensions: Sequence[str], found: Mapping[str, Entry], whose: str, settings: Entry
) -> dict[str, Any]:
    """The entry of a score that is made of these dimensions; skipped, where one was not found. settings: more of its passport."""
    entry: dict[str, Any] = {"value": None, "ci95": None, "n": 0, "status": "ok", "reason": None, "passport": {}}
    entry |= {"better": "higher", "paired": False, "unit": "", "noise_floor": None}
    if missing := [dimension for dimension in dimensions if dimension not in found]:
        why = f"of {whose}, on VBench's own prompts, these are missing: {', '.join(missing)}"
        return entry | {"status": "skipped", "reason": f"{why}; `ditbench vbench RUN --dimension …` scores them"}
    videos = {dimension: found[dimension]["n"] for dimension in dimensions}
    values = {dimension: found[dimension]["value"] for dimension in dimensions}
    usual = {"mode": STANDARD, "dimensions": values, "videos": videos, "ci_method": "none: dimensions share videos"}
    card = passport(f"ditbench {name}", "ditbench", reference=None, dtype="float64", **usual, **settings)
    card["version"] = ", ".join(sorted({str(found[each]["passport"].get("version")) for each in dimensions}))
    return entry | {"value": value, "n": min(videos.values()), "passport": card}
