"""Small videos with a known motion, their prompts, and the entry that a metric gives them."""

from __future__ import annotations

import torch

from ditbench.eval.base import Evidence, evaluate
from ditbench.harness.samples.samples import Prompt, Samples

N, FRAMES, SIDE = 4, 8, 32


def videos(speed: int = 2, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures with a bright square that moves `speed` pixels a frame, uint8 (N, F, H, W, 3)."""
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(N, 3, 4, 4, generator=random) * 100
    scene_NHWC = torch.nn.functional.interpolate(small, size=SIDE, mode="bilinear").permute(0, 2, 3, 1)
    frames_NFHWC = scene_NHWC[:, None].repeat(1, FRAMES, 1, 1, 1)
    square = torch.rand(8, 8, 3, generator=random) * 100 + 150
    for t in range(FRAMES):
        left = 4 + t * speed
        frames_NFHWC[:, t, 10:18, left : left + 8] = square
    return frames_NFHWC.round().to(torch.uint8)


PROMPTS = tuple(Prompt(text) for text in ("a cat", "the sea", "a red ball", "an old town at night"))


def evidence(speed: int = 2, **fields) -> Evidence:
    return Evidence(Samples(videos(speed), prompts=PROMPTS, **fields), resamples=50)


def entry_of(name: str, given: Evidence) -> dict:
    entry = evaluate([name], given)[name]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["n"] > 0 and (entry["ci95"] or entry["n"] == 1), "one video alone says nothing of the spread"
    low, high = entry["ci95"] or (entry["value"], entry["value"])
    assert low <= entry["value"] <= high
    assert entry["passport"]["implementation"] and not entry["paired"]
    return entry


def value(name: str, given: Evidence) -> float:
    return entry_of(name, given)["value"]
