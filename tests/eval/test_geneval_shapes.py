"""GenEval's rules on pictures whose truth is known: right ones follow, and each way to be wrong does not."""

from __future__ import annotations

import random

import pytest
import torch

from ditbench.eval.base import Evidence, evaluate
from ditbench.eval.geneval import Found, follows, read_shapes, relations
from ditbench.harness.models.zoo.shapes import KINDS, Object, Scene, draw_scene, random_caption, render
from ditbench.harness.samples.samples import Prompt, Samples

PLACES = {"nw": (4, 4), "ne": (28, 4), "sw": (4, 28), "se": (28, 28)}


def scene(*words: str):
    """scene("red circle nw", …) → a picture."""
    objects = [Object(shape, colour, 3.0, *PLACES[place]) for colour, shape, place in map(str.split, words)]
    return render(Scene(tuple(objects)))


def about(kind: str, *include, exclude=()) -> dict:
    found = {"tag": kind, "include": list(include)}
    return found | ({"exclude": list(exclude)} if exclude else {})


CIRCLE, SQUARE = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
ASKED = {
    "single_object": about("single_object", CIRCLE),
    "two_object": about("two_object", CIRCLE, SQUARE),
    "counting": about("counting", {"class": "circle", "count": 2}, exclude=[{"class": "circle", "count": 3}]),
    "colors": about("colors", CIRCLE | {"color": "red"}),
    "color_attr": about("color_attr", CIRCLE | {"color": "red"}, SQUARE | {"color": "blue"}),
    "position": about("position", SQUARE, CIRCLE | {"position": ["left of", 0]}),
}
RIGHT = {
    "single_object": ["red circle nw"],
    "two_object": ["red circle nw", "red square se"],
    "counting": ["red circle nw", "blue circle se", "red square ne"],
    "colors": ["red circle nw", "blue square se"],
    "color_attr": ["red circle nw", "blue square se"],
    "position": ["red circle nw", "blue square ne"],
}
WRONG = {
    "single_object": [["red square nw"], []],
    "two_object": [["red circle nw"], ["red circle nw", "blue circle se"]],
    "counting": [["red circle nw"], ["red circle nw", "red circle ne", "red circle sw"]],
    "colors": [["blue circle nw"], ["blue circle nw", "red square se"]],
    "color_attr": [["blue circle nw", "red square se"], ["red circle nw", "red square se"]],
    "position": [["red circle ne", "blue square nw"], ["red circle nw", "blue square sw"], ["blue square ne"]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_right_pictures_follow_and_wrong_ones_do_not(kind):
    assert follows(read_shapes(scene(*RIGHT[kind]), ASKED[kind]), ASKED[kind])
    for words in WRONG[kind]:
        assert not follows(read_shapes(scene(*words), ASKED[kind]), ASKED[kind]), words


def test_every_scene_that_a_caption_draws_follows_it():
    random_ = random.Random(5)
    for index in range(36):
        caption = random_caption(KINDS[index % len(KINDS)], random_)
        assert follows(read_shapes(render(draw_scene(caption, random_)), caption.about), caption.about), caption.text


def test_a_relation_needs_what_is_beyond_a_tenth_of_both_boxes_to_be_half_of_the_offset():
    """Boxes 10 wide and high: 2 are taken off each coordinate of the offset, and what is left is divided by its length."""

    def seen_from(x: float, y: float) -> set[str]:
        return relations(Found("a", None, (x, y, x + 10, y + 10)), Found("b", None, (0, 0, 10, 10)))

    assert seen_from(4, 0) == set() and seen_from(4.1, 0) == {"right of"}  # (x − 2) / x = 1/2 at 4
    assert seen_from(-20, 0) == {"left of"} and seen_from(0, -20) == {"above"} and seen_from(0, 20) == {"below"}
    assert seen_from(-12, 12) == {"left of", "below"}
    assert seen_from(9.5, 12) == {"below"} and seen_from(10, 12) == {"below", "right of"}  # 8 / √(10² + 12²) = 0.51


def evidence(pictures: list, kinds: list[str]) -> Evidence:
    pixels = torch.stack([torch.from_numpy(picture) for picture in pictures])
    return Evidence(Samples(pixels, prompts=tuple(Prompt(kind, ASKED[kind]) for kind in kinds)), resamples=20)


def test_the_total_is_the_mean_of_the_categories_shares():
    """Two of two right, and one of four: (1 + 1/4) / 2, where the pictures' mean is 3 / 6."""
    pictures = [scene(*RIGHT["colors"])] * 2 + [scene(*RIGHT["counting"])] + [scene(*WRONG["counting"][0])] * 3
    asked = ["colors"] * 2 + ["counting"] * 4
    names = ["geneval_shapes/overall", "geneval_shapes/counting", "geneval_shapes/position"]
    overall, counting, position = evaluate(names, evidence(pictures, asked)).values()
    assert overall["value"] == pytest.approx(0.625) and overall["n"] == 6
    assert overall["passport"]["categories"] == ["colors", "counting"]
    assert counting["value"] == pytest.approx(0.25) and counting["n"] == 4
    assert counting["ci95"][0] <= 0.25 <= counting["ci95"][1] and counting["ci95"] != [0.25, 0.25]
    assert position["status"] == "skipped" and "no prompt of category position" in position["reason"]


def test_prompts_that_say_nothing_of_objects_are_a_reason_to_skip():
    only = evidence([scene("red circle nw")], ["colors"])
    plain = Evidence(Samples(only.generated.pixels, prompts=(Prompt("a red circle"),)), resamples=5)
    (entry,) = evaluate(["geneval_shapes/overall"], plain).values()
    assert entry["status"] == "skipped" and "GenEval's format" in entry["reason"]
