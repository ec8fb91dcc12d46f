"""Small random pipelines of the families of 2025 and 2026, built from their real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from generic_pipelines import flux2_klein, qwen_image, z_image

NEWER: dict[str, Callable[[], Any]] = {"flux2": flux2_klein, "qwen_image": qwen_image, "z_image": z_image}
NEWER_SIZES: dict[str, dict[str, int]] = {
    "flux2": {"height": 16, "width": 16},
    "qwen_image": {"height": 32, "width": 32},
    "z_image": {"height": 16, "width": 16},
}
CONFIGURATIONS = {"flux2": "flux.2-klein-4b", "qwen_image": "qwen-image", "z_image": "z-image-turbo"}
DRAWN = {  # of one sample: height and width, or frames, height and width
    "flux2": (16, 16), "qwen_image": (32, 32), "z_image": (16, 16),
}  # fmt: skip
NEWER_DRAWN_AS_VIDEO = tuple(name for name, shape in DRAWN.items() if len(shape) == 3)
