"""MLPerf's score of Wan 2.2 from a record: six dimensions, and whether it was drawn as MLPerf draws."""

from __future__ import annotations

import copy
import json

import pytest

from ditbench.eval.mlperf_wan import DIMENSIONS, NAME, entry
from ditbench.harness.records.record import Record
from ditbench.harness.records.schema import problem_of_metric
from ditbench.harness.scoring import mlperf
from ditbench.harness.sweep.compose import composed

VALUES = dict(zip(DIMENSIONS, (0.95, 0.68, 0.98, 0.21, 0.47, 0.95), strict=True))


def metrics(scale: float = 1.0, mode: str = "vbench_standard") -> dict:
    return {
        f"vbench/{name}": {
            "value": scale * value,
            "n": 72 + place,
            "better": "higher",
            "passport": {"mode": mode, "version": "vbench 0.1.5"},
        }
        for place, (name, value) in enumerate(VALUES.items())
    }


@pytest.fixture(scope="module")
def config() -> dict:
    return composed([["model=wan2.2-t2v-a14b", "protocol=mlperf_wan22", "method=rtn", "bits=fp8"]])[0]


def record(config: dict, found: dict) -> Record:
    return Record("a" * 12, "ok", config, "rtn", config["model"]["name"], "videos", metrics=found)


def test_the_score_is_100_times_the_plain_mean_of_six_dimensions(config):
    found = mlperf.scores_of(record(config, metrics()))[NAME]
    assert found["value"] == pytest.approx(100 * sum(VALUES.values()) / 6) == pytest.approx(70.6667, abs=1e-4)
    assert found["passport"]["reference_score"] == 70.48 and found["passport"]["window"] == [
        pytest.approx(69.7752),
        None,
    ]
    assert found["passport"]["in_window"] is True and found["n"] == 72 and found["ci95"] is None
    assert problem_of_metric(NAME, json.loads(json.dumps(found))) is None


@pytest.mark.parametrize(
    ("scale", "accepted"), [(69.7753 / 70.66666666666667, True), (69.7751 / 70.66666666666667, False)]
)
def test_99_per_cent_of_70_48_is_accepted(scale, accepted, config):
    assert mlperf.scores_of(record(config, metrics(scale)))[NAME]["passport"]["in_window"] is accepted


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("protocol", "steps", 40, "protocol.steps: 40, MLPerf 20"),
        ("protocol", "n", 8, "protocol.n: 8, MLPerf 248"),
        ("protocol", "negative_prompt", None, "protocol.negative_prompt: None, MLPerf 'vivid colors"),
        ("protocol", "noise", "own", "protocol.noise: 'own', MLPerf 'mlperf-wan22-latent'"),
        ("protocol", "guidance_2", 4.0, "protocol.guidance_2: 4.0, MLPerf 3.0"),
        ("model", "name", "wan2.1-t2v-1.3b", "model: wan2.1-t2v-1.3b, MLPerf wan2.2-t2v-a14b"),
        ("model", "size", {"height": 480, "width": 832, "num_frames": 81}, "model.size: {'height': 480"),
    ],
)
def test_of_a_run_that_departs_nothing_is_said_to_be_accepted(section, key, value, said, config):
    other = copy.deepcopy(config)
    other[section][key] = value
    card = mlperf.scores_of(record(other, metrics()))[NAME]["passport"]
    assert card["in_window"] is None and any(line.startswith(said) for line in card["departs_from_mlperf"]), card


def test_what_is_quantized_is_no_departure(config):
    other = copy.deepcopy(config)
    other["protocol"] |= {"scope": "all", "skip": ["proj"], "attention": True}
    assert mlperf.departures(other) == mlperf.departures(config) == []


def test_a_dimension_that_is_missing_is_named():
    found = metrics()
    del found["vbench/scene"]
    skipped = entry(found, [])
    assert skipped["status"] == "skipped" and "missing: scene; `ditbench vbench" in skipped["reason"]
    assert entry(metrics(mode="custom_input"), [])["status"] == "skipped"


def test_runs_under_other_protocols_have_no_such_score(config):
    other = copy.deepcopy(config)
    other["protocol"]["name"] = "default"
    assert mlperf.scores_of(record(other, metrics())) == {}
