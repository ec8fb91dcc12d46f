"""Does a video of the shapes world show the object, the motion and the background that its prompt asks for? Read exactly.

The object is followed through the frames by its colour and shape. It moves the way asked if its centre ends that way and
further that way than across; speed is how far it comes per frame, against half-way between the two speeds; the scene is
the frames' edge.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ditbench.eval import shapes
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import one_by_one
from ditbench.eval.per_sample import mean_or_share
from ditbench.harness.models.zoo.shapes import DIRECTIONS, SPEEDS

LEAST_PATH = 0.04  # of the picture's side: less is standing still
LEAST_FRAMES = 0.5  # share of frames in which the object has to be seen


def path(video_FHWC: np.ndarray, about: dict, *, any_shape: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
    """Frames that show the object asked for and its centres (x, y) there, or None if too few do.

    any_shape: its colour is enough, since a shape may blur on its way.
    """
    wanted, frames, centres = about["include"][0], [], []
    for index, frame in enumerate(video_FHWC):
        seen = [
            s
            for s in shapes.objects(frame)
            if s.colour == wanted.get("color", s.colour) and (any_shape or s.shape == wanted["class"])
        ]
        if seen:
            frames.append(index)
            centres.append(seen[0].centre)
    enough = len(frames) >= max(2, LEAST_FRAMES * len(video_FHWC))
    return (np.array(frames), np.array(centres)) if enough else None


def shows_object(video_FHWC: np.ndarray, about: dict) -> bool:
    return path(video_FHWC, about) is not None


def moves_as_asked(video_FHWC: np.ndarray, about: dict) -> bool:
    found = path(video_FHWC, about, any_shape=True)
    if found is None:
        return False
    moved = found[1][-1] - found[1][0]
    wanted = np.array(DIRECTIONS[about["direction"]])
    along, across = float(moved @ wanted), float(np.abs(moved[wanted == 0]).sum())
    return along >= LEAST_PATH * video_FHWC.shape[2] and along > across


def is_as_fast_as_asked(video_FHWC: np.ndarray, about: dict) -> bool:
    """By the frames between the first and the last that show it: it may come into sight late."""
    found = path(video_FHWC, about, any_shape=True)
    if found is None:
        return False
    frames, centres = found
    per_frame = np.linalg.norm(centres[-1] - centres[0]) / (frames[-1] - frames[0])
    fast = bool(per_frame > sum(SPEEDS.values()) / len(SPEEDS))
    return fast == (about["speed"] == "fast")


def has_the_scene(video_FHWC: np.ndarray, about: dict) -> bool:
    return np.mean([shapes.background(frame) == about["scene"] for frame in video_FHWC]) > 0.5


def _measure(evidence: Evidence, check: Callable[[np.ndarray, dict], bool]) -> Measurement:
    videos_NFHWC, prompts = evidence.generated.videos_NFHWC, evidence.generated.prompts
    if not prompts or not all("direction" in prompt.about for prompt in prompts):
        raise MetricSkipped("needs prompts of the shapes world's videos; set protocol.prompts=shapes-video")
    pairs = zip(one_by_one(videos_NFHWC), prompts, strict=True)
    holds_N = np.array([check(video.numpy(), prompt.about) for video, prompt in pairs], bool)
    return mean_or_share(evidence, holds_N, "ditbench motion, exact reader", "ditbench", dtype="uint8")


@metric("motion_shapes/object", better="higher", asks=("motion prompts",))
def object_(evidence: Evidence) -> Measurement:
    """Share of videos of the shapes world that show the object asked for."""
    return _measure(evidence, shows_object)


@metric("motion_shapes/direction", better="higher", asks=("motion prompts",))
def direction(evidence: Evidence) -> Measurement:
    """Share of videos of the shapes world whose object moves the way asked for."""
    return _measure(evidence, moves_as_asked)


@metric("motion_shapes/speed", better="higher", asks=("motion prompts",))
def speed(evidence: Evidence) -> Measurement:
    """Share of videos of the shapes world whose object is as fast as asked for."""
    return _measure(evidence, is_as_fast_as_asked)


@metric("motion_shapes/scene", better="higher", asks=("motion prompts",))
def scene(evidence: Evidence) -> Measurement:
    """Share of videos of the shapes world with the background asked for."""
    return _measure(evidence, has_the_scene)
