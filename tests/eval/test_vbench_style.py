"""Definitions against hand-counted numbers, and every metric against small random networks of the real classes."""

import hashlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval import vbench_style, video_judges, video_motion, video_text
from eval.base import Evidence, Prompt, Samples, evaluate, known_metrics
from eval.flow import Flow
from eval.video_judges import CLIP, CLIP_LARGE, DINO

N, FRAMES, SIDE = 4, 8, 32
VIDEO_METRICS = [name for name in known_metrics() if name.startswith("vbench_style/")] + [
    "clip_temp",
    "clipsim",
    "flow_score",
    "warping_error",
]
BY_FEATURES = [
    "vbench_style/subject_consistency",
    "vbench_style/background_consistency",
    "vbench_style/scene_consistency",
    "vbench_style/overall_consistency",
    "clip_temp",
    "clipsim",
]


def videos(speed: int = 2, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures with a bright square that moves `speed` pixels a frame, uint8 (N, F, H, W, 3)."""
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(N, 3, 4, 4, generator=random) * 100
    scene_NHWC = torch.nn.functional.interpolate(small, size=SIDE, mode="bilinear").permute(0, 2, 3, 1)
    frames_NFHWC = scene_NHWC[:, None].repeat(1, FRAMES, 1, 1, 1)
    square = torch.rand(8, 8, 3, generator=random) * 100 + 150
    for t in range(FRAMES):
        left = 4 + t * speed
        frames_NFHWC[:, t, 10:18, left : left + 8] = square
    return frames_NFHWC.round().to(torch.uint8)


PROMPTS = tuple(Prompt(text) for text in ("a cat", "the sea", "a red ball", "an old town at night"))


def evidence(speed: int = 2, **fields) -> Evidence:
    return Evidence(Samples(videos(speed), prompts=PROMPTS, **fields), resamples=50)


def entry_of(name: str, given: Evidence) -> dict:
    entry = evaluate([name], given)[name]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["n"] > 0 and (entry["ci95"] or entry["n"] == 1), "one video alone says nothing of the spread"
    low, high = entry["ci95"] or (entry["value"], entry["value"])
    assert low <= entry["value"] <= high
    assert entry["passport"]["implementation"] and not entry["paired"]
    return entry


def value(name: str, given: Evidence) -> float:
    return entry_of(name, given)["value"]


@pytest.fixture(scope="session")
def judge_folders(tmp_path_factory):
    """Small random networks of the same classes, saved as `hf download` would leave them."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("judges")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(**sizes, image_size=24, patch_size=8)).save_pretrained(root / DINO)
        for name, width in ((CLIP, 16), (CLIP_LARGE, 12)):
            vision = sizes | {"image_size": 24, "patch_size": 8}
            config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
            clip, generator = CLIPModel(config), torch.Generator().manual_seed(width)
            for parameter in clip.parameters():
                if parameter.ndim > 1:  # large enough that texts differ, and not transformers' own start
                    parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            clip.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def judges(judge_folders, monkeypatch):
    monkeypatch.setenv("DITBENCH_JUDGES", str(judge_folders))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("DITBENCH_JUDGES", raising=False)


# The definitions, on numbers counted by hand.


def test_flickering_is_one_minus_the_mean_step_between_frames_over_255():
    levels = torch.tensor([10, 61, 61], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 4, 3)
    assert vbench_style.flickering(levels).item() == pytest.approx(1 - (51 + 0) / 2 / 255)
    assert vbench_style.flickering(levels[1:]).item() == 1.0


def test_consistency_averages_the_cosines_to_the_first_and_the_previous_frame():
    c, s = 0.6, 0.8
    features = torch.tensor([[1.0, 0.0], [c, s], [0.0, 1.0]])
    # frame 1: first c, previous c; frame 2: first 0, previous s
    assert vbench_style.consistency(features).item() == pytest.approx((c + c + 0 + s) / 4)


def test_consistency_counts_an_opposite_frame_as_zero_and_not_as_minus_one():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert vbench_style.consistency(features).item() == pytest.approx((0 + 0 + 0 + 1) / 4)


def test_a_video_is_dynamic_when_enough_pairs_are_faster_than_the_threshold():
    assert video_motion.dynamic_threshold(256) == 6.0 and video_motion.dynamic_threshold(32) == 0.75
    assert [video_motion.dynamic_pairs(frames) for frames in (2, 4, 16, 49)] == [1, 1, 4, 12]
    fastest = torch.tensor([0.76, 0.76, 0.75, 0.0, 0.9, 0.8])
    assert video_motion.is_dynamic(fastest, side=32, frames=16)
    assert not video_motion.is_dynamic(fastest[:5], side=32, frames=16)
    assert not video_motion.is_dynamic(fastest, side=64, frames=16)


def test_the_fastest_speed_is_the_mean_of_the_top_five_percent():
    speed = torch.zeros(2, 5, 8)
    speed[0, 0, :3] = torch.tensor([4.0, 2.0, 1.0])  # 5 % of 40 pixels are two
    torch.testing.assert_close(video_motion.fastest(speed), torch.tensor([3.0, 0.0]))
    assert video_motion.fastest(torch.full((1, 2, 2), 7.0)).item() == 7.0


def test_smoothness_compares_odd_frames_and_leaves_the_last_of_an_even_number_out():
    left_out = torch.tensor([30, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 4, 3)
    middle = torch.full((1, 4, 4, 3), 81, dtype=torch.uint8)
    assert video_motion.smoothness(left_out, middle).item() == pytest.approx(1 - 51 / 255)


def test_a_frame_between_two_of_a_pan_is_found_half_way():
    """With the true flow of a pan of 2 pixels, the middle frame is the one moved by 1."""
    wide = torch.rand(16, 24, 3, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    pan = torch.stack([wide[:, t : t + 16] for t in (0, 1, 2)])
    to_after = torch.tensor([-2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 16, 16)

    def true_flow(before, after):
        return to_after if torch.equal(before, pan[:1]) else -to_after

    middle = video_motion.interpolated(pan[::2], Flow("test", true_flow, {}))
    torch.testing.assert_close(middle[:, :, 1:-1], pan[1:2, :, 1:-1])


def test_pixels_without_a_way_back_and_motion_boundaries_are_occluded():
    still, moving = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8)
    moving[:, 0, :, 4:] = 2.0  # the right half moves, and says that it moves back
    assert not video_motion.occluded(still, still).any()
    boundary = video_motion.occluded(moving, -moving)
    assert boundary[0, :, 3].all() and not boundary[0, :, :2].any() and not boundary[0, :, 4:].any()
    one_way = video_motion.occluded(moving, still)
    assert one_way[0, :, 4:].all() and not one_way[0, :, :3].any()


def test_small_disagreement_of_way_and_way_back_is_no_occlusion():
    way = torch.full((1, 2, 4, 4), 3.0)  # |w|² = 18, so up to 0.01 · (18 + |ŵ|²) + 0.5 is allowed
    assert not video_motion.occluded(way, -way + 0.6).any()  # 0.72 < 0.01 · (18 + 11.52) + 0.5
    assert video_motion.occluded(way, -way + 0.7).all()  # 0.98 > 0.01 · (18 + 10.58) + 0.5


def test_the_warping_error_is_the_mean_square_over_visible_pixels_only():
    frame, warped = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4)
    warped[:, :, 0, 0], warped[:, 0, 0, 1] = 1.0, 0.6
    hidden = torch.tensor([[[True, False, False, False]], [[True, True, True, True]]])
    errors = video_motion.masked_error(frame, warped, hidden)
    torch.testing.assert_close(errors[0], torch.tensor(0.36 / 9))
    torch.testing.assert_close(errors[1], torch.tensor((1.0 + 0.36 / 3) / 4))


def test_neighbouring_frames_are_compared_with_each_other_and_not_with_the_first():
    features = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    assert video_text.neighbour_cosine(features).item() == pytest.approx((0.6 + 0.8) / 2)


def test_vbench_looks_at_the_middles_of_eight_equal_parts():
    assert video_text.middle_frames(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert video_text.middle_frames(49, 8) == [2, 8, 14, 20, 26, 32, 38, 45]
    assert video_text.middle_frames(3, 8) == [0, 1, 2]


def test_resizing_keeps_the_aspect_and_only_the_antialiased_one_is_in_whole_levels():
    frames = torch.randint(0, 256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    as_pil = video_judges.resize_short_side(frames, 24, "bicubic", antialias=True)
    as_vbench = video_judges.resize_short_side(frames, 24, "bicubic", antialias=False)
    assert as_pil.shape == as_vbench.shape == (2, 3, 24, 36)
    assert torch.equal(as_pil, as_pil.round()) and as_pil.min() >= 0 and as_pil.max() <= 255
    assert not torch.equal(as_vbench, as_vbench.round()) and as_vbench.std() > 1.2 * as_pil.std()
    cropped = video_judges.center_crop(as_pil, 24)
    assert torch.equal(cropped, as_pil[..., 6:30])


# The metrics.


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
    one_left = Evidence(Samples(videos()[:, :2], fps=24.0))
    assert (
        "longer videos" in evaluate(["vbench_style/dynamic_degree"], one_left)["vbench_style/dynamic_degree"]["reason"]
    )


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


def test_the_features_are_those_of_transformers_own_preprocessing(judge_folders, judges):
    """Frames already of the network's size: only the constants and the head are left to go wrong."""
    from transformers import CLIPModel, ViTModel

    frames = torch.randint(0, 256, (1, 2, 24, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    unit = frames[0].permute(0, 3, 1, 2) / 255.0
    vit, clip = ViTModel.from_pretrained(judge_folders / DINO), CLIPModel.from_pretrained(judge_folders / CLIP)
    with torch.no_grad():
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        dino = vit((unit - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
        mean, std = torch.tensor(video_judges.OPENAI[0]), torch.tensor(video_judges.OPENAI[1])
        pixels = (unit - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        tokens = {"input_ids": torch.tensor([[0, 2, 30, 1]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
        both = clip(pixel_values=pixels, **tokens)
    for name, expected in ((DINO, torch.nn.functional.normalize(dino, dim=-1)), (CLIP, both.image_embeds)):
        judge, _ = video_judges.load_judge(name)
        actual = video_judges.frame_features(frames, judge, antialias=False)
        torch.testing.assert_close(actual[0], expected, atol=1e-5, rtol=1e-5)
    text = judge.texts(["ac"])  # <start>, "a", "c" at the end of a word, <end>
    torch.testing.assert_close(text, both.text_embeds, atol=1e-5, rtol=1e-5)


def test_each_video_is_compared_with_its_own_prompt(judges):
    given = evidence()
    judge, _ = video_judges.load_judge(CLIP)
    features = video_judges.frame_features(given.generated.pixels, judge, antialias=True)
    texts = judge.texts([prompt.text for prompt in PROMPTS])
    expected = torch.stack([(features[row] @ texts[row]).mean() for row in range(N)]).mean()
    swapped = torch.stack([(features[row] @ texts[row - 1]).mean() for row in range(N)]).mean()
    assert abs(expected - swapped) > 1e-3
    assert value("clipsim", given) == pytest.approx(expected.item(), abs=1e-5)


def test_a_prompt_longer_than_the_network_takes_is_cut_and_not_an_error(judges):
    judge, _ = video_judges.load_judge(CLIP)
    assert judge.texts(["a very long prompt " * 20]).shape == (1, 16)


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


@pytest.mark.parametrize("name", BY_FEATURES)
def test_a_judge_that_is_not_here_is_skipped_with_the_command_that_fetches_it(name):
    reason = evaluate([name], evidence())[name]["reason"]
    assert "hf download openai/clip-vit-base-patch32" in reason or "hf download facebook/dino-vitb16" in reason


def test_a_judge_in_the_hugging_face_cache_is_found_there(tmp_path):
    repository = tmp_path / "hub" / "models--facebook--dino-vitb16"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    assert video_judges.judge_folder(DINO) == snapshot


def test_a_judge_whose_folder_is_not_whole_is_skipped_too(tmp_path, monkeypatch):
    (tmp_path / DINO).mkdir(parents=True)
    (tmp_path / DINO / "config.json").write_text("{}")
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate(["vbench_style/subject_consistency"], evidence())["vbench_style/subject_consistency"]
    assert entry["status"] == "skipped" and f"hf download {DINO}" in entry["reason"]


def test_the_aesthetic_head_is_linear_on_unit_features_over_ten(judges, tmp_path, monkeypatch):
    name = "vbench_style/aesthetic_quality"
    assert "ditbench data fetch laion-aesthetic" in evaluate([name], evidence())[name]["reason"]
    (tmp_path / "weights").mkdir()
    weight = torch.linspace(-1, 1, 12)[None]
    path = tmp_path / "weights" / vbench_style.AESTHETIC_FILE
    torch.save({"weight": weight, "bias": torch.tensor([5.0])}, path)
    judge, _ = video_judges.load_judge(CLIP_LARGE)
    features = video_judges.frame_features(evidence().generated.pixels, judge, antialias=False)
    entry = entry_of(name, evidence())
    assert entry["value"] == pytest.approx(((features @ weight[0]).mean().item() + 5.0) / 10, abs=1e-5)
    assert entry["passport"]["head_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_imaging_quality_is_musiqs_score_over_a_hundred_and_names_the_package_when_it_is_missing(monkeypatch):
    name = "vbench_style/imaging_quality"
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert "pip install pyiqa" in evaluate([name], evidence())[name]["reason"]
    monkeypatch.setattr("importlib.util.find_spec", lambda package: True)
    monkeypatch.setattr("eval.passport.version", lambda package: "0")
    brightness = SimpleNamespace(create_metric=lambda model, device: lambda frames: 100 * frames.mean(dim=(1, 2, 3)))
    monkeypatch.setitem(sys.modules, "pyiqa", brightness)
    assert value(name, evidence()) == pytest.approx(videos().float().mean().item() / 255, abs=1e-5)


def test_musiq_sees_large_frames_smaller_and_small_ones_as_they_are():
    assert vbench_style.musiq_frames(torch.zeros(1, 3, 300, 1024, dtype=torch.uint8)).shape == (1, 3, 150, 512)
    small = torch.randint(0, 256, (1, 3, 20, 30), dtype=torch.uint8)
    torch.testing.assert_close(vbench_style.musiq_frames(small), small / 255.0)


@pytest.mark.parametrize("name", VIDEO_METRICS)
def test_images_are_skipped_with_that_reason(name):
    entry = evaluate([name], Evidence(Samples(videos()[:, 0], prompts=PROMPTS)))[name]
    assert entry["status"] == "skipped" and "these are images" in entry["reason"]


def test_text_metrics_without_prompts_are_skipped(judges):
    for name in ("clipsim", "vbench_style/overall_consistency", "vbench_style/scene_consistency"):
        assert "needs the prompts" in evaluate([name], Evidence(Samples(videos())))[name]["reason"]


def test_frames_are_looked_at_once_for_all_metrics_that_share_them(judges, monkeypatch):
    judge, _ = video_judges.load_judge(CLIP)
    seen = []

    def forward(frames, antialias):
        seen.append(len(frames))
        return torch.ones(len(frames), 16)

    monkeypatch.setattr(judge, "forward", forward)
    evaluate(["clip_temp", "clipsim"], evidence())
    assert sum(seen) == N * FRAMES


@pytest.mark.parametrize("name", [DINO, CLIP])
def test_judges_look_in_float32_as_the_passport_says_whatever_their_file_holds(
    name, judge_folders, tmp_path, monkeypatch
):
    from transformers import CLIPModel, CLIPTokenizer, ViTModel

    classes = {DINO: ViTModel, CLIP: CLIPModel}
    classes[name].from_pretrained(judge_folders / name).half().save_pretrained(tmp_path / name)
    if name == CLIP:
        CLIPTokenizer.from_pretrained(judge_folders / name).save_pretrained(tmp_path / name)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    judge, origin = video_judges.load_judge(name)
    assert {parameter.dtype for parameter in judge.parameters()} == {torch.float32} and origin["dtype"] == "float32"
