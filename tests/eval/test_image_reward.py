"""ImageReward with a stand-in for the package's scorer: the package itself is not a dependency."""

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from ditbench.eval import image_reward
from ditbench.eval.base import Evidence, MetricSkipped, evaluate
from ditbench.eval.prompt_lengths import cut_off
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
    image_reward.load_model.cache_clear()
    return module


def bert(folder):
    """BERT's tokenizer over a few words."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "very", "long", "roof"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt"))


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
    package.load = lambda weights, device, med_config: types.SimpleNamespace(
        score=lambda text, image: len(text) / 4, blip=types.SimpleNamespace(tokenizer=bert(tmp_path))
    )
    entry = evaluate(["image_reward"], Evidence(samples, resamples=50))["image_reward"]
    assert entry["value"] == pytest.approx((5 + 5 + 16) / 12) and entry["n"] == 3 and entry["better"] == "higher"
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    assert len(entry["passport"]["weights_sha256"]) == 64


@pytest.mark.parametrize(("words", "cut"), [(33, 0), (34, 1)])
def test_prompts_of_more_than_35_tokens_are_counted_with_the_two_that_begin_and_end_them(words, cut, tmp_path):
    """The package tokenizes with truncation=True, max_length=35: of 33 words nothing is lost, of 34 one."""
    tokenizer, texts = bert(tmp_path), ["a " * words, "a cat"]
    kept = tokenizer(texts, padding="max_length", truncation=True, max_length=image_reward.MAX_TOKENS)["input_ids"][0]
    assert kept.count(tokenizer.convert_tokens_to_ids("a")) == 33
    assert cut_off(tokenizer, image_reward.MAX_TOKENS, texts) == {"max_tokens": 35, "prompts_cut_off": cut}


def test_the_entry_says_how_many_of_its_prompts_were_cut(samples, package, monkeypatch, tmp_path):
    monkeypatch.setattr(image_reward, "_local_files", lambda: [tmp_path / "ImageReward.pt"] * 2)
    (tmp_path / "ImageReward.pt").write_bytes(b"weights")
    monkeypatch.setattr("ditbench.eval.per_sample.passport", lambda *_, **settings: settings)
    package.load = lambda *_, **__: types.SimpleNamespace(
        score=lambda text, image: len(text) / 4, blip=types.SimpleNamespace(tokenizer=bert(tmp_path))
    )
    long = Samples(samples.pixels, prompts=(Prompt("a cat " * 17), Prompt("a dog"), Prompt("roof " * 60)))
    card = evaluate(["image_reward"], Evidence(long))["image_reward"]["passport"]
    assert (card["max_tokens"], card["prompts_cut_off"]) == (35, 2)


def test_a_model_that_does_not_load_is_skipped_with_the_reason(package, tmp_path):
    def load(*_, **__):
        raise OSError("bert-base-uncased is not a local folder")

    package.load = load
    with pytest.raises(MetricSkipped, match="bert-base-uncased is not a local folder"):
        image_reward.load_model(tmp_path / "a", tmp_path / "b", CPU)
