"""PickScore on a small random CLIPModel with a tokenizer of another folder, as the authors have it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ditbench.eval import clip_h14, pick_score
from ditbench.eval.base import Evidence, evaluate, evaluate_samples, known_metrics
from ditbench.eval.needs import lacking, offered
from ditbench.harness.samples.samples import Prompt, Samples

pytestmark = pytest.mark.usefixtures("no_hub_cache")
NAME, TEXTS = "pick_score", ("a cat", "dogs", "the long road home")


@pytest.fixture
def given() -> Evidence:
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (3, 50, 61, 3), dtype=np.uint8))
    return Evidence(Samples(pixels, prompts=tuple(Prompt(text) for text in TEXTS)))


def test_it_is_the_authors_example_with_transformers_own_processor(judges, judge_folders, given):
    """Their README: normalised features of both, exp(logit_scale) times their product; PIL, 77 tokens (12 here)."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(judge_folders / pick_score.HUB).eval()
    words = AutoTokenizer.from_pretrained(judge_folders / clip_h14.NAME)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = []
    for image, text in zip(given.generated.pixels, TEXTS, strict=True):
        pixels = processor(Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"]
        ids = words(text, padding=True, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].double()
            read = model.text_projection(model.text_model(**ids).pooler_output)[0].double()
            expected.append(float(model.logit_scale.exp() * (seen / seen.norm()) @ (read / read.norm())))
    entries, kept = evaluate_samples([NAME], given)
    assert entries[NAME]["status"] == "ok", entries[NAME]["reason"]
    assert np.std(expected) > 1, "they differ"
    np.testing.assert_allclose(kept[NAME].values_N, expected, atol=0.1)  # a grey level here or there: see test_clip.py
    assert entries[NAME]["value"] == pytest.approx(kept[NAME].values_N.mean())
    assert entries[NAME]["ci95"][0] < entries[NAME]["value"] < entries[NAME]["ci95"][1]


def test_the_temperature_is_the_trained_one(judges, given):
    card = evaluate([NAME], given)[NAME]["passport"]
    assert card["scale"] == pytest.approx(50.0, rel=1e-6), "conftest's; transformers begins with 14.3"


def test_the_passport_says_what_could_move_the_number(judges, judge_folders, given):
    card = evaluate([NAME], given)[NAME]["passport"]
    file = judge_folders / pick_score.HUB / "model.safetensors"
    assert card["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert card["tokenizer"] == clip_h14.NAME and card["antialias"] is True and card["dtype"] == "float32"
    assert (card["max_tokens"], card["prompts_cut_off"]) == (12, 1)


@pytest.mark.parametrize("absent", ["weights", "tokenizer"])
def test_what_is_not_here_is_skipped_with_the_command_and_announced(
    absent, judge_folders, given, tmp_path, monkeypatch
):
    here = {"weights": clip_h14.NAME, "tokenizer": pick_score.HUB}[absent]
    (tmp_path / here).parent.mkdir(parents=True)
    (tmp_path / here).symlink_to(judge_folders / here)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate([NAME], given)[NAME]
    command = {"weights": "`ditbench data fetch pick-score`", "tokenizer": "`ditbench data fetch clip-h14`"}[absent]
    assert entry["status"] == "skipped" and command in entry["reason"]
    assert lacking(known_metrics()[NAME], offered(given)) == [entry["reason"]]


def test_a_damaged_file_is_skipped_with_what_to_do(judge_folders, given, tmp_path, monkeypatch):
    home = tmp_path / pick_score.HUB
    home.mkdir(parents=True)
    (home / "config.json").write_bytes((judge_folders / pick_score.HUB / "config.json").read_bytes())
    (home / "model.safetensors").write_bytes(b"<html>404</html>")
    (tmp_path / clip_h14.NAME).parent.mkdir(parents=True)
    (tmp_path / clip_h14.NAME).symlink_to(judge_folders / clip_h14.NAME)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate([NAME], given)[NAME]
    assert entry["status"] == "skipped" and f"`hf download {pick_score.HUB} --force-download`" in entry["reason"]


def test_pictures_without_prompts_and_videos_have_no_score(judges, given):
    assert "no prompts" in evaluate([NAME], Evidence(Samples(given.generated.pixels)))[NAME]["reason"]
    videos = replace(given, generated=replace(given.generated, pixels=given.generated.pixels[:, None]))
    assert "these are videos" in evaluate([NAME], videos)[NAME]["reason"]
