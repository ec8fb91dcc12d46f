"""VBench's totals against its own script, written again as it runs there: names with spaces, weights inside the sum."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ditbench.eval import vbench_totals
from ditbench.eval.vbench_totals import NAMES, QUALITY, SEMANTIC, totals
from ditbench.harness.records.schema import problem_of_metric

# Vchitect/VBench, scripts/constant.py: Min, Max, weight, in the order of the leaderboard.
PUBLISHED = """
subject consistency 0.1462 1.0 1
background consistency 0.2615 1.0 1
temporal flickering 0.6293 1.0 1
motion smoothness 0.706 0.9975 1
dynamic degree 0.0 1.0 0.5
aesthetic quality 0.0 1.0 1
imaging quality 0.0 1.0 1
object class 0.0 1.0 1
multiple objects 0.0 1.0 1
human action 0.0 1.0 1
color 0.0 1.0 1
spatial relationship 0.0 1.0 1
scene 0.0 0.8222 1
appearance style 0.0009 0.2855 1
temporal style 0.0 0.364 1
overall consistency 0.0 0.364 1
"""


def entry(value: float, n: int = 5, mode: str = "vbench_standard", **more) -> dict:
    return {
        "value": value,
        "n": n,
        "better": "higher",
        "status": "ok",
        "passport": {"mode": mode, "version": "vbench 0.1.5"} | more,
    }


def drawn(seed: int = 0) -> dict[str, dict]:
    random = np.random.default_rng(seed)
    return {
        f"vbench/{name}": entry(float(random.uniform(0.2, 0.99)), n=int(random.integers(5, 90)))
        for name in (*QUALITY, *SEMANTIC)
    }


def by_their_script(metrics: dict[str, dict]) -> tuple[float, float, float]:
    rows = [line.rsplit(maxsplit=3) for line in PUBLISHED.strip().splitlines()]
    normalized, weight_of = {}, {}
    for name, low, high, weight in rows:
        score = metrics["vbench/" + name.replace(" ", "_")]["value"]
        weight_of[name] = float(weight)
        normalized[name] = (score - float(low)) / (float(high) - float(low)) * float(weight)
    names = [row[0] for row in rows]
    quality, semantic = (
        sum(normalized[n] for n in part) / sum(weight_of[n] for n in part) for part in (names[:7], names[7:])
    )
    return quality, semantic, (quality * 4 + semantic * 1) / 5


@pytest.mark.parametrize("seed", range(5))
def test_totals_are_those_of_vbenchs_own_script(seed):
    metrics = drawn(seed)
    found = totals(metrics)
    assert [found[name]["value"] for name in NAMES] == pytest.approx(by_their_script(metrics), rel=1e-12)


# VideoCrafter-2.0's row of VBench's leaderboard, in per cent, in PUBLISHED's order; from memory: that its totals come out says it is right.
ROW = (96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22, 92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23)


def test_a_row_of_the_leaderboard_has_the_totals_that_stand_there():
    names = [line.rsplit(maxsplit=3)[0].replace(" ", "_") for line in PUBLISHED.strip().splitlines()]
    found = totals({f"vbench/{name}": entry(percent / 100) for name, percent in zip(names, ROW, strict=True)})
    assert [round(100 * found[name]["value"], 2) for name in NAMES] == [82.20, 73.42, 80.44]


def test_scores_at_their_bounds_are_0_and_1_and_dynamic_degree_weighs_half():
    top, bottom = ({f"vbench/{name}": entry(at[side]) for name, at in (QUALITY | SEMANTIC).items()} for side in (1, 0))
    assert [totals(top)[name]["value"] for name in NAMES] == pytest.approx([1, 1, 1])
    assert [totals(bottom)[name]["value"] for name in NAMES] == pytest.approx([0, 0, 0])
    half = top | {"vbench/dynamic_degree": entry(0.0)}
    assert totals(half)["vbench/quality_score"]["value"] == pytest.approx(6 / 6.5)
    assert totals(half)["vbench/total_score"]["value"] == pytest.approx((4 * 6 / 6.5 + 1) / 5)


def test_a_total_with_a_dimension_missing_is_skipped_and_names_it():
    metrics = drawn()
    del metrics["vbench/color"], metrics["vbench/object_class"]
    metrics["vbench/scene"] = {"value": None, "n": 0, "better": "higher", "status": "failed", "passport": {}}
    found = totals(metrics)
    assert found["vbench/quality_score"]["status"] == "ok"
    for name in ("vbench/semantic_score", "vbench/total_score"):
        assert (found[name]["status"], found[name]["value"]) == ("skipped", None)
        assert "missing: object_class, color, scene; `ditbench vbench" in found[name]["reason"]


def test_scores_on_other_prompts_or_of_other_judges_make_no_total():
    assert totals({name: each | {"passport": {"mode": "custom_input"}} for name, each in drawn().items()}) == {}
    styled = {name.replace("vbench/", "vbench_style/"): each for name, each in drawn().items()}
    assert totals(styled) == {} == totals({})
    mixed = drawn() | {"vbench/scene": entry(0.5, mode="custom_input")}
    assert "missing: scene;" in totals(mixed)["vbench/total_score"]["reason"]


def test_a_score_outside_its_bounds_is_not_clamped_as_theirs_is_not():
    metrics = {f"vbench/{name}": entry(bounds[1]) for name, bounds in QUALITY.items()}
    metrics["vbench/motion_smoothness"] = entry(1.0)
    assert totals(metrics)["vbench/quality_score"]["value"] > 1


def test_the_entry_says_what_it_rests_on_and_a_record_holds_it():
    metrics = drawn()
    metrics["vbench/temporal_flickering"] |= {
        "passport": metrics["vbench/temporal_flickering"]["passport"] | {"static_filter": "not applied"}
    }
    for name, found in totals(metrics).items():
        assert problem_of_metric(name, json.loads(json.dumps(found))) is None
    card = totals(metrics)["vbench/quality_score"]["passport"]
    assert card["dimensions"]["dynamic_degree"] == metrics["vbench/dynamic_degree"]["value"]
    assert card["bounds_and_weights"]["dynamic_degree"] == [0.0, 1.0, 0.5] and card["static_filter"] == "not applied"
    assert card["version"] == "vbench 0.1.5"
    fewest = min(metrics[f"vbench/{name}"]["n"] for name in QUALITY)
    assert totals(metrics)["vbench/quality_score"]["n"] == fewest
    assert "static_filter" not in totals(metrics)["vbench/semantic_score"]["passport"]
    assert vbench_totals.QUALITY_WEIGHT == 4 and len(QUALITY) == 7 and len(SEMANTIC) == 9
