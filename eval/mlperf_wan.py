"""MLPerf Inference's score of Wan 2.2 T2V A14B (github.com/mlcommons/inference, text_to_video/wan-2.2-t2v-a14b), and what it accepts.

    score = 100 · mean of six of VBench's dimensions, as VBench gives them: neither normalised nor weighted

The reference's score in bfloat16 is 70.48, and 99 % of it is accepted (its submission checker). Whether a run is accepted is said only if
it was drawn as conf/protocol/mlperf_wan22.yaml says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditbench.eval.vbench_totals import filed, scores

DIMENSIONS = ("subject_consistency", "dynamic_degree", "motion_smoothness", "appearance_style", "scene")
DIMENSIONS += ("background_consistency",)
PROMPTS = 248  # of VBench's, those that list one of these dimensions
NAME, REFERENCE, SHARE = "mlperf/vbench_score", 70.48, 0.99


def entry(metrics: Mapping[str, Mapping[str, Any]], departures: Sequence[str]) -> dict[str, Any]:
    """The entry of NAME from a record's metrics; departures: what the run does other than MLPerf's protocol, a line each."""
    found = scores(metrics)
    of_each = [found[dimension]["value"] for dimension in DIMENSIONS if dimension in found]
    value = 100.0 * sum(of_each) / len(of_each) if len(of_each) == len(DIMENSIONS) else None
    settings = {
        "reference_score": REFERENCE,
        "window": [SHARE * REFERENCE, None],
        "in_window": None if departures or value is None else value >= SHARE * REFERENCE,
        "window_of": "Wan 2.2 T2V A14B drawn by MLPerf's protocol",
        "departs_from_mlperf": list(departures),
    }
    return filed(NAME, value, DIMENSIONS, found, "MLPerf's six VBench dimensions", settings)
