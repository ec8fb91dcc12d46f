"""MLPerf Inference's score of Wan 2.2 T2V A14B (github.com/mlcommons/inference, text_to_video/wan-2.2-t2v-a14b), and what it accepts.

    score = 100 · mean of six of VBench's dimensions, as VBench gives them: neither normalised nor weighted

The reference's score in bfloat16 is 70.48, and 99 % of it is accepted (its submission checker). Whether a run is accepted is said only if
it was drawn as conf/protocol/mlperf_wan22.yaml says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditbench.eval.passport import passport
from ditbench.eval.vbench_totals import STANDARD, scores

DIMENSIONS = ("subject_consistency", "dynamic_degree", "motion_smoothness", "appearance_style", "scene")
DIMENSIONS += ("background_consistency",)
PROMPTS = 248  # of VBench's, those that list one of these dimensions
NAME, REFERENCE, SHARE = "mlperf/vbench_score", 70.48, 0.99


def entry(metrics: Mapping[str, Mapping[str, Any]], departures: Sequence[str]) -> dict[str, Any]:
    """The entry of NAME from a record's metrics; departures: what the run does other than MLPerf's protocol, a line each."""
    found = scores(metrics)
    made: dict[str, Any] = {"value": None, "ci95": None, "n": 0, "status": "ok", "reason": None, "passport": {}}
    made |= {"better": "higher", "paired": False, "unit": "", "noise_floor": None}
    if missing := [dimension for dimension in DIMENSIONS if dimension not in found]:
        why = f"of MLPerf's six VBench dimensions, on VBench's own prompts, these are missing: {', '.join(missing)}"
        return made | {"status": "skipped", "reason": f"{why}; `ditbench vbench RUN --dimension …` scores them"}
    of_each = {dimension: found[dimension]["value"] for dimension in DIMENSIONS}
    value = 100.0 * sum(of_each.values()) / len(of_each)
    settings: dict[str, Any] = {
        "mode": STANDARD,
        "dimensions": of_each,
        "videos": {dimension: found[dimension]["n"] for dimension in DIMENSIONS},
        "reference_score": REFERENCE,
        "window": [SHARE * REFERENCE, None],
        "in_window": None if departures else value >= SHARE * REFERENCE,
        "window_of": "Wan 2.2 T2V A14B drawn by MLPerf's protocol",
        "departs_from_mlperf": list(departures),
        "ci_method": "none: dimensions share videos",
    }
    card = passport(f"ditbench {NAME}", "ditbench", reference=None, dtype="float64", **settings)
    versions = sorted({str(found[dimension]["passport"].get("version")) for dimension in DIMENSIONS})
    n = min(settings["videos"].values())
    return made | {"value": value, "n": n, "passport": card | {"version": ", ".join(versions)}}
