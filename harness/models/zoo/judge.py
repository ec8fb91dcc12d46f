"""The judge: a small convolutional classifier whose features and logits stand where Inception's do.

It is trained on real digits only. Its numbers are never reported under Inception's names.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ditbench.harness.common.tensor_files import save_tensors

FEATURE_WIDTH = 64


class Judge(nn.Module):
    """Images (B, 1|3, side, side) → features (B, 64) and logits (B, 10).

    `forward` takes uint8 0–255 or float in [-1, 1]; three equal channels are reduced to one.
    """

    def __init__(self, num_classes: int = 10, side: int = 16) -> None:
        super().__init__()
        self.num_classes, self.side = num_classes, side
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, FEATURE_WIDTH), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURE_WIDTH, num_classes)

    def features(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1.0
        return self.body(images.float().mean(dim=1, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def save(judge: Judge, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(
        {name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"num_classes": judge.num_classes, "side": judge.side}) + "\n")


def load(folder: Path) -> Judge:
    """The judge saved in folder, in eval mode, float32."""
    judge = Judge(**json.loads((folder / "config.json").read_text()))
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.eval()
