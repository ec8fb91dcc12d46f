"""Metrics compute where the run does: the CPU's values on another device, and the arithmetic there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import video_cases
from both_devices import same_there
from operations import counted

from ditbench.eval import batches, features
from ditbench.eval.base import Evidence, FeatureModel, evaluate
from ditbench.eval.inception import _output as features_of
from ditbench.eval.inception import torch_fidelity_network, torch_fidelity_upstream
from ditbench.eval.judges import load_judge
from ditbench.eval.sfid import spatial_features
from ditbench.eval.weights import find_weights
from ditbench.harness.common.devices import CPU
from ditbench.harness.models import zoo
from ditbench.harness.models.zoo import judge as judges_of_the_zoo
from ditbench.harness.samples.samples import Samples

BY_PIXELS = ["psnr", "ssim", "sqnr", "collapse"]
IMAGES = ["clipscore_b32", "clipscore_l14", "clip_iqa", "pick_score", "hpsv2.1"]
CLOSENESS = ["dinov2_similarity", "dino_similarity"]
FRAMES = [
    "vbench_style/subject_consistency", "vbench_style/background_consistency", "vbench_style/overall_consistency", "clipsim",
    "clip_temp",
]  # fmt: skip
MOTION = [
    "vbench_style/temporal_flickering", "vbench_style/dynamic_degree", "vbench_style/motion_smoothness", "warping_error",
    "flow_score",
]  # fmt: skip


def test_pixels_are_compared_there(second, evidence):
    same_there(BY_PIXELS, evidence, second)


def test_clip_looks_at_pictures_there(second, no_hub_cache, judges):
    given = video_cases.evidence()
    images = Samples(given.generated.pixels[:, 0].contiguous(), prompts=given.generated.prompts)
    same_there(IMAGES, replace(given, generated=images), second)


def test_dino_compares_pictures_there(second, no_hub_cache, judges):
    ours, theirs = (Samples(video_cases.evidence(speed).generated.pixels[:2, 3].contiguous()) for speed in (2, 1))
    same_there(CLOSENESS, Evidence(ours, theirs), second)


def test_networks_look_at_frames_there(second, no_hub_cache, judges):
    same_there(FRAMES, video_cases.evidence(), second)


def test_motion_is_found_there(second, no_hub_cache):
    given = video_cases.evidence()
    one = Samples(given.generated.pixels[:1, :4].contiguous())
    same_there(MOTION, replace(given, generated=one), second)


def test_inception_looks_there(second, port_installed, photos):
    path, sha256 = find_weights(torch_fidelity_upstream())
    image_1HWC, there_1HWC = photos.generated.pixels[:1], photos.generated.pixels[:1].clone()
    near, far = (torch_fidelity_network(path, sha256, device) for device in (CPU, second))
    with counted() as ops:
        seen = features_of(there_1HWC, far, 0), spatial_features(there_1HWC, far)
    torch.testing.assert_close(seen, (features_of(image_1HWC, near, 0), spatial_features(image_1HWC, near)))
    assert ops.share_on_second_device() >= 0.99, ops.report()


def test_the_zoos_judge_is_one_for_each_device(second, evidence):
    near, far = (load_judge(zoo.WEIGHTS / "tiny-dit" / "judge", device) for device in (CPU, second))
    assert features.device_of(far.module) == second and near.sha256 == far.sha256
    found = [evaluate(["accuracy"], replace(evidence, judge=judge))["accuracy"]["value"] for judge in (near, far)]
    assert found[0] == found[1]
    seen = [features.outputs(evidence.generated.images_NHWC, each.module, "features") for each in (near, far)]
    assert {tensor.device.type for tensor in seen} == {"cpu"}
    torch.testing.assert_close(*seen)


def test_what_a_judge_saw_on_one_device_is_not_taken_for_what_it_sees_on_another(second, evidence):
    far = judges_of_the_zoo.Judge().eval()
    far.load_state_dict(evidence.judge.module.state_dict())
    given = replace(evidence, judge=FeatureModel("far", far.to(second), evidence.judge.width, "0" * 64), device=second)
    near, there = (features.judge_pair(each).generated_NF for each in (evidence, given))
    assert near is not there
    torch.testing.assert_close(near, there)


def test_large_samples_are_looked_at_few_at_a_time(monkeypatch, evidence):
    whole = evaluate(BY_PIXELS, evidence)
    monkeypatch.setattr(batches, "BYTES", 5 * 26 * 16 * 16 * 3)
    assert batches.together(evidence.generated.pixels, held=26) == 5
    assert batches.together(evidence.generated.pixels, held=26, most=3) == 3
    assert batches.together(torch.zeros(2, 1024, 1024, 3, dtype=torch.uint8), held=26) == 1
    again = [replace(samples, pixels=samples.pixels.clone()) for samples in (evidence.generated, evidence.float_model)]
    few = evaluate(BY_PIXELS, Evidence(*again, resamples=evidence.resamples))
    assert {name: entry["value"] for name, entry in few.items()} == pytest.approx(
        {name: entry["value"] for name, entry in whole.items()}, rel=1e-6
    )
    assert few["psnr"]["value"] == whole["psnr"]["value"], (
        "sums of whole numbers: the same whatever is summed with what"
    )
