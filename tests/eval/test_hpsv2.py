"""HPSv2.1 on a small random checkpoint of the real layout, read as the real one is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import open_clip_cases as cases
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize, to_tensor

from ditbench.eval import clip_h14, hpsv2
from ditbench.eval.base import Evidence, evaluate, evaluate_samples
from ditbench.eval.clip import DEVIATION, MEAN
from ditbench.eval.needs import lacking, offered
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Prompt, Samples

pytestmark = pytest.mark.usefixtures("no_hub_cache")
NAME, TEXTS = "hpsv2.1", ("a cat", "dogs", "the long road home", "&amp;amp; b")
SIDE = cases.VISION["side"]


@pytest.fixture
def given() -> Evidence:
    """Pictures that are not square and are made smaller."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (4, 50, 61, 3), dtype=np.uint8))
    return Evidence(Samples(pixels, prompts=tuple(Prompt(text) for text in TEXTS)))


def prepared_by_hand(image_HWC: torch.Tensor) -> torch.Tensor:
    """The longer side to SIDE, the picture in the middle of a black square, then CLIP's constants."""
    unit = to_tensor(Image.fromarray(image_HWC.numpy()))
    height, width = unit.shape[1:]
    size = (round(height * SIDE / max(height, width)), round(width * SIDE / max(height, width)))
    small = resize(unit, list(size), InterpolationMode.BICUBIC, antialias=True)
    square = torch.zeros(3, SIDE, SIDE)
    top, left = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    square[:, top : top + size[0], left : left + size[1]] = small
    return (square - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def token_ids(text: str) -> list[int]:
    """Letters, those at the end of a word apart; start 0, end 1, at most 12 in all (conftest's tokenizer). & is unknown."""
    ids = []
    for word in text.split():
        ids += [ord(letter) - ord("a") + 2 for letter in word[:-1]] + [ord(word[-1]) - ord("a") + 28]
    return [0, *ids[:10], 1]


@pytest.mark.parametrize("size", [(50, 61), (61, 50), (80, 80), (20, 31), (24, 24)])
def test_pictures_are_fitted_into_a_black_square_and_never_cropped(size):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours = hpsv2.prepare(image.permute(2, 0, 1)[None], SIDE)
    torch.testing.assert_close(ours[0], prepared_by_hand(image))
    black = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    bars = round(SIDE * min(size) / max(size)) < SIDE
    corner = ours[0, :, 0, 0]
    assert torch.allclose(corner, black) == bars


def test_the_score_is_100_cosines_of_a_slow_forward_pass(judges, given):
    entries, kept = evaluate_samples([NAME], given)
    entry = entries[NAME]
    assert entry["status"] == "ok", entry["reason"]
    state = cases.random_state()
    expected = [
        100 * float(cases.seen(state, prepared_by_hand(image)) @ cases.read(state, token_ids(text)))
        for image, text in zip(given.generated.pixels, TEXTS[:3], strict=False)
    ]
    assert np.std(expected) > 1, "they differ"
    np.testing.assert_allclose(kept[NAME].values_N[:3], expected, atol=2e-3)
    assert entry["value"] == pytest.approx(kept[NAME].values_N.mean()) and entry["n"] == 4
    assert entry["better"] == "higher" and entry["ci95"][0] < entry["value"] < entry["ci95"][1]


def test_each_picture_is_scored_with_its_own_prompt(judges, given):
    alone = replace(given, generated=Samples(given.generated.pixels[1:2], prompts=given.generated.prompts[1:2]))
    value = evaluate([NAME], alone)[NAME]["value"]
    assert value == pytest.approx(evaluate_samples([NAME], given)[1][NAME].values_N[1], abs=1e-4)


def test_prompts_are_unescaped_twice_and_those_that_are_not_ascii_are_counted(judges, given):
    assert hpsv2.clean(" &amp;lt;b&amp;gt; ") == "<b>" and hpsv2.clean("a &amp; b") == "a & b"
    said = tuple(Prompt(text) for text in ("a cat", "caf\u00e9", "it\u2019s", "dogs"))
    card = evaluate([NAME], replace(given, generated=replace(given.generated, prompts=said)))[NAME]["passport"]
    assert card["prompts_not_ascii"] == 2 and card["text"] == "HTML unescaped; no ftfy"


def test_the_passport_says_what_could_move_the_number(judges, judge_folders, given):
    card = evaluate([NAME], given)[NAME]["passport"]
    file = judge_folders / hpsv2.HUB / hpsv2.FILE
    assert card["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (card["scale"], card["antialias"], card["dtype"], card["max_tokens"]) == (100.0, True, "float32", 12)
    assert card["prompts_cut_off"] == 1 and card["tokenizer"] == clip_h14.NAME and "black bars" in card["resize"]


@pytest.mark.parametrize("absent", ["weights", "tokenizer"])
def test_what_is_not_here_is_skipped_with_the_command_and_announced(
    absent, judge_folders, given, tmp_path, monkeypatch
):
    here = {"weights": clip_h14.NAME, "tokenizer": hpsv2.HUB}[absent]
    (tmp_path / here).parent.mkdir(parents=True)
    (tmp_path / here).symlink_to(judge_folders / here)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate([NAME], given)[NAME]
    command = {"weights": "`ditbench data fetch hpsv2.1`", "tokenizer": "`ditbench data fetch clip-h14`"}[absent]
    assert entry["status"] == "skipped" and command in entry["reason"]
    from ditbench.eval.base import known_metrics

    assert lacking(known_metrics()[NAME], offered(given)) == [entry["reason"]]


@pytest.mark.parametrize("damage", ["html", "no state", "a tensor less", "a tensor more", "another size"])
def test_a_checkpoint_that_is_not_whole_is_skipped_with_the_reason(damage, judge_folders, given, tmp_path, monkeypatch):
    file = tmp_path / hpsv2.HUB / hpsv2.FILE
    file.parent.mkdir(parents=True)
    (tmp_path / clip_h14.NAME).parent.mkdir(parents=True)
    (tmp_path / clip_h14.NAME).symlink_to(judge_folders / clip_h14.NAME)
    state = cases.random_state()
    if damage == "a tensor less":
        del state["visual.ln_post.bias"]
    elif damage == "a tensor more":
        state["score_predictor.layers.0.weight"] = torch.zeros(1)
    elif damage == "another size":
        state["visual.proj"] = state["visual.proj"][:, :-1].clone()
    if damage == "html":
        file.write_bytes(b"<html>404</html>")
    else:
        torch.save({"weights": state} if damage == "no state" else {"state_dict": state}, file)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate([NAME], given)[NAME]
    assert entry["status"] == "skipped" and "not HPSv2.1's checkpoint" in entry["reason"], entry
    assert "--force-download" in entry["reason"]


def test_pictures_without_prompts_and_videos_have_no_score(judges, given):
    assert "no prompts" in evaluate([NAME], Evidence(Samples(given.generated.pixels)))[NAME]["reason"]
    videos = Samples(given.generated.pixels[:, None], prompts=given.generated.prompts)
    assert "these are videos" in evaluate([NAME], Evidence(videos))[NAME]["reason"]


def test_a_checkpoint_in_half_precision_is_looked_through_in_float32(judge_folders, tmp_path):
    file = tmp_path / "half.pt"
    torch.save({"state_dict": {name: tensor.half() for name, tensor in cases.random_state().items()}}, file)
    module = hpsv2.load(file, judge_folders / clip_h14.NAME, CPU).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
