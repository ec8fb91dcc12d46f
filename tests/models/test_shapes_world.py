"""Captions and scenes of the shapes world say the same; everything is drawn again from its seed."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from ditbench.harness.models.zoo import shapes
from ditbench.harness.models.zoo.shapes import (
    KINDS,
    Caption,
    Object,
    Scene,
    Wanted,
    draw_scene,
    random_caption,
    related,
    render,
)
from ditbench.harness.zoo.captioned import TEXT_LENGTH, tokenizer

RED_CIRCLE, BLUE_SQUARE = Wanted("circle", "red"), Wanted("square", "blue", "small")


@pytest.mark.parametrize(
    "caption, text",
    [
        (Caption("single_object", (Wanted("circle"),)), "a circle"),
        (Caption("colors", (RED_CIRCLE,)), "a red circle"),
        (Caption("color_attr", (RED_CIRCLE, BLUE_SQUARE)), "a red circle and a small blue square"),
        (Caption("counting", (Wanted("cross"),) * 3), "three crosses"),
        (Caption("position", (Wanted("circle"), Wanted("square")), "left of"), "a circle left of a square"),
    ],
)
def test_a_caption_is_said_in_words(caption, text):
    assert caption.text == text


def test_what_a_caption_asks_for_is_in_genevals_fields():
    assert Caption("colors", (RED_CIRCLE,)).about == {
        "tag": "colors",
        "include": [{"class": "circle", "count": 1, "color": "red"}],
    }
    assert Caption("counting", (Wanted("cross"),) * 3).about == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
    }
    assert Caption("position", (Wanted("circle"), Wanted("square")), "above").about["include"] == [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ["above", 0]},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_holds_what_its_caption_says_and_nothing_else(kind):
    random_ = random.Random(0)
    for _ in range(40):
        caption = random_caption(kind, random_, sizes=0.5)
        scene = draw_scene(caption, random_)
        assert len(scene.objects) == len(caption.wanted)
        assert len({(thing.x // shapes.CELL, thing.y // shapes.CELL) for thing in scene.objects}) == len(scene.objects)
        for wanted, thing in zip(caption.wanted, scene.objects, strict=True):
            assert thing.shape == wanted.shape and thing.radius == shapes.RADII[wanted.size]
            assert wanted.colour in (None, thing.colour)
        if caption.relation is not None:
            assert related(*scene.objects, caption.relation)
        if kind == "color_attr":
            assert len({thing.colour for thing in scene.objects}) == 2


@pytest.mark.parametrize("relation, x, y", [("left of", -1, 0), ("right of", 1, 0), ("above", 0, -1), ("below", 0, 1)])
def test_a_relation_is_one_way_clear_of_both_widths_and_more_along_than_across(relation, x, y):
    def at(along: float, across: float = 0.0) -> bool:
        moved = Object("circle", "red", 3.0, 16 + along * x + across * y, 16 + along * y + across * x)
        return related(moved, Object("square", "blue", 3.0, 16, 16), relation)

    assert at(6.0) and at(8.0, 7.0)
    assert not at(5.9) and not at(8.0, 8.0) and not at(-8.0) and not at(0.0, 8.0)


def test_a_picture_shows_each_object_at_its_place_on_its_background():
    scene = Scene((Object("square", "red", 3.0, 8, 8), Object("circle", "blue", 3.0, 24, 16)), "light")
    image = render(scene)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert tuple(image[8, 8]) == shapes.COLOURS["red"] and tuple(image[16, 24]) == shapes.COLOURS["blue"]
    assert tuple(image[0, 0]) == shapes.BACKGROUNDS["light"]


def test_prompts_are_the_same_for_a_seed_and_others_for_another():
    texts = [[caption.text for caption in shapes.prompts(60, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    motions = [[motion.text for motion in shapes.motions(24, seed)] for seed in (0, 0, 1)]
    assert motions[0] == motions[1] != motions[2]


def test_kinds_and_directions_come_in_turn_and_texts_once_while_there_are_new_ones():
    captions = list(shapes.prompts(48))
    assert [caption.kind for caption in captions[:12]] == [*KINDS, *KINDS]
    several = [caption.text for caption in captions if caption.kind in ("colors", "position", "color_attr")]
    assert max(Counter(several).values()) == 1
    assert [motion.direction for motion in shapes.motions(8)] == [*shapes.DIRECTIONS] * 2


@pytest.mark.parametrize("direction, speed", [("left", "fast"), ("down", "slowly")])
def test_a_video_moves_its_object_the_way_and_as_fast_as_said(direction, speed):
    motion = shapes.Motion(RED_CIRCLE, direction, speed, "dark")
    for seed in range(5):
        video = shapes.draw_video(motion, random.Random(seed), frames=8, side=24)
        assert video.shape == (8, 24, 24, 3)
        inks = [np.abs(frame.astype(float) - shapes.BACKGROUNDS["dark"]).sum(-1) for frame in video]
        y, x = np.mgrid[:24, :24]
        centres = np.array([[(ink * x).sum(), (ink * y).sum()] / ink.sum() for ink in inks])
        step = shapes.SPEEDS[speed] * np.array(shapes.DIRECTIONS[direction])
        np.testing.assert_allclose(np.diff(centres, axis=0), np.tile(step, (7, 1)), atol=1e-6)


def test_the_tokenizer_knows_every_word_and_has_room_for_every_caption():
    words = tokenizer()
    texts = [caption.text for caption in shapes.prompts(240)] + [motion.text for motion in shapes.motions(240)]
    random_ = random.Random(0)
    texts += [random_caption(kind, random_, sizes=1.0).text for kind in KINDS for _ in range(20)]
    for tokens in words(texts).input_ids:
        assert words.unk_token_id not in tokens and tokens[-1] == words.eos_token_id and len(tokens) <= TEXT_LENGTH
