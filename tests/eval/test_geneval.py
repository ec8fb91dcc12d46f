"""GenEval's rules on hand-made detections, and the detector's path with small random networks of the real classes."""

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from both_devices import same_there

from ditbench.eval import geneval, geneval_detector
from ditbench.eval.base import Evidence, evaluate, known_metrics
from ditbench.eval.geneval import Found, follows, relations
from ditbench.eval.geneval_detector import CLASSES, CLIP_LARGE, COLOURS, DETECTOR, Instance, instances, kept
from ditbench.harness.common.devices import CPU
from ditbench.harness.models.zoo.shapes import KINDS
from ditbench.harness.samples.samples import Prompt, Samples

NAMES = ["geneval/overall", *(f"geneval/{kind}" for kind in KINDS)]
CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
# As the lines of evaluation_metadata.jsonl are.
ABOUT = {
    "single_object": {"tag": "single_object", "include": [CAT]},
    "two_object": {"tag": "two_object", "include": [CAT, DOG]},
    "counting": {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
    },
    "colors": {"tag": "colors", "include": [CAT | {"color": "red"}]},
    "position": {"tag": "position", "include": [DOG, CAT | {"position": ["left of", 0]}]},
    "color_attr": {"tag": "color_attr", "include": [CAT | {"color": "red"}, DOG | {"color": "blue"}]},
}


def cat(colour: str | None = None, x: float = 0) -> Found:
    return Found("cat", colour, (x, 0, x + 10, 10))


def dog(colour: str | None = None, x: float = 50) -> Found:
    return Found("dog", colour, (x, 0, x + 10, 10))


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("single_object", [cat(), dog()], [[], [dog()]]),
        ("two_object", [dog(), cat()], [[cat()], [dog()], [cat(), cat()]]),
        ("counting", [cat(), cat(), dog()], [[cat()], [cat(), cat(), cat()]]),
        ("colors", [cat("red"), cat("blue")], [[cat("blue"), cat("red")], [dog("red")]]),
        ("position", [cat(), dog()], [[cat(x=100), dog()], [cat(x=50), dog()], [cat()], [dog()]]),
        ("color_attr", [dog("blue"), cat("red")], [[cat("blue"), dog("red")], [cat("red"), dog("red")], [cat("red")]]),
    ],
)
def test_each_category_is_right_and_wrong_where_the_official_rules_say_so(kind, right, wrong):
    assert follows(right, ABOUT[kind])
    assert [follows(found, ABOUT[kind]) for found in wrong] == [False] * len(wrong)


def official_relations(a, b) -> set[str]:
    """Scalars, from the description in GenEval's code: margins of 0.1 of both boxes, over the full offset's length."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    margin = [0.1 * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [max(abs(o) - m, 0) * (1 if o > 0 else -1) for o, m in zip(offset, margin, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / (offset[0] ** 2 + offset[1] ** 2) ** 0.5 for value in beyond)
    return {
        name
        for name, holds in {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}.items()
        if holds
    }


@pytest.mark.parametrize(
    ("x", "expected"),
    [(2.0, set()), (3.99, set()), (4.01, {"right of"}), (30.0, {"right of"}), (-4.01, {"left of"}), (-3.99, set())],
)
def test_an_offset_counts_by_what_it_is_beyond_a_tenth_of_both_boxes(x, expected):
    """Both are 10 wide: margin 2, and more than half of the offset must be beyond it."""
    assert relations(Found("cat", None, (x, 0, x + 10, 10)), Found("dog", None, (0, 0, 10, 10))) == expected


def test_relations_are_the_official_ones_for_boxes_all_over_the_picture():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        corners = rng.integers(0, 60, (2, 2))
        a, b = (tuple(map(float, (*corner, *(corner + rng.integers(5, 50, 2))))) for corner in corners)
        expected = official_relations(a, b)
        assert relations(Found("", None, a), Found("", None, b)) == expected
        seen.add(frozenset(expected))
    assert len(seen) == 9  # none, four sides, four corners


def found_instance(label: str, certainty: float, left: int = 0) -> Instance:
    return Instance(label, certainty, np.ones((1, 1), bool), (left, 0, left + 1, 1))


def test_the_most_certain_above_the_threshold_are_kept_sixteen_of_a_class():
    seen = [found_instance("cat", 0.3), found_instance("cat", 0.301, 1), found_instance("cat", 0.5, 2)]
    assert [each.box[0] for each in kept(seen, 0.3)] == [2, 1]
    many = [found_instance("cat", 0.4 + index / 100, index) for index in range(20)] + [found_instance("dog", 0.35)]
    chosen = kept(many, 0.3)
    assert [each.box[0] for each in chosen if each.label == "cat"] == list(range(19, 3, -1))
    assert [each.label for each in chosen].count("dog") == 1


@pytest.mark.parametrize(("tag", "count"), [("single_object", 2), ("counting", 1)])
def test_counting_asks_for_more_certainty(tag, count, monkeypatch):
    seen = [found_instance("cat", 0.89), found_instance("cat", 0.91)]
    monkeypatch.setattr(geneval_detector, "instances", lambda network, image: seen)
    detector = geneval_detector.Detector(None, None)
    assert len(detector(np.zeros((4, 4, 3), np.uint8), {"tag": tag, "include": [CAT]})) == count


def test_colours_are_asked_for_of_the_most_certain_objects_only(monkeypatch):
    seen = [found_instance("cat", 0.5), found_instance("cat", 0.8, 1), found_instance("dog", 0.9, 2)]
    monkeypatch.setattr(geneval_detector, "instances", lambda network, image: seen)
    monkeypatch.setattr(geneval_detector, "colour_of", lambda clip, image, instance: "red")
    found = geneval_detector.Detector(None, None)(np.zeros((4, 4, 3), np.uint8), ABOUT["colors"])
    assert [(each.label, each.colour) for each in found] == [("dog", None), ("cat", "red"), ("cat", None)]


def test_the_classes_are_cocos_in_genevals_words():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert CLASSES[0] == "person" and CLASSES[79] == "toothbrush" and CLASSES.index("computer keyboard") == 66


class Pretended(torch.nn.Module):
    """Stands for the network: two queries, class scores and masks as given."""

    def __init__(self, probabilities: dict[tuple[int, str], float], logits_Qhw: torch.Tensor) -> None:
        super().__init__()
        scores = torch.zeros(1, len(logits_Qhw), 81)
        for (query, label), probability in probabilities.items():
            scores[0, query, CLASSES.index(label)] = probability
        scores[..., -1] = 1 - scores.sum(-1)
        self.class_queries_logits, self.masks_queries_logits = scores.clamp(min=1e-9).log(), logits_Qhw[None]

    def forward(self, pixel_values):
        self.seen = pixel_values
        return self


def test_an_instance_is_class_times_mean_mask_probability_with_the_box_around_its_mask(monkeypatch):
    monkeypatch.setattr(geneval_detector, "SHORT_SIDE", 64)
    logits_2hw = torch.full((2, 16, 16), -50.0)  # a quarter of the padded 64×64
    logits_2hw[0, 4:8, 2:10] = 2.0
    logits_2hw[1, 12:, :] = 50.0
    network = Pretended({(0, "cat"): 0.8, (0, "dog"): 0.15, (1, "dog"): 0.25, (1, "car"): 0.6}, logits_2hw)
    seen = {each.label: each for each in instances(network, np.zeros((64, 64, 3), np.uint8))}
    assert set(seen) == {"cat", "car"}  # the dogs are below 0.3
    left, top, right, bottom = seen["cat"].box
    assert (left, top, right, bottom) == pytest.approx((8, 16, 40, 32), abs=2)
    assert seen["cat"].mask_HW[top:bottom, left:right].mean() > 0.9 and seen["cat"].mask_HW.shape == (64, 64)
    assert 0.8 * 0.5 < seen["cat"].certainty < 0.8 * torch.sigmoid(torch.tensor(2.0)) + 1e-6
    assert seen["car"].certainty == pytest.approx(0.6, abs=0.02)


def test_boxes_are_in_the_pictures_pixels_whatever_the_detector_sees(monkeypatch):
    """40×100 → 64×160, that is a whole multiple of 32; 40×90 → 64×144, padded to 160: the mask's right tenth is padding."""
    monkeypatch.setattr(geneval_detector, "SHORT_SIDE", 64)
    logits_1hw = torch.full((1, 16, 40), -50.0)
    logits_1hw[0, :, 20:] = 50.0  # from the middle of 160 to its end
    network = Pretended({(0, "cat"): 0.9}, logits_1hw)
    (seen,) = instances(network, np.zeros((40, 100, 3), np.uint8))
    assert network.seen.shape == (1, 3, 64, 160)
    assert seen.box == pytest.approx((50, 0, 100, 40), abs=1)
    (seen,) = instances(network, np.zeros((40, 90, 3), np.uint8))
    assert network.seen.shape == (1, 3, 64, 160) and (network.seen[..., 144:] == 0).all()
    assert seen.box == pytest.approx((50, 0, 90, 40), abs=1)


def test_a_long_picture_is_held_to_the_long_side():
    pixels, size = geneval_detector.prepare(np.zeros((100, 400, 3), np.uint8))
    assert size == (333, 1333) and pixels.shape == (1, 3, 352, 1344)


def test_a_side_between_two_pixels_goes_to_the_nearest_as_in_mmcvs_rescale():
    """int(side · scale + 0.5): 340 · 800 / 301 = 903.7."""
    pixels, size = geneval_detector.prepare(np.zeros((301, 340, 3), np.uint8))
    assert size == (800, 904) and pixels.shape == (1, 3, 800, 928)


def test_pictures_are_prepared_as_transformers_own_processor_does(monkeypatch):
    from transformers import Mask2FormerImageProcessor

    monkeypatch.setattr(geneval_detector, "SHORT_SIDE", 64)
    image = np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8)
    processor = Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 1333}, size_divisor=32, num_labels=80
    )
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours, size = geneval_detector.prepare(image)
    assert size == (64, 96) and ours.shape == (1, 3, 64, 96) and theirs.shape == (1, 3, 64, 96)
    difference = (ours - theirs).abs()
    assert difference.max() < 0.05 and difference.mean() < 0.01  # one grey level is 0.017


def test_the_object_is_cut_out_along_its_mask_and_laid_on_grey():
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = mask[2, 3] = True
    cut = geneval_detector.cut_out(image, Instance("cat", 1.0, mask, geneval_detector.box_of(mask))).numpy()
    assert cut.shape == (1, 2, 2, 3)
    assert (cut[0, 0, 0] == image[1, 2]).all() and (cut[0, 1, 1] == image[2, 3]).all()
    assert (cut[0, 0, 1] == 0x99).all() and (cut[0, 1, 0] == 0x99).all()


@pytest.fixture(scope="session")
def judges(tmp_path_factory):
    """A Mask2Former with COCO's 80 classes and a CLIP that knows the colours' names, both small and random, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        PreTrainedTokenizerFast,
        SwinConfig,
    )

    root = tmp_path_factory.mktemp("judges")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        swin = SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = Mask2FormerConfig(
            backbone_config=swin, num_labels=80, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=6,
            encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16, num_attention_heads=2,
        )  # fmt: skip
        detector = Mask2FormerForUniversalSegmentation(config).eval()
        detector.class_predictor.weight.data.mul_(200)  # so that classes are certain, some of them
        detector.save_pretrained(root / DETECTOR)
        words = [*COLOURS, "a", "photo", "of", "object", "-", "colored", "cat", "dog"]
        special = {"<unk>": 0, "<|startoftext|>": 1, "<pad>": 2, "<|endoftext|>": 3}
        vocabulary = special | {word: index + 4 for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 3)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>",
            bos_token="<|startoftext|>", eos_token="<|endoftext|>", model_max_length=16,
        ).save_pretrained(root / CLIP_LARGE)  # fmt: skip
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = small | {"vocab_size": len(vocabulary), "max_position_embeddings": 16}
        text |= {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 3}
        vision = small | {"image_size": 32, "patch_size": 8}
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        for parameter in clip.parameters():
            parameter.data.mul_(8.0) if parameter.ndim > 1 else None
        clip.save_pretrained(root / CLIP_LARGE)
    return root


@pytest.fixture
def installed(judges, monkeypatch):
    monkeypatch.setenv("DITBENCH_JUDGES", str(judges))
    monkeypatch.setattr(geneval_detector, "SHORT_SIDE", 64)
    return geneval_detector.load_detector(judges / DETECTOR, judges / CLIP_LARGE, CPU)


def painted(n: int = 6, kinds=KINDS) -> Evidence:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 48, 64, 3), dtype=np.uint8))
    prompts = tuple(Prompt(f"a photo of {kinds[i % len(kinds)]}", ABOUT[kinds[i % len(kinds)]]) for i in range(n))
    return Evidence(Samples(images, prompts=prompts), resamples=20)


def test_the_saved_detector_finds_what_transformers_own_postprocessing_finds(installed, judges):
    """At a size that needs no padding; transformers cuts masks at 384×384, so certainties agree, boxes roughly."""
    from transformers import Mask2FormerImageProcessor

    image = painted().generated.images_NHWC.numpy()[0]
    pixels, _ = geneval_detector.prepare(np.ascontiguousarray(image[:, :48]))
    with torch.no_grad():
        output = installed.network(pixel_values=pixels)
    theirs = Mask2FormerImageProcessor(num_labels=80).post_process_instance_segmentation(output, threshold=0.3)[0]
    theirs = sorted((segment["label_id"], segment["score"]) for segment in theirs["segments_info"])
    seen = kept(instances(installed.network, np.ascontiguousarray(image[:, :48])), 0.3)
    ours = sorted((CLASSES.index(each.label), each.certainty) for each in seen)
    assert len(ours) >= 2 and [label for label, _ in ours] == [label for label, _ in theirs]
    np.testing.assert_allclose([score for _, score in ours], [score for _, score in theirs], atol=0.02)


def test_a_colour_is_clips_choice_by_the_mean_of_three_templates(installed):
    image = painted().generated.images_NHWC.numpy()[1]
    mask = np.zeros((48, 64), bool)
    mask[5:30, 10:50] = True
    instance = Instance("cat", 1.0, mask, geneval_detector.box_of(mask))
    from ditbench.eval.clip import embed_images, embed_texts

    clip = installed.clip
    expected = []
    for colour in COLOURS:
        texts = (f"a photo of a {colour} cat", f"a photo of a {colour}-colored cat", f"a photo of a {colour} object")
        mean = embed_texts(clip, texts).mean(0)
        expected.append(mean / mean.norm())
    torch.testing.assert_close(geneval_detector.colour_classifier(clip, "cat"), torch.stack(expected))
    scores = torch.stack(expected) @ embed_images(clip, torch.from_numpy(image[5:30, 10:50])[None])[0]
    assert scores.std() > 1e-3
    assert geneval_detector.colour_of(clip, image, instance) == COLOURS[int(scores.argmax())]


def test_every_metric_runs_and_its_passport_says_what_is_not_genevals(installed, judges):
    entries = evaluate(NAMES, painted(12))
    assert {entry["status"] for entry in entries.values()} == {"ok"}
    assert entries["geneval/overall"]["n"] == 12 and entries["geneval/counting"]["n"] == 2
    assert entries["geneval/overall"]["passport"]["categories"] == sorted(KINDS)
    passport = entries["geneval/colors"]["passport"]
    assert "mmdet" in passport["features"] and DETECTOR in passport["features"]
    file = judges / DETECTOR / "model.safetensors"
    assert passport["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(judges) not in str(entries)
    assert known_metrics()["geneval/colors"].summary.endswith("colors.")


def test_the_value_is_the_mean_of_the_categories_shares(installed, monkeypatch):
    def read(image, about):
        return [cat("red"), dog("blue")] if image[0, 0, 0] % 2 else []

    given = painted(18)
    right = [follows(read(image, p.about), p.about) for image, p in zip(
        given.generated.images_NHWC.numpy(), given.generated.prompts, strict=True)]  # fmt: skip
    shares = [np.mean(right[index::6]) for index in range(6)]
    measurement = geneval.measured(given, read, KINDS, "test", dtype="uint8")
    assert measurement.value == pytest.approx(np.mean(shares)) and 0 < measurement.value < 1
    assert measurement.ci95[0] <= measurement.value <= measurement.ci95[1]


@pytest.mark.parametrize("missing", [DETECTOR, CLIP_LARGE])
def test_without_weights_it_is_skipped_with_the_command_that_fetches_them(missing, judges, monkeypatch, tmp_path):
    kept_one = DETECTOR if missing == CLIP_LARGE else CLIP_LARGE
    (tmp_path / kept_one).parent.mkdir()
    (tmp_path / kept_one).symlink_to(judges / kept_one)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    entry = evaluate(["geneval/overall"], painted())["geneval/overall"]
    assert entry["status"] == "skipped" and f"hf download {missing}" in entry["reason"]


def test_a_damaged_detector_is_skipped_with_the_command_too(judges, monkeypatch, tmp_path):
    (tmp_path / CLIP_LARGE).parent.mkdir()
    (tmp_path / CLIP_LARGE).symlink_to(judges / CLIP_LARGE)
    (tmp_path / DETECTOR).mkdir(parents=True)
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path))
    assert f"hf download {DETECTOR}" in evaluate(["geneval/colors"], painted())["geneval/colors"]["reason"]
    (tmp_path / DETECTOR / "config.json").write_bytes((judges / DETECTOR / "config.json").read_bytes())
    (tmp_path / DETECTOR / "model.safetensors").write_bytes(b"<html>404</html>")
    assert "not a whole" in evaluate(["geneval/colors"], painted())["geneval/colors"]["reason"]


def test_prompts_that_cannot_be_judged_are_skipped_with_the_reason():
    given = painted()
    circles = replace(
        given.generated, prompts=(Prompt("", {"tag": "colors", "include": [CAT | {"class": "circle"}]}),) * 6
    )
    for samples, name, reason in (
        (replace(given.generated, prompts=()), "geneval/colors", "GenEval's format"),
        (replace(given.generated, pixels=given.generated.pixels[:, None]), "geneval/colors", "these are videos"),
        (circles, "geneval/colors", "ask for circle"),
        (painted(kinds=KINDS[:2]).generated, "geneval/overall", "no prompt of category color_attr, colors, counting"),
        (painted(kinds=KINDS[:2]).generated, "geneval/counting", "no prompt of category counting"),
    ):
        entry = evaluate([name], Evidence(samples))[name]
        assert entry["status"] == "skipped" and reason in entry["reason"]


def test_the_shapes_world_goes_by_the_same_rules_with_its_exact_reader():
    from ditbench.harness.models.zoo import shapes

    captions = list(shapes.prompts(12, seed=3))
    pixels = np.stack([shapes.render(shapes.draw_scene(caption, random.Random(0))) for caption in captions])
    prompts = tuple(Prompt(caption.text, caption.about) for caption in captions)
    given = Evidence(Samples(torch.from_numpy(pixels), prompts=prompts), resamples=10)
    entries = evaluate(["geneval_shapes/overall", *(f"geneval_shapes/{kind}" for kind in KINDS)], given)
    assert all(entry["value"] == 1.0 for entry in entries.values())


def test_detector_and_clip_look_on_the_runs_device(second, installed):
    same_there(["geneval/overall"], painted(), second)
