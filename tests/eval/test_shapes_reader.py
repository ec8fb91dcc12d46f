"""What is drawn is read back: every shape, colour, size and place, clean and with noise."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ditbench.eval import shapes as reader
from ditbench.harness.models.zoo import shapes
from ditbench.harness.models.zoo.shapes import (
    COLOURS,
    KINDS,
    RADII,
    SHAPES,
    Object,
    Scene,
    draw_scene,
    random_caption,
    render,
)


def read(image: np.ndarray) -> list[tuple[str, str]]:
    return sorted((seen.shape, seen.colour) for seen in reader.objects(image))


@pytest.mark.parametrize("size", RADII)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lone_object_is_read_in_every_colour_and_place(shape, size):
    for place, colour in enumerate(COLOURS):
        x, y = 4 + 8 * (place % 4), 4 + 8 * (place // 4)
        (seen,) = reader.objects(render(Scene((Object(shape, colour, RADII[size], x, y),))))
        assert (seen.shape, seen.colour) == (shape, colour)
        assert abs(seen.centre[0] - x) <= 1 and abs(seen.centre[1] - y) <= 1.2


@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_centre_of_mass_are_those_of_the_shape_as_it_is_drawn(shape):
    radius, side = 100.0, 300
    drawn_HW = shapes.coverage(Object(shape, "", radius, 150.0, 150.0), side)
    y = (drawn_HW.sum(axis=1) @ (np.arange(side) + 0.5)) / drawn_HW.sum()
    assert drawn_HW.sum() / radius**2 == pytest.approx(reader.AREA[shape], rel=0.01)
    assert (y - 150.0) / radius == pytest.approx(reader.SINKS[shape], abs=0.005)


@pytest.mark.parametrize("sigma", [0, 12])
def test_a_scene_is_read_back_object_by_object(sigma):
    """sigma: of noise, in grey levels."""
    random_, noise = random.Random(2), np.random.default_rng(2)
    for index in range(36):
        scene = draw_scene(random_caption(KINDS[index % len(KINDS)], random_, sizes=0.3), random_)
        image = (render(scene) + sigma * noise.standard_normal((32, 32, 3))).round().clip(0, 255).astype(np.uint8)
        assert read(image) == sorted((thing.shape, thing.colour) for thing in scene.objects)


@pytest.mark.parametrize("shape", SHAPES)
def test_moving_objects_are_read_on_both_backgrounds(shape):
    for background in shapes.BACKGROUNDS:
        image = render(Scene((Object(shape, "purple", shapes.VIDEO_RADIUS, 9, 12),), background), side=24)
        assert read(image) == [(shape, "purple")] and reader.background(image) == background


def test_what_is_no_shape_is_not_read():
    empty = render(Scene(()))
    assert read(empty) == []
    bar = empty.copy()
    bar[14:16, 4:28] = COLOURS["red"]  # 2 × 24: area enough, no shape
    assert read(bar) == []
    dot = empty.copy()
    dot[10:12, 10:12] = COLOURS["red"]
    assert read(dot) == []
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert read(noise) == []
    assert reader.background(noise) is None


def test_a_colour_between_those_of_the_palette_is_none():
    image = render(Scene((Object("square", "red", 3.0, 12, 12),)))
    image[image[..., 0] > 100] = (255, 0, 255)
    assert read(image) == []


def test_a_background_is_what_more_than_half_of_the_edge_shows():
    for rows, seen in ((13, None), (19, "dark")):  # 58 and 70 of the edge's 128 pixels, corners twice
        image = np.full((32, 32, 3), COLOURS["red"], np.uint8)
        image[:rows] = shapes.BACKGROUNDS["dark"]
        assert reader.background(image) == seen
