"""Motion read from videos whose truth is known: right, wrong, standing still, and gone from the picture."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ditbench.eval.base import Evidence, evaluate
from ditbench.eval.motion_shapes import has_the_scene, is_as_fast_as_asked, moves_as_asked, shows_object
from ditbench.harness.models.zoo import shapes
from ditbench.harness.models.zoo.shapes import (
    DIRECTIONS,
    SPEEDS,
    Motion,
    Object,
    Scene,
    Wanted,
    draw_video,
    random_motion,
    render,
)
from ditbench.harness.samples.samples import Prompt, Samples

FRAMES, SIDE = 8, 24
ASKED = Motion(Wanted("circle", "red"), "right", "slowly", "dark").about
EVERY = (shows_object, moves_as_asked, is_as_fast_as_asked, has_the_scene)


def video(step=(1, 0), start=(6, 12), shape="circle", colour="red", background="dark", frames=FRAMES) -> np.ndarray:
    at = [(start[0] + k * step[0], start[1] + k * step[1]) for k in range(frames)]
    things = [Object(shape, colour, shapes.VIDEO_RADIUS, *place) for place in at]
    return np.stack([render(Scene((thing,), background), SIDE) for thing in things])


def judged(found: np.ndarray) -> list[bool]:
    return [bool(check(found, ASKED)) for check in EVERY]


def test_the_video_that_was_asked_for_is_right_in_everything():
    assert judged(video()) == [True, True, True, True]


@pytest.mark.parametrize(
    "wrong, expected",
    [
        ({"shape": "square"}, [False, True, True, True]),  # what moves is told by its colour
        ({"colour": "blue"}, [False, False, False, True]),
        ({"step": (-1, 0), "start": (18, 12)}, [True, False, True, True]),
        ({"step": (0, 1), "start": (12, 6)}, [True, False, True, True]),
        ({"step": (1, 1), "start": (6, 6)}, [True, False, True, True]),  # as far down as to the right
        ({"step": (2, 0), "start": (5, 12)}, [True, True, False, True]),
        ({"background": "light"}, [True, True, True, False]),
        ({"step": (0, 0), "start": (12, 12)}, [True, False, True, True]),  # standing still is nowhere, and slow
    ],
)
def test_each_thing_that_is_wrong_is_found_and_nothing_else(wrong, expected):
    assert judged(video(**wrong)) == expected


def test_an_object_that_leaves_the_picture_early_is_not_shown():
    gone = video()
    gone[3:] = render(Scene(()), SIDE)
    assert judged(gone) == [False, False, False, True]
    late = video()
    late[5:] = render(Scene(()), SIDE)  # five of eight frames are enough
    assert shows_object(late, ASKED) and moves_as_asked(late, ASKED)


@pytest.mark.parametrize("unseen", [slice(5, None), slice(0, 3)])
def test_a_fast_object_that_is_seen_in_part_of_the_frames_is_no_slow_one(unseen):
    found, fast = video(step=(2, 0), start=(5, 12)), ASKED | {"speed": "fast"}
    found[unseen] = render(Scene(()), SIDE)
    assert is_as_fast_as_asked(found, fast) and not is_as_fast_as_asked(found, ASKED)


def test_a_slow_object_that_is_hidden_on_its_way_is_no_fast_one():
    found = video()
    found[2:5] = render(Scene(()), SIDE)  # seven pixels in seven frames, five of them with the object
    assert is_as_fast_as_asked(found, ASKED)


def test_an_empty_video_shows_moves_and_hurries_nothing():
    assert judged(np.stack([render(Scene(()), SIDE)] * FRAMES)) == [False, False, False, True]


def test_every_video_that_is_drawn_is_right_for_its_caption_and_its_reverse_is_not():
    random_ = random.Random(3)
    for direction in DIRECTIONS:
        for speed in SPEEDS:
            drawn = random_motion(random_)
            motion = Motion(drawn.wanted, direction, speed, drawn.background)
            found = draw_video(motion, random_, FRAMES, SIDE)
            assert all(check(found, motion.about) for check in EVERY), motion.text
            assert not moves_as_asked(found[::-1], motion.about)


def test_the_metrics_are_shares_of_videos():
    pixels = torch.from_numpy(np.stack([video(), video(step=(2, 0), start=(5, 12)), video(colour="blue"), video()]))
    prompts = (Prompt("a red circle moving right slowly on a dark background", ASKED),) * 4
    names = [f"motion_shapes/{what}" for what in ("object", "direction", "speed", "scene")]
    found = evaluate(names, Evidence(Samples(pixels, prompts=prompts), resamples=20))
    assert [entry["value"] for entry in found.values()] == [0.75, 0.75, 0.5, 1.0]
    assert all(entry["n"] == 4 for entry in found.values())


def test_images_and_other_prompts_are_reasons_to_skip():
    videos = torch.from_numpy(video()[None])
    for samples in (Samples(videos[:, 0]), Samples(videos, prompts=(Prompt("a red circle"),)), Samples(videos)):
        (entry,) = evaluate(["motion_shapes/speed"], Evidence(samples, resamples=5)).values()
        assert entry["status"] == "skipped" and entry["reason"]
