"""Optical flow: where each pixel of a frame is in another frame.

A flow (P, 2, H, W) of P pairs of frames says, in pixels, that before[y, x] is at after[y + flow[1], x + flow[0]].

Two estimators, the first that is here is used and the passport names it; their numbers must not be compared:
1. torchvision's RAFT (Teed & Deng 2020, arXiv:2003.12039), if its weights are on this machine: those trained on
   FlyingChairs and FlyingThings3D, ported from the raft-things.pth that VBench uses, with VBench's 20 updates;
2. block matching, written here.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

from ditbench.eval import batches
from ditbench.eval.base import MetricSkipped
from ditbench.eval.features import full_precision
from ditbench.eval.weights import stored_sha256, weights_folder
from ditbench.harness.common.devices import CPU

RAFT_FILE = "raft_large_C_T_V1-22a6c225.pth"
RAFT_URL = f"https://download.pytorch.org/models/{RAFT_FILE}"
RAFT_UPDATES = 20  # VBench's
RAFT_SIDE = 128  # torchvision's RAFT takes no smaller frames
RAFT_PAIRS = 4  # pairs at once, if their correlations fit: those of one pair of 720p frames take 1.1 GB

WORK_SIDE = 64  # block matching works on frames of this short side: fine enough for small videos, fast for large
REACH = 8  # largest displacement searched, in working pixels: an eighth of the short side
WINDOW = 9  # working pixels; the block that is compared. Motion is smeared over half of it around a moving thing
PER_PIXEL = 0.25  # grey levels that one working pixel of displacement costs, so that flat areas and noise stay at rest


@dataclass(frozen=True, eq=False)
class Flow:
    """estimate: uint8 (P, H, W, 3) before and after, on the device → float32 (P, 2, H, W) there. origin: for the passport."""

    package: str
    estimate: Callable[[Tensor, Tensor], Tensor]
    origin: dict[str, Any]
    device: torch.device = CPU


def find_flow(device: torch.device) -> Flow:
    """The best estimator that is on this machine. Nothing is downloaded."""
    for folder in (weights_folder(), Path(torch.hub.get_dir()) / "checkpoints"):
        if (folder / RAFT_FILE).is_file():
            return raft(folder / RAFT_FILE, device)
    return blocks(device)


@cache
def raft(weights: Path, device: torch.device) -> Flow:
    from torchvision.models.optical_flow import raft_large

    network = raft_large(weights=None)
    try:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise MetricSkipped(f"{weights}: not RAFT's weights; delete it, and fetch it again from {RAFT_URL}") from error
    network = network.eval().to(device)

    @torch.no_grad()
    def estimate(before_PHWC: Tensor, after_PHWC: Tensor) -> Tensor:
        height, width = before_PHWC.shape[1:3]
        scale = max(1.0, RAFT_SIDE / min(height, width))
        size = tuple(max(RAFT_SIDE, round(side * scale)) for side in (height, width))
        flows, at_once = [], max(1, min(RAFT_PAIRS, batches.BYTES // correlation_bytes(*size)))
        for pair in zip(before_PHWC.split(at_once), after_PHWC.split(at_once), strict=True):
            before, after = (_padded_to_8(_resized(_channels_first(x) / 127.5 - 1.0, size)) for x in pair)
            with full_precision():
                flow_P2HW = network(before, after, num_flow_updates=RAFT_UPDATES)[-1][..., : size[0], : size[1]]
            flows.append(_resized_flow(flow_P2HW, (height, width)))
        return torch.cat(flows)

    origin = {"flow": f"torchvision raft_large, {weights.name}", "flow_updates": RAFT_UPDATES}
    return Flow("torchvision", estimate, origin | {"weights_sha256": stored_sha256(weights)}, device)


def correlation_bytes(height: int, width: int) -> int:
    """Of one pair in RAFT: every eighth pixel with every eighth, float32, and three levels above of a quarter each."""
    places = math.ceil(height / 8) * math.ceil(width / 8)
    return 4 * places**2 * 4 // 3


@cache
def blocks(device: torch.device) -> Flow:
    resolution = f"1 pixel of a frame resized to a short side of {WORK_SIDE}, at most {REACH} of them"
    origin = {"flow": "ditbench block matching (not RAFT)", "flow_window": WINDOW, "flow_resolution": resolution}
    origin["flow_raft"] = f"for RAFT, `ditbench data fetch raft-large` ({RAFT_URL})"
    return Flow("ditbench", match_blocks, origin, device)


def match_blocks(before_PHWC: Tensor, after_PHWC: Tensor) -> Tensor:
    """The displacement d with the least mean |before(x) − after(x + d)| over a window, plus PER_PIXEL · |d|."""
    height, width = before_PHWC.shape[1:3]
    scale = WORK_SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    before, after = (_resized(_channels_first(frames), size) for frames in (before_PHWC, after_PHWC))
    after = pad(after, [REACH] * 4, mode="replicate")
    device = before.device
    rows_HH, columns_WW = _averaging(size[0]).to(device), _averaging(size[1]).T.to(device)
    steps = range(-REACH, REACH + 1)
    displacement_D2 = torch.tensor([(dx, dy) for dy in steps for dx in steps], dtype=torch.float32)
    least_PHW = torch.full((len(before), *size), torch.inf, device=device)
    best_PHW = torch.zeros(len(before), *size, dtype=torch.long, device=device)
    for index, (dx, dy) in enumerate(displacement_D2.int().tolist()):
        shifted = after[..., REACH + dy : REACH + dy + size[0], REACH + dx : REACH + dx + size[1]]
        block_PHW = rows_HH @ (before - shifted).abs().mean(dim=1) @ columns_WW  # products: faster than pooling
        cost_PHW = block_PHW + PER_PIXEL * (dx**2 + dy**2) ** 0.5
        best_PHW = torch.where(cost_PHW < least_PHW, index, best_PHW)
        least_PHW = torch.minimum(cost_PHW, least_PHW)
    flow_P2HW = displacement_D2.to(device)[best_PHW].permute(0, 3, 1, 2)
    return _resized_flow(flow_P2HW, (height, width))


def warp(after_PCHW: Tensor, flow_P2HW: Tensor) -> Tensor:
    """after(x + flow(x)), bilinear; what lies outside the frame takes the value of its border."""
    height, width = after_PCHW.shape[-2:]
    x_W, y_H = (torch.arange(side, dtype=torch.float32, device=flow_P2HW.device) for side in (width, height))
    x_PHW, y_PHW = flow_P2HW[:, 0] + x_W, flow_P2HW[:, 1] + y_H[:, None]
    grid = torch.stack([(2 * x_PHW + 1) / width - 1, (2 * y_PHW + 1) / height - 1], dim=-1)
    return grid_sample(after_PCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _averaging(size: int) -> Tensor:
    """(size, size): a product with it is the mean over WINDOW places, over fewer at the ends."""
    place = torch.arange(size)
    near = ((place[:, None] - place).abs() <= WINDOW // 2).float()
    return near / near.sum(dim=1, keepdim=True)


def _channels_first(frames_PHWC: Tensor) -> Tensor:
    return frames_PHWC.permute(0, 3, 1, 2).float()


def _resized(frames_PCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(frames_PCHW.shape[-2:]) == size:
        return frames_PCHW
    return interpolate(frames_PCHW, size=size, mode="bilinear", antialias=True, align_corners=False)


def _resized_flow(flow_P2HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Displacements in pixels of the new size; nearest, so that no motion appears between two moving things."""
    scale = torch.tensor([size[1] / flow_P2HW.shape[3], size[0] / flow_P2HW.shape[2]], device=flow_P2HW.device).view(
        1, 2, 1, 1
    )
    return interpolate(flow_P2HW, size=size, mode="nearest-exact") * scale


def _padded_to_8(frames_PCHW: Tensor) -> Tensor:
    height, width = frames_PCHW.shape[-2:]
    return pad(frames_PCHW, [0, -width % 8, 0, -height % 8], mode="replicate")
