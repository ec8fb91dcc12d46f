"""The networks that judge videos: where they are found, what they are shown, what they answer."""

from __future__ import annotations

import pytest
import torch
from video_cases import FRAMES, PROMPTS, N, entry_of, evidence, value

from ditbench.eval import video_judges
from ditbench.eval.base import evaluate
from ditbench.eval.video_judges import CLIP, DINO
from ditbench.harness.common.devices import CPU

pytestmark = pytest.mark.usefixtures("no_hub_cache")
BY_FEATURES = [
    "vbench_style/subject_consistency",
    "vbench_style/background_consistency",
    "vbench_style/scene_consistency",
    "vbench_style/overall_consistency",
    "clip_temp",
    "clipsim",
]


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
        judge, _ = video_judges.load_judge(name, CPU)
        actual = video_judges.frame_features(frames, judge, antialias=False)
        torch.testing.assert_close(actual[0], expected, atol=1e-5, rtol=1e-5)
    text = judge.texts(["ac"])  # <start>, "a", "c" at the end of a word, <end>
    torch.testing.assert_close(text, both.text_embeds, atol=1e-5, rtol=1e-5)


def test_each_video_is_compared_with_its_own_prompt(judges):
    given = evidence()
    judge, _ = video_judges.load_judge(CLIP, CPU)
    features = video_judges.frame_features(given.generated.pixels, judge, antialias=True)
    texts = judge.texts([prompt.text for prompt in PROMPTS])
    expected = torch.stack([(features[row] @ texts[row]).mean() for row in range(N)]).mean()
    swapped = torch.stack([(features[row] @ texts[row - 1]).mean() for row in range(N)]).mean()
    assert abs(expected - swapped) > 1e-3
    assert value("clipsim", given) == pytest.approx(expected.item(), abs=1e-5)


def test_a_prompt_longer_than_the_network_takes_is_cut_and_not_an_error(judges):
    judge, _ = video_judges.load_judge(CLIP, CPU)
    assert judge.texts(["a very long prompt " * 20]).shape == (1, 16)


@pytest.mark.parametrize("name", ["clipsim", "vbench_style/overall_consistency", "vbench_style/scene_consistency"])
def test_the_entry_says_how_many_prompts_were_cut(name, judges):
    """Every letter is a token here, and of twelve two begin and end the text."""
    card = entry_of(name, evidence())["passport"]
    assert (card["max_tokens"], card["prompts_cut_off"]) == (12, 1), "a cat, the sea, a red ball; an old town at night"


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


def test_frames_are_looked_at_once_for_all_metrics_that_share_them(judges, monkeypatch):
    judge, _ = video_judges.load_judge(CLIP, CPU)
    seen = []

    def forward(frames, antialias):
        seen.append(len(frames))
        return torch.ones(len(frames), 16)

    monkeypatch.setattr(judge, "forward", forward)
    evaluate(["clip_temp", "clipsim"], evidence())
    assert sum(seen) == N * FRAMES


def test_frames_that_were_resized_one_way_are_not_taken_for_those_resized_the_other(judges):
    judge, _ = video_judges.load_judge(CLIP, CPU)
    pixels = evidence().generated.pixels
    smooth, sharp = (video_judges.frame_features(pixels, judge, antialias) for antialias in (True, False))
    torch.testing.assert_close(sharp, video_judges.frame_features(pixels.clone(), judge, antialias=False))
    assert (smooth - sharp).abs().max() > 1e-4


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
    judge, origin = video_judges.load_judge(name, CPU)
    assert {parameter.dtype for parameter in judge.parameters()} == {torch.float32} and origin["dtype"] == "float32"
