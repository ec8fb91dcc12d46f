"""DINO's similarity to the float model's samples, with small random networks of the real classes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from ditbench.eval import dino_similarity
from ditbench.eval.base import Evidence, evaluate, evaluate_samples, known_metrics
from ditbench.eval.dino_similarity import DINOV2
from ditbench.eval.video_judges import DINO, IMAGENET
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Samples

pytestmark = pytest.mark.usefixtures("no_hub_cache")
BOTH = {"dinov2_similarity": DINOV2, "dino_similarity": DINO}


def pictures(n: int = 3, size: tuple[int, int] = (50, 61)) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    small = torch.rand(n, 3, 5, 5, generator=random) * 255
    wide = torch.nn.functional.interpolate(small, size=size, mode="bilinear")
    return wide.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous()


@pytest.fixture
def given() -> Evidence:
    theirs = pictures()
    noise = 60 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    ours = (theirs.float() + noise).round().clamp(0, 255).to(torch.uint8)
    return Evidence(Samples(ours), Samples(theirs))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / a.square().sum().sqrt() / b.square().sum().sqrt())


@pytest.mark.parametrize("size", [(50, 61), (80, 50), (300, 301), (256, 256)])
def test_pictures_are_prepared_as_dinov2s_own_processor_does_with_pil(size):
    """What the hub's preprocessor_config.json of dinov2-base says."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    mean, std = IMAGENET
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=mean, image_std=std
    )
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ours = dino_similarity.prepare(torch.from_numpy(image).permute(2, 0, 1)[None], CPU)
    level = 1 / 255 / min(std)
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    assert (ours - theirs).abs().max() <= 1.01 * level  # one grey level apart at most, and hardly ever
    assert (ours - theirs).abs().mean() < 0.02 * level


def test_dinov2_is_asked_for_its_class_token_after_the_last_norm(judges, judge_folders, given):
    """One by one; `pooler_output` is that token in transformers."""
    from transformers import Dinov2Model

    network = Dinov2Model.from_pretrained(judge_folders / DINOV2).eval()

    def token(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network(dino_similarity.prepare(image.permute(2, 0, 1)[None], CPU)).pooler_output

    pairs = zip(given.generated.pixels, given.float_model.pixels, strict=True)
    expected = [cosine(token(ours), token(theirs)) for ours, theirs in pairs]
    assert max(expected) < 0.9999, "the noise is seen"
    entries, kept = evaluate_samples(["dinov2_similarity"], given)
    np.testing.assert_allclose(kept["dinov2_similarity"].values_N, expected, atol=1e-5)
    assert entries["dinov2_similarity"]["value"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_dino_is_looked_through_as_vbench_does(judges, judge_folders, given):
    from transformers import ViTModel

    network = ViTModel.from_pretrained(judge_folders / DINO, add_pooling_layer=False).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)

    def token(image: torch.Tensor) -> torch.Tensor:
        size = [24, int(24 * 61 / 50)]
        small = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None].float(), size, mode="bilinear")
        with torch.no_grad():
            return network((small / 255 - mean) / std, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    pairs = zip(given.generated.pixels, given.float_model.pixels, strict=True)
    expected = [cosine(token(ours), token(theirs)) for ours, theirs in pairs]
    assert max(expected) < 0.9999
    values = evaluate_samples(["dino_similarity"], given)[1]["dino_similarity"].values_N
    np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_the_same_samples_are_wholly_alike_and_others_less(name, judges, given):
    same = Evidence(given.float_model, given.float_model)
    assert evaluate([name], same)[name]["value"] == pytest.approx(1.0, abs=1e-9)
    entry = evaluate([name], given)[name]
    assert entry["value"] < 0.9999 and entry["paired"] and entry["better"] == "higher" and entry["n"] == 3


@pytest.mark.parametrize("name", BOTH)
def test_a_video_is_the_mean_of_its_frames(name, judges, given):
    ours, theirs = given.generated.pixels, given.float_model.pixels
    videos = Evidence(Samples(torch.stack([ours, ours.flip(0)])), Samples(torch.stack([theirs, theirs.flip(0)])))
    frames = evaluate_samples([name], given)[1][name].values_N
    found = evaluate_samples([name], videos)[1][name].values_N
    np.testing.assert_allclose(found, [frames.mean()] * 2, atol=1e-6)


@pytest.mark.parametrize(("name", "hub"), BOTH.items())
def test_the_passport_names_network_weights_and_resizing(name, hub, judges, judge_folders, given):
    card = evaluate([name], given)[name]["passport"]
    file = judge_folders / hub / "model.safetensors"
    assert card["features"] == hub and card["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert card["antialias"] == (hub == DINOV2) and card["dtype"] == "float32" and "short side to" in card["resize"]
    assert card["reference"].startswith("float model")


@pytest.mark.parametrize(("name", "hub"), BOTH.items())
def test_without_its_own_network_it_is_skipped_and_never_takes_the_other(
    name, hub, judge_folders, given, tmp_path, monkeypatch
):
    other = next(each for each in BOTH.values() if each != hub)
    (tmp_path / other).parent.mkdir(parents=True)
    (tmp_path / other).symlink_to(judge_folders / other)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate([name], given)[name]
    assert entry["status"] == "skipped" and f"hf download {hub}" in entry["reason"]


def test_a_folder_that_is_not_whole_is_skipped(given, tmp_path, monkeypatch):
    (tmp_path / DINOV2).mkdir(parents=True)
    (tmp_path / DINOV2 / "config.json").write_text("{}")
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate(["dinov2_similarity"], given)["dinov2_similarity"]
    assert entry["status"] == "skipped" and f"hf download {DINOV2}" in entry["reason"]


def test_both_are_distances_to_the_float_model(given):
    assert all(known_metrics()[name].paired for name in BOTH)
    alone = evaluate(["dinov2_similarity"], Evidence(given.generated))["dinov2_similarity"]
    assert "no samples of the float model" in alone["reason"]
    assert dino_similarity.SHORT_SIDE == 256 and dino_similarity.SIDE == 224


@pytest.mark.parametrize("weights", [b"", b"zz", b"\xff" * 64], ids=["empty", "short", "garbage"])
@pytest.mark.parametrize("metric", BOTH)
def test_weights_that_are_damaged_are_skipped_with_what_fetches_them(given, tmp_path, monkeypatch, metric, weights):
    folder = tmp_path / BOTH[metric]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    found = evaluate([metric], given)[metric]
    assert found["status"] == "skipped", found
    assert "not a whole" in found["reason"] and f"hf download {BOTH[metric]}" in found["reason"]
