"""The CLIP path with a small random CLIP and a real tokenizer, saved and loaded as the real ones are."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import rbf_kernel

from ditbench.eval import clip, clip_metrics, kernel_distance
from ditbench.eval.base import Evidence, Reference, evaluate, known_metrics
from ditbench.eval.prompt_lengths import cut_off
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Prompt, Samples

CLIP_METRICS = ["clip_iqa", "clipscore_b32", "clipscore_l14", "cmmd", "cmmd_float"]
WORDS = ["a", "red", "blue", "cat", "dog", "on", "the", "roof", "Good", "Bad", "photo", "."]
TEXTS = ["a red cat", "the blue dog on a roof", "cat", "a dog . the photo"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """CLIPModel with 8×8 patches of 32×32 pixels, and a word-level tokenizer with 12 tokens of context."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("clip")
    special = {"<unk>": 0, "<|startoftext|>": 1, "<pad>": 2, "<|endoftext|>": 3}
    vocabulary = special | {word: index + 4 for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>",
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", model_max_length=12,
    )  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = small | {"vocab_size": len(vocabulary), "max_position_embeddings": 12}
    text |= {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 3}
    vision = small | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what has one dimension and keeps transformers' start
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough that images and texts differ, and not transformers' own start
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def installed(folder, monkeypatch):
    for name in clip.HUB:
        monkeypatch.setitem(clip.HUB, name, str(folder))
    return clip.load_clip(str(folder), CPU)


@pytest.fixture(scope="module")
def painted() -> Evidence:
    """Images larger than CLIP takes and not square; the reference is brighter."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 200, (14, 50, 61, 3), dtype=np.uint8))
    prompts = tuple(Prompt(text) for text in TEXTS)
    generated = Samples(images[:4], prompts=prompts)
    return Evidence(generated, Samples(images[4:8]), Reference("bright", images[8:] + 55, "e" * 64), resamples=30)


def scored(name, evidence):
    entry = evaluate([name], evidence)[name]
    assert entry["status"] == "ok", entry["reason"]
    return entry


def test_every_clip_metric_is_registered_with_its_direction():
    metrics = known_metrics()
    assert {name: metrics[name].better for name in CLIP_METRICS} == {
        "clip_iqa": "higher", "clipscore_b32": "higher", "clipscore_l14": "higher", "cmmd": "lower",
        "cmmd_float": "lower",
    }  # fmt: skip
    assert [name for name in CLIP_METRICS if metrics[name].paired] == ["cmmd_float"]


@pytest.mark.parametrize("name", CLIP_METRICS)
def test_without_weights_it_is_skipped_with_the_command_that_fetches_them(name, painted, monkeypatch):
    for model in clip.HUB:
        monkeypatch.setitem(clip.HUB, model, f"nobody/no-such-clip-{model}")
    entry = evaluate([name], painted)[name]
    assert entry["status"] == "skipped" and "`hf download nobody/no-such-clip-" in entry["reason"]


def test_each_metric_looks_through_the_clip_its_name_promises(painted, monkeypatch):
    asked = {
        "clipscore_b32": "b32",
        "clipscore_l14": "l14",
        "clip_iqa": "l14",
        "cmmd": "l14_336",
        "cmmd_float": "l14_336",
    }
    for model in clip.HUB:
        monkeypatch.setitem(clip.HUB, model, f"nobody/{model}")
    for name, model in asked.items():
        assert f"nobody/{model} is not here" in evaluate([name], painted)[name]["reason"]


def test_a_damaged_file_is_skipped_with_what_to_do(folder, tmp_path, painted, monkeypatch):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"<html>404</html>")
    monkeypatch.setitem(clip.HUB, "b32", str(tmp_path))
    reason = evaluate(["clipscore_b32"], painted)["clipscore_b32"]["reason"]
    assert str(tmp_path) in reason and "--force-download" in reason


@pytest.mark.parametrize("size", [(50, 61), (80, 50), (20, 31), (32, 32)])
def test_images_are_prepared_as_clips_own_processor_does_with_pil(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ours = clip.prepare(torch.from_numpy(image).permute(2, 0, 1)[None], 32)
    level = 1 / 255 / min(clip.DEVIATION)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1.01 * level  # one grey level apart at most, and hardly ever
    assert (ours - theirs).abs().mean() < 0.02 * level


@pytest.mark.parametrize("size", [(80, 50), (51, 64), (48, 48)])
def test_cmmds_images_are_cropped_with_pil_and_then_resized_as_by_its_authors(size):
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image, short = small.resize(size, Image.Resampling.BICUBIC), min(size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    square = image.crop((left, top, left + short, top + short)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = (np.array(square) / 255.0 - clip.MEAN) / clip.DEVIATION
    ours = clip.prepare(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], 32, crop_first=True)
    level = 1 / 255 / min(clip.DEVIATION)
    assert np.abs(ours[0].permute(1, 2, 0).numpy() - expected).max() < 1.5 * level


def test_embeddings_are_the_models_own_scaled_to_unit_length(installed, painted):
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(installed.name).eval()
    tokens = AutoTokenizer.from_pretrained(installed.name)(TEXTS, padding=True, return_tensors="pt")
    pixels = clip.prepare(painted.generated.images_NHWC.permute(0, 3, 1, 2), 32)
    with torch.no_grad():
        theirs = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
        )  # returns both, normalised
    torch.testing.assert_close(clip.embed_images(installed, painted.generated.images_NHWC), theirs.image_embeds)
    torch.testing.assert_close(clip.embed_texts(installed, tuple(TEXTS)), theirs.text_embeds)


def test_texts_longer_than_the_context_are_cut_off_and_counted(installed):
    short, long = "a red cat", "a red cat on the blue roof " * 3
    assert cut_off(installed.tokenizer, installed.max_tokens, (short, long)) == {"max_tokens": 12, "prompts_cut_off": 1}
    vectors = clip.embed_texts(installed, (long, "a red cat on the blue roof a red cat on the dog"))
    torch.testing.assert_close(vectors[0], vectors[1])  # their first ten words are the same


def test_clipscore_is_100_cosines_with_those_below_zero_counted_as_zero(installed, painted):
    images = clip.embed_images(installed, painted.generated.images_NHWC).double()
    texts = clip.embed_texts(installed, tuple(TEXTS)).double()
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(images, texts, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    entry = scored("clipscore_l14", painted)
    assert entry["value"] == pytest.approx(np.mean([100 * max(cosine, 0.0) for cosine in cosines]), rel=1e-5)
    assert entry["n"] == 4 and entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]


def test_clipscore_of_each_image_is_torchmetrics_own(installed, painted):
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    class Processor:
        """What torchmetrics asks of CLIPProcessor."""

        def __call__(self, text=None, images=None, **_):
            if text is not None:
                return installed.tokenizer(text, padding=True, return_tensors="pt")
            return {"pixel_values": clip.prepare(torch.stack(images), 32)}

    class Model(torch.nn.Module):
        """transformers 5 returns more than the features, which torchmetrics 1.9 does not expect."""

        config = installed.module.config

        def get_image_features(self, pixels):
            return installed.module.get_image_features(pixels).pooler_output

        def get_text_features(self, ids, mask):
            return installed.module.get_text_features(ids, mask).pooler_output

    images = list(painted.generated.images_NHWC.permute(0, 3, 1, 2))
    with torch.no_grad():
        theirs, _ = _clip_score_update(images, TEXTS, Model(), Processor())
    assert scored("clipscore_b32", painted)["value"] == pytest.approx(float(theirs.clamp(min=0).mean()), rel=1e-4)


def test_clip_iqa_is_torchmetrics_softmax_over_good_and_bad(installed, painted):
    from torchmetrics.functional.multimodal.clip_iqa import _clip_iqa_compute, _clip_iqa_format_prompts

    prompts, names = _clip_iqa_format_prompts(("quality",))
    images, anchors = clip.embed_images(installed, painted.generated.images_NHWC), clip.embed_texts(installed, prompts)
    theirs = _clip_iqa_compute(images, anchors, names)
    assert theirs.std() > 1e-3
    assert scored("clip_iqa", painted)["value"] == pytest.approx(float(theirs.mean()), rel=1e-5)


def test_cmmd_is_1000_times_the_biased_mmd_with_a_gaussian_of_width_10(installed, painted):
    x, y = (
        clip.embed_images(installed, images, crop_first=True).double().numpy()
        for images in (painted.generated.images_NHWC, painted.reference.images_NHWC)
    )
    gamma = 1 / (2 * 10**2)
    mmd = rbf_kernel(x, x, gamma).mean() + rbf_kernel(y, y, gamma).mean() - 2 * rbf_kernel(x, y, gamma).mean()
    entry = scored("cmmd", painted)
    assert entry["value"] == pytest.approx(1000 * mmd, rel=1e-6) and entry["value"] > 1e-3
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1] and entry["passport"]["reference"] == "bright"


def test_cmmd_of_two_points_is_the_closed_form():
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert clip_metrics.mmd2(x, y) == pytest.approx(2 - 2 * np.exp(-2 / 200))


def test_what_an_image_contributes_to_cmmd_is_the_derivative_of_the_unbiased_form():
    x, y = np.random.default_rng(0).normal(size=(2, 9, 5)) * 8
    gamma = 1 / (2 * 10**2)
    inside, across = rbf_kernel(x, x, gamma), rbf_kernel(x, y, gamma)
    within = kernel_distance.within(x, np.zeros(9, int), clip_metrics.gaussian_kernel)
    found = kernel_distance.influence(x, y, within, clip_metrics.gaussian_kernel).first_N
    by_hand = 2 * ((inside.sum(axis=1) - 1) / 8 - across.mean(axis=1))
    np.testing.assert_allclose(found, by_hand - by_hand.mean(), atol=1e-12)


def test_cmmd_to_the_float_model_counts_both_images_of_a_pair():
    x, y = np.random.default_rng(0).normal(size=(2, 9, 5)) * 8
    gamma = 1 / (2 * 10**2)
    h = rbf_kernel(x, x, gamma) + rbf_kernel(y, y, gamma) - rbf_kernel(x, y, gamma) - rbf_kernel(y, x, gamma)
    assert clip_metrics.mmd2(x, y) == pytest.approx(h.mean())
    found = kernel_distance.influence_of_pairs(x, y, clip_metrics.gaussian_kernel)
    np.testing.assert_allclose(found.first_N, 2 * (h.mean(axis=1) - h.mean()), atol=1e-12)
    np.testing.assert_allclose(found.second_RR, 2 * h, atol=1e-12)


def test_cmmd_without_bias_leaves_out_an_image_as_its_own_neighbour(installed, painted):
    x, y = (
        clip.embed_images(installed, images, crop_first=True).double().numpy()
        for images in (painted.generated.images_NHWC, painted.reference.images_NHWC)
    )
    gamma = 1 / (2 * 10**2)
    inside = [
        (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (rbf_kernel(x, x, gamma), rbf_kernel(y, y, gamma))
    ]
    plain = replace(painted, generated=replace(painted.generated, labels_N=None, prompts=()))
    entry = scored("cmmd_unbiased", plain)
    assert entry["value"] == pytest.approx(1000 * (sum(inside) - 2 * rbf_kernel(x, y, gamma).mean()), rel=1e-6)
    assert entry["value"] < scored("cmmd", plain)["value"] and "U-statistic" in entry["passport"]["estimator"]
    against_itself = replace(plain, reference=Reference("itself", plain.generated.images_NHWC, "0" * 64))
    entry = scored("cmmd_unbiased", against_itself)
    assert entry["ci95"][0] < entry["value"] < 0, "it can come out below 0, and so can where its interval begins"
    assert scored("cmmd", against_itself)["ci95"][0] == 0


def test_images_cropped_before_and_after_resizing_are_not_taken_for_each_other(installed):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 40, 61, 3), generator=random, dtype=torch.uint8)
    after, before = (clip.embed_images(installed, images, crop_first=on) for on in (False, True))
    assert (after - before).abs().max() > 1e-3


def test_kernel_sums_do_not_depend_on_how_many_rows_are_held_at_once(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 11, 5))
    whole = clip_metrics.mmd2(x, y), kernel_distance.across(x, y, clip_metrics.gaussian_kernel)
    monkeypatch.setattr(kernel_distance, "KERNEL_ROWS", 4)
    parts = clip_metrics.mmd2(x, y), kernel_distance.across(x, y, clip_metrics.gaussian_kernel)
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    np.testing.assert_allclose(parts[1], whole[1])


def test_cmmd_to_the_float_model_takes_its_images_and_is_zero_for_the_same_ones(installed, painted):
    as_reference = replace(painted, reference=Reference("float", painted.float_model.images_NHWC, "f" * 64))
    entry = scored("cmmd_float", painted)
    assert entry["value"] == scored("cmmd", as_reference)["value"] > 0
    assert entry["passport"]["reference"].startswith("float model")
    assert "pairs" in entry["passport"]["ci_method"]
    same = replace(painted, float_model=painted.generated)
    assert scored("cmmd_float", same)["value"] == pytest.approx(0.0, abs=1e-9)
    assert "float model" in evaluate(["cmmd_float"], replace(painted, float_model=None))["cmmd_float"]["reason"]


@pytest.mark.parametrize("name", ["clipscore_b32", "clipscore_l14"])
def test_images_without_prompts_have_no_clipscore(name, installed, painted):
    entry = evaluate([name], replace(painted, generated=Samples(painted.generated.pixels)))[name]
    assert entry["status"] == "skipped" and "no prompts" in entry["reason"]


def test_prompts_that_do_not_pair_with_the_images_are_an_error(installed, painted):
    broken = replace(painted, generated=replace(painted.generated, prompts=painted.generated.prompts[:3]))
    with pytest.raises(ValueError, match="4 samples but 3 prompts"):
        known_metrics()["clipscore_b32"].compute(broken)
    entry = evaluate(["clipscore_b32"], broken)["clipscore_b32"]
    assert (entry["status"], entry["value"]) == ("failed", None) and "4 samples but 3 prompts" in entry["reason"]


@pytest.mark.parametrize("name", CLIP_METRICS)
def test_videos_are_skipped(name, installed, painted):
    videos = Samples(painted.generated.pixels[:, None].repeat(1, 2, 1, 1, 1), prompts=painted.generated.prompts)
    entry = evaluate([name], replace(painted, generated=videos))[name]
    assert entry["status"] == "skipped" and "videos" in entry["reason"]


@pytest.mark.parametrize("name", CLIP_METRICS)
def test_the_passport_names_the_weights_by_their_hash_and_how_images_were_resized(name, installed, folder, painted):
    passport = scored(name, painted)["passport"]
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert passport["weights_sha256"] == sha256 and passport["antialias"] is True
    assert passport["resize"].startswith("centre square, then") == name.startswith("cmmd")


def test_images_are_embedded_once_for_all_metrics(installed, painted, monkeypatch):
    calls = []
    original = clip.prepare
    monkeypatch.setattr(clip, "prepare", lambda *given, **how: calls.append(how) or original(*given, **how))
    fresh = replace(painted, generated=replace(painted.generated, pixels=painted.generated.pixels.clone()))
    evaluate(["clipscore_b32", "clipscore_l14", "clip_iqa"], fresh)
    assert len(calls) == 1


def test_clip_is_found_where_other_judges_are(folder, monkeypatch, tmp_path):
    name = clip.HUB["b32"]
    home = tmp_path / "judges" / name
    home.parent.mkdir(parents=True)
    home.symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert f"hf download {name}" in clip.clip_here("b32")()
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path / "judges"))
    clip.load_clip.cache_clear()
    assert clip.clip_here("b32")() is None and clip.load_clip(name, CPU).name == name
    clip.load_clip.cache_clear()
