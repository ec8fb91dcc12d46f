"""ImageReward with a stand-in for the package's scorer: the package itself is not a dependency."""

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from ditbench.eval import image_reward
from ditbench.eval.base import Evidence, MetricSkipped, evaluate
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Prompt, Samples


@pytest.fixture
def samples():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8))
    return Samples(images, prompts=(Prompt("a cat"), Prompt("a dog"), Prompt("a very long roof")))


@pytest.fixture
def package(monkeypatch):
    """A package of that name which loads anything."""
    module = types.ModuleType("ImageReward")
    module.__spec__ = ModuleSpec("ImageReward", None)
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    image_reward.load_scorer.cache_clear()
    return module


def test_without_the_package_it_is_skipped_with_the_command_that_installs_it(samples, monkeypatch):
    monkeypatch.setattr(image_reward, "PACKAGE", "no_such_package")
    entry = evaluate(["image_reward"], Evidence(samples))["image_reward"]
    assert entry["status"] == "skipped" and "`pip install image-reward`" in entry["reason"]


def test_without_its_weights_it_is_skipped_with_the_command_that_fetches_them(samples, package, monkeypatch):
    monkeypatch.setattr(image_reward, "HUB", "nobody/no-such-reward")
    reason = evaluate(["image_reward"], Evidence(samples))["image_reward"]["reason"]
    assert "`hf download nobody/no-such-reward ImageReward.pt med_config.json`" in reason


def test_images_without_prompts_have_no_reward(samples):
    reason = evaluate(["image_reward"], Evidence(Samples(samples.pixels)))["image_reward"]["reason"]
    assert "no prompts" in reason


def test_each_image_is_scored_as_it_is_with_its_own_prompt(samples):
    def scorer(text, image):
        return float(np.asarray(image).astype(float).mean() + 1000 * len(text))

    values = image_reward.rewards(scorer, samples.pixels, ("a cat", "a dog!", "roof"))
    means = samples.pixels.double().mean(dim=(1, 2, 3))
    torch.testing.assert_close(values, means + torch.tensor([5000.0, 6000.0, 4000.0], dtype=torch.float64))


def test_the_value_is_the_mean_with_an_interval_and_the_hash_of_the_weights(samples, package, monkeypatch, tmp_path):
    files = tmp_path / "ImageReward.pt", tmp_path / "med_config.json"
    for file in files:
        file.write_bytes(b"weights")
    monkeypatch.setattr(image_reward, "_local_files", lambda: files)
    monkeypatch.setattr(
        "ditbench.eval.per_sample.passport", lambda *_, **settings: settings
    )  # the package has no version here
    package.load = lambda weights, device, med_config: types.SimpleNamespace(score=lambda text, image: len(text) / 4)
    entry = evaluate(["image_reward"], Evidence(samples, resamples=50))["image_reward"]
    assert entry["value"] == pytest.approx((5 + 5 + 16) / 12) and entry["n"] == 3 and entry["better"] == "higher"
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    assert len(entry["passport"]["weights_sha256"]) == 64


def test_a_model_that_does_not_load_is_skipped_with_the_reason(package, tmp_path):
    def load(*_, **__):
        raise OSError("bert-base-uncased is not a local folder")

    package.load = load
    with pytest.raises(MetricSkipped, match="bert-base-uncased is not a local folder"):
        image_reward.load_scorer(tmp_path / "a", tmp_path / "b", CPU)
