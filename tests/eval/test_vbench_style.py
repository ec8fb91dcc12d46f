"""Every VBench-style metric, with small random networks of the real classes for judges."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from video_cases import FRAMES, PROMPTS, SIDE, N, entry_of, evidence, value, videos

from ditbench.eval import vbench_style, video_judges, video_motion
from ditbench.eval.base import Evidence, evaluate, known_metrics
from ditbench.eval.flow import Flow
from ditbench.eval.video_judges import CLIP_LARGE, DINO
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Samples

pytestmark = pytest.mark.usefixtures("no_hub_cache")
VIDEO_METRICS = [name for name in known_metrics() if name.startswith("vbench_style/")] + [
    "clip_temp",
    "clipsim",
    "flow_score",
    "warping_error",
]


def test_identical_frames_are_steady_in_every_respect(judges):
    still = evidence(speed=0)
    for name in ("temporal_flickering", "subject_consistency", "background_consistency", "motion_smoothness"):
        assert value(f"vbench_style/{name}", still) == pytest.approx(1.0, abs=1e-5), name
    assert value("clip_temp", still) == pytest.approx(100.0, abs=1e-3)
    for name in ("vbench_style/dynamic_degree", "flow_score", "warping_error"):
        assert value(name, still) == 0.0, name


def test_a_moving_square_is_dynamic_and_its_flow_is_its_speed_on_its_area():
    assert value("vbench_style/dynamic_degree", evidence(speed=2)) == 1.0
    slow, fast = value("flow_score", evidence(speed=1)), value("flow_score", evidence(speed=2))
    area = 8 * 8 / SIDE**2
    assert 1 * area <= slow <= 4 * area and fast == pytest.approx(2 * slow, rel=0.4)
    assert 0.9 < value("vbench_style/temporal_flickering", evidence(speed=2)) < 1.0


def test_motion_is_judged_at_eight_frames_a_second():
    """At 16 frames per second every other frame is taken: half a pixel a frame becomes a whole one."""
    entry = entry_of("vbench_style/dynamic_degree", evidence(speed=1, fps=16.0))
    assert entry["passport"]["every_frame"] == 2 and entry["passport"]["pairs_needed"] == 1
    for fps, step in ((8.0, 1), (11.0, 1), (15.0, 2), (30.0, 4)):  # to the nearest, as VBench's round(fps / 8)
        card = entry_of("vbench_style/dynamic_degree", evidence(speed=1, fps=fps))["passport"]
        assert card["every_frame"] == step
    one_left = Evidence(Samples(videos()[:, :2], fps=24.0))
    assert (
        "longer videos" in evaluate(["vbench_style/dynamic_degree"], one_left)["vbench_style/dynamic_degree"]["reason"]
    )


def test_speeds_of_every_frame_are_not_taken_for_those_of_every_second_one():
    pixels, flow = videos(), Flow("test", lambda before, after: after.float().permute(0, 3, 1, 2)[:, :2], {})
    every_second = video_motion._speeds(pixels, flow, step=2)
    assert every_second.shape == (N, FRAMES // 2 - 1, 2)
    every_one = video_motion._speeds(pixels, flow, step=1)
    assert every_one.shape == (N, FRAMES - 1, 2)
    torch.testing.assert_close(every_one[:, 1::2][:, :3], every_second)  # this flow looks at the later frame only


def test_smoothness_is_of_the_odd_frames_against_the_middle_of_their_neighbours(monkeypatch):
    """Without motion the middle is the mean: |100 − (10 + 30) / 2| = 80 and |40 − (30 + 50) / 2| = 0."""
    still = Flow("ditbench", lambda before, after: torch.zeros(len(before), 2, *before.shape[1:3]), {})
    monkeypatch.setattr(video_motion, "find_flow", lambda device: still)
    levels = torch.tensor([10, 100, 30, 40, 50], dtype=torch.uint8).view(1, 5, 1, 1, 1).expand(2, 5, 8, 8, 3)
    assert value("vbench_style/motion_smoothness", Evidence(Samples(levels))) == pytest.approx(1 - 40 / 255)


def test_steady_motion_is_smoother_than_the_same_frames_shuffled():
    steady = videos(speed=1)
    shuffled = steady[:, [0, 4, 1, 6, 2, 5, 3, 7]]
    name = "vbench_style/motion_smoothness"
    assert value(name, Evidence(Samples(steady))) > value(name, Evidence(Samples(shuffled))) + 0.005


def test_flicker_raises_the_warping_error_and_motion_alone_hardly_does():
    moving = videos(speed=2)
    flickering = moving.clone()
    flickering[:, ::2] += 40
    steady = value("warping_error", Evidence(Samples(moving)))
    assert steady < 1e-3
    square_of_step = (40 / 255) ** 2  # less where the flow finds a pixel of the right brightness elsewhere
    assert 0.5 * square_of_step < value("warping_error", Evidence(Samples(flickering))) < 1.1 * square_of_step


def test_only_prompts_of_the_dimension_count_where_prompts_say_theirs(judges):
    dimensions = (["scene"], ["scene", "overall_consistency"], ["overall_consistency"], ["subject_consistency"])
    prompts = tuple(replace(p, about={"dimension": d}) for p, d in zip(PROMPTS, dimensions, strict=True))
    given = replace(evidence(), generated=replace(evidence().generated, prompts=prompts))
    entries = evaluate(["vbench_style/scene_consistency", "vbench_style/overall_consistency", "clipsim"], given)
    assert [entry["n"] for entry in entries.values()] == [2, 2, N]
    per_video = [
        value(
            "vbench_style/scene_consistency", Evidence(Samples(videos()[row : row + 1], prompts=PROMPTS[row : row + 1]))
        )
        for row in range(2)
    ]
    assert entries["vbench_style/scene_consistency"]["value"] == pytest.approx(sum(per_video) / 2, abs=1e-6)
    skipped = evaluate(["vbench_style/dynamic_degree"], given)["vbench_style/dynamic_degree"]
    assert skipped["status"] == "skipped" and "dimension dynamic_degree" in skipped["reason"]


def test_the_passports_name_every_judge_that_is_not_vbenchs(judges):
    given = evidence()
    passports = {name: entry_of(f"vbench_style/{name}", given)["passport"] for name in (
        "motion_smoothness", "dynamic_degree", "scene_consistency", "overall_consistency", "temporal_flickering",
        "subject_consistency",
    )}  # fmt: skip
    assert "AMT" in passports["motion_smoothness"]["interpolator"]
    assert "not RAFT" in passports["dynamic_degree"]["flow"]
    assert "Tag2Text" in passports["scene_consistency"]["judge_is"]
    assert "ViCLIP" in passports["overall_consistency"]["judge_is"]
    assert "not applied" in passports["temporal_flickering"]["static_filter"]
    dino = passports["subject_consistency"]
    assert dino["features"] == DINO and len(dino["weights_sha256"]) == 64 and dino["antialias"] is False
    assert dino["resize"] == "bilinear, short side to 24"


def test_the_aesthetic_head_is_linear_on_unit_features_over_ten(judges, tmp_path, monkeypatch):
    name = "vbench_style/aesthetic_quality"
    assert "ditbench data fetch laion-aesthetic" in evaluate([name], evidence())[name]["reason"]
    (tmp_path / "weights").mkdir()
    weight = torch.linspace(-1, 1, 12)[None]
    path = tmp_path / "weights" / vbench_style.AESTHETIC_FILE
    torch.save({"weight": weight, "bias": torch.tensor([5.0])}, path)
    judge, _ = video_judges.load_judge(CLIP_LARGE, CPU)
    features = video_judges.frame_features(evidence().generated.pixels, judge, antialias=False)
    entry = entry_of(name, evidence())
    assert entry["value"] == pytest.approx(((features @ weight[0]).mean().item() + 5.0) / 10, abs=1e-5)
    assert entry["passport"]["head_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_imaging_quality_is_musiqs_score_over_a_hundred_and_names_the_package_when_it_is_missing(monkeypatch):
    name = "vbench_style/imaging_quality"
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert "pip install pyiqa" in evaluate([name], evidence())[name]["reason"]
    monkeypatch.setattr("importlib.util.find_spec", lambda package: True)
    monkeypatch.setattr("ditbench.eval.passport.version", lambda package: "0")
    brightness = SimpleNamespace(create_metric=lambda model, device: lambda frames: 100 * frames.mean(dim=(1, 2, 3)))
    monkeypatch.setitem(sys.modules, "pyiqa", brightness)
    assert value(name, evidence()) == pytest.approx(videos().float().mean().item() / 255, abs=1e-5)


@pytest.mark.parametrize("name", VIDEO_METRICS)
def test_images_are_skipped_with_that_reason(name):
    entry = evaluate([name], Evidence(Samples(videos()[:, 0], prompts=PROMPTS)))[name]
    assert entry["status"] == "skipped" and "these are images" in entry["reason"]


def test_text_metrics_without_prompts_are_skipped(judges):
    for name in ("clipsim", "vbench_style/overall_consistency", "vbench_style/scene_consistency"):
        assert "needs the prompts" in evaluate([name], Evidence(Samples(videos())))[name]["reason"]
