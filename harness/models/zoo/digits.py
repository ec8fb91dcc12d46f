"""Handwritten digits: the 1,797 real 8×8 images that come inside scikit-learn, enlarged to 16×16.

Source: UCI "Optical Recognition of Handwritten Digits" through `sklearn.datasets.load_digits` (no download).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

NUM_CLASSES = 10
IMAGE_SIZE = 16
HELD_OUT = 0.2
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """images_N1HW: float32 in [-1, 1], 16×16; labels_N: int64, 0–9."""

    images_N1HW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)


def load(part: str = "all") -> Digits:
    """The digits of one part: "train" (80 %), "held_out" (20 %, stratified, fixed seed) or "all"."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16.0 * 2.0 - 1.0
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target, dtype=torch.long)
    if part == "all":
        return Digits(images, labels)
    train, held_out = train_test_split(
        range(len(labels)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=raw.target
    )
    index = {"train": train, "held_out": held_out}
    if part not in index:
        raise ValueError(f"digits: no part {part!r}; known: all, train, held_out")
    chosen = torch.tensor(sorted(index[part]))
    return Digits(images[chosen], labels[chosen])
