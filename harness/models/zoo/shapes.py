"""The shapes world: captioned scenes of coloured shapes, drawn exactly, whose truth is known by construction.

Text-to-image and video models are trained on it; `eval/shapes.py` reads pictures back into objects. A caption is made of
the same few words each time, in GenEval's six kinds (Ghosh et al. 2023, arXiv:2310.11513):

    single_object   a circle                       colors       a red circle
    two_object      a circle and a square          color_attr   a red circle and a blue square
    counting        three circles                  position     a circle left of a square

Sizes may be named ("a small circle"); what a caption does not say is drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

SIDE, CELL = 32, 8  # pixels: of a picture, and of a cell, in the middle of which an object sits
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "white": (245, 245, 245),
    "purple": (160, 60, 190),
}
BACKGROUNDS = {"dark": (24, 24, 28), "light": (128, 132, 140)}
RADII = {"small": 2.2, "large": 3.6, None: 3.0}
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first, (x, y), y down
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 1, "fast": 2}  # pixels per frame
VIDEO_RADIUS = 3.2
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Object:
    """One shape; x and y of its centre in pixels, y downwards."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str = "dark"


@dataclass(frozen=True)
class Wanted:
    """What a caption asks of one object; None is free."""

    shape: str
    colour: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(["a", *(word for word in (self.size, self.colour, self.shape) if word)])


@dataclass(frozen=True)
class Caption:
    """wanted: the objects asked for (counting: that many equal ones); relation: of the first to the second."""

    kind: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        if self.kind == "counting":
            number = next(word for word, count in NUMBERS.items() if count == len(self.wanted))
            return f"{number} {plural(self.wanted[0].shape)}"
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(map(str, self.wanted))

    @property
    def about(self) -> dict:
        """GenEval's fields of a prompt: tag, include [{class, count, color, position}], exclude."""
        include: list[dict] = []
        for wanted in dict.fromkeys(self.wanted):
            entry: dict = {"class": wanted.shape, "count": self.wanted.count(wanted)}
            include.append(entry | ({"color": wanted.colour} if wanted.colour else {}))
        if self.relation:
            include = [include[1], include[0] | {"position": [self.relation, 0]}]
        more = [{"class": self.wanted[0].shape, "count": len(self.wanted) + 1}] if self.kind == "counting" else []
        return {"tag": self.kind, "include": include} | ({"exclude": more} if more else {})


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def words() -> list[str]:
    """Every word that a caption can hold, those of videos too."""
    text = [*SHAPES, *map(plural, SHAPES), *COLOURS, *NUMBERS, *DIRECTIONS, *SPEEDS, *BACKGROUNDS]
    text += ["a", "and", "small", "large", "moving", "on", "background", "above", "below", "left", "right", "of"]
    return sorted(set(text))


def random_caption(kind: str, random_: random.Random, sizes: float = 0.15) -> Caption:
    """sizes: the share of objects whose size is named, where the kind is not about numbers."""

    def wanted(colour: bool, shape: str | None = None) -> Wanted:
        size = random_.choice(["small", "large"]) if random_.random() < sizes else None
        return Wanted(shape or random_.choice(SHAPES), random_.choice(list(COLOURS)) if colour else None, size)

    if kind in ("single_object", "colors"):
        return Caption(kind, (wanted(kind == "colors"),))
    if kind == "counting":
        return Caption(kind, (Wanted(random_.choice(SHAPES)),) * random_.choice(list(NUMBERS.values())))
    first, second = random_.sample(SHAPES, 2)
    coloured = kind == "color_attr" or (kind == "position" and random_.random() < 0.3)
    pair = (wanted(coloured, first), wanted(coloured, second))
    if kind == "color_attr":  # the colours differ, else nothing could be mixed up
        while pair[0].colour == pair[1].colour:
            pair = (pair[0], wanted(True, second))
    return Caption(kind, pair, random_.choice(list(RELATIONS)) if kind == "position" else None)


def draw_scene(caption: Caption, random_: random.Random, side: int = SIDE) -> Scene:
    """A random scene that the caption describes: nothing else in it, and each object in a cell of its own."""
    common = random_.choice(list(COLOURS))  # counted objects are of one colour or of several
    mixed = random_.random() < 0.5
    cells = [(column, row) for column in range(side // CELL) for row in range(side // CELL)]
    while True:
        objects = []
        for wanted, (column, row) in zip(caption.wanted, random_.sample(cells, len(caption.wanted)), strict=True):
            free = common if caption.kind == "counting" and not mixed else random_.choice(list(COLOURS))
            x, y = (column + 0.5) * CELL, (row + 0.5) * CELL
            objects.append(Object(wanted.shape, wanted.colour or free, RADII[wanted.size], x, y))
        if caption.relation is None or related(*objects, caption.relation):
            return Scene(tuple(objects))


def related(a: Object, b: Object, relation: str) -> bool:
    """Whether a is `relation` b: further than half of both widths that way, and more that way than across."""
    right, down = RELATIONS[relation]
    along = (a.x - b.x) * right + (a.y - b.y) * down
    across = abs((a.x - b.x) * down) + abs((a.y - b.y) * right)
    return along >= a.radius + b.radius and along > across


def render(scene: Scene, side: int = SIDE) -> np.ndarray:
    """uint8 (side, side, 3), edges smoothed over one pixel."""
    image = np.empty((side, side, 3))
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        cover = coverage(thing, side)[:, :, None]
        image = image * (1 - cover) + np.array(COLOURS[thing.colour]) * cover
    return image.round().astype(np.uint8)


def coverage(thing: Object, side: int) -> np.ndarray:
    """Share of each pixel that the object covers, (side, side), from the distance to its edge."""
    y, x = np.mgrid[:side, :side] + 0.5
    x, y, r = x - thing.x, y - thing.y, thing.radius
    if thing.shape == "circle":
        distance = np.hypot(x, y) - r
    elif thing.shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.9 * r
    elif thing.shape == "triangle":  # apex up, as wide as high
        distance = np.maximum(y - r, (2 * abs(x) - (y + r)) / 5**0.5)
    else:
        arm = 0.36 * r
        bars = [np.maximum(abs(a) - r, abs(b) - arm) for a, b in ((x, y), (y, x))]
        distance = np.minimum(*bars)
    return np.clip(0.5 - distance, 0, 1)


# Videos: one object that moves, on a background that the caption names.


@dataclass(frozen=True)
class Motion:
    """A video's caption: one object, where it goes, how fast, before what."""

    wanted: Wanted
    direction: str
    speed: str
    background: str

    @property
    def text(self) -> str:
        return f"{self.wanted} moving {self.direction} {self.speed} on a {self.background} background"

    @property
    def about(self) -> dict:
        return {
            "tag": "motion",
            "include": [{"class": self.wanted.shape, "count": 1, "color": self.wanted.colour}],
            "direction": self.direction,
            "speed": self.speed,
            "scene": self.background,
        }


def random_motion(random_: random.Random) -> Motion:
    shape, colour = random_.choice(SHAPES), random_.choice(list(COLOURS))
    direction, speed = random_.choice(list(DIRECTIONS)), random_.choice(list(SPEEDS))
    return Motion(Wanted(shape, colour), direction, speed, random_.choice(list(BACKGROUNDS)))


def draw_video(motion: Motion, random_: random.Random, frames: int, side: int) -> np.ndarray:
    """uint8 (frames, side, side, 3): whole pixels a frame, along a row or column of cells, in the picture all the way."""
    step = [SPEEDS[motion.speed] * along for along in DIRECTIONS[motion.direction]]
    start = []
    for along in step:
        path, margin = along * (frames - 1), CELL // 2
        places = range(margin + max(0, -path), side - margin - max(0, path) + 1, 1 if along else CELL)
        start.append(random_.choice(places))
    moving = Object(motion.wanted.shape, str(motion.wanted.colour), VIDEO_RADIUS, *start)
    at = [replace(moving, x=start[0] + k * step[0], y=start[1] + k * step[1]) for k in range(frames)]
    return np.stack([render(Scene((one,), motion.background), side) for one in at])


def prompts(n: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Iterator[Caption]:
    """n captions, the kinds in turn, no text twice while there are new ones."""
    random_, seen = random.Random(seed), set()
    for index in range(n):
        for _ in range(50):
            caption = random_caption(kinds[index % len(kinds)], random_, sizes=0.0)
            if caption.text not in seen:
                break
        seen.add(caption.text)
        yield caption


def motions(n: int, seed: int = 0) -> Iterator[Motion]:
    """n captions of videos, the directions in turn."""
    random_ = random.Random(seed)
    for index in range(n):
        yield replace(random_motion(random_), direction=list(DIRECTIONS)[index % len(DIRECTIONS)])
