"""Reading pictures of the shapes world back into objects: exact, without any network.

Each pixel takes the nearest colour of the palette (or none, if it is far from all); touching pixels of one colour are an
object if they are enough. How far each pixel is from background to that colour is how much of it the object covers; its
shape is the one that, drawn with that area at that place, covers the pixels best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ditbench.harness.models.zoo import shapes

FAR = 85.0  # RGB distance from which a pixel is of no colour; the palest pixels of a small white cross are 81 away from white
LEAST_AREA = 6 / 32**2  # of the picture: a small triangle, the smallest that is drawn, has 8 pixels of its colour
LEAST_COVER = 0.7  # intersection over union with the drawn shape; less is no shape
# Of each shape with radius 1: its area, and how far its centre of mass lies below its centre.
AREA = {"circle": np.pi, "square": 1.8**2, "triangle": 2.0, "cross": 4 * 0.72 - 0.72**2}
SINKS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}


@dataclass(frozen=True)
class Seen:
    """An object in a picture. box: left, top, right, bottom in pixels."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]
    cover: float

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def objects(image_HWC: np.ndarray) -> list[Seen]:
    """Every object of a uint8 picture, the best covered first."""
    names, nearest_HW = _nearest(image_HWC)
    behind = np.array(shapes.BACKGROUNDS[background(image_HWC) or "dark"], float)
    solid_HW = nearest_HW < len(shapes.COLOURS)
    found = []
    for index, colour in enumerate(shapes.COLOURS):
        parts_HW, count = ndimage.label(nearest_HW == index)
        for part in range(1, count + 1):
            mask_HW = parts_HW == part
            if mask_HW.sum() < LEAST_AREA * mask_HW.size:
                continue
            around_HW = ndimage.binary_dilation(mask_HW, np.ones((3, 3))) & (mask_HW | ~solid_HW | (nearest_HW < 0))
            ink = np.array(shapes.COLOURS[colour], float) - behind
            cover_HW = np.clip((image_HWC - behind) @ ink / (ink @ ink), 0, 1) * around_HW
            shape, cover = _shape_of(cover_HW)
            if cover >= LEAST_COVER:
                rows, columns = np.where(mask_HW.any(1))[0], np.where(mask_HW.any(0))[0]
                found.append(Seen(shape, colour, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), cover))
    return sorted(found, key=lambda seen: -seen.cover)


def background(image_HWC: np.ndarray) -> str | None:
    """The background that most of the picture's edge shows, or None."""
    names, nearest_HW = _nearest(image_HWC)
    edge = np.concatenate([nearest_HW[0], nearest_HW[-1], nearest_HW[:, 0], nearest_HW[:, -1]])
    shares = {name: float((edge == names.index(name)).mean()) for name in shapes.BACKGROUNDS}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > 0.5 else None


def _nearest(image_HWC: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the palette, and for each pixel the index of the nearest (−1: none)."""
    palette = shapes.COLOURS | shapes.BACKGROUNDS
    distance_HWK = np.linalg.norm(image_HWC[..., None, :].astype(float) - np.array(list(palette.values())), axis=-1)
    nearest_HW = distance_HWK.argmin(-1)
    return list(palette), np.where(distance_HWK.min(-1) <= FAR, nearest_HW, -1)


def _shape_of(cover_HW: np.ndarray) -> tuple[str, float]:
    """The shape that, drawn with the same area around the same centre of mass, is most like it, and how much."""
    area = cover_HW.sum()
    y, x = ndimage.center_of_mass(cover_HW)
    covers = {}
    for name in shapes.SHAPES:
        radius = float(np.sqrt(area / AREA[name]))
        drawn = shapes.Object(name, "", radius, x + 0.5, y + 0.5 - SINKS[name] * radius)
        drawn_HW = shapes.coverage(drawn, len(cover_HW))
        covers[name] = float(np.minimum(drawn_HW, cover_HW).sum() / np.maximum(drawn_HW, cover_HW).sum())
    best = max(covers, key=lambda name: covers[name])
    return best, covers[best]
