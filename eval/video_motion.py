"""How videos move, by optical flow (eval/flow.py; the passport names the estimator).

Collapse to noise makes dynamic_degree and flow_score larger, and a frozen video makes warping_error zero: read them next
to `collapse`, and next to the float model's own values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import neighbours, one_by_one, remembered, together
from ditbench.eval.flow import Flow, find_flow, warp
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.vbench_style import of_dimension
from ditbench.harness.samples.samples import Rows

VBENCH_FPS = 8.0  # the rate VBench looks at motion
FASTEST_SHARE = 0.05  # of a frame's pixels
HELD = 32  # bytes per value of a frame, while two are warped onto each other; measured


@metric("vbench_style/dynamic_degree", better="higher")
def dynamic_degree(evidence: Evidence) -> Measurement:
    """Share of videos in which enough frames move: the fastest 5 % of pixels, against a threshold."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    step = max(1, round(evidence.generated.fps / VBENCH_FPS))
    frames, side = len(range(0, videos_NFHWC.shape[1], step)), min(videos_NFHWC.shape[2:4])
    if frames < 2:
        raise MetricSkipped(f"at {VBENCH_FPS:g} frames per second one frame is left; generate longer videos")
    flow = find_flow(evidence.device)
    fastest_NP = _speeds(videos_NFHWC, flow, step)[..., 1]
    dynamic_N = torch.stack([is_dynamic(fastest_P, side, frames) for fastest_P in fastest_NP])
    settings = {"threshold_px": dynamic_threshold(side), "pairs_needed": dynamic_pairs(frames), "every_frame": step}
    return of_dimension("dynamic_degree", evidence, dynamic_N, flow.package, _origin(flow, **settings))


@metric("vbench_style/motion_smoothness", better="higher")
def motion_smoothness(evidence: Evidence) -> Measurement:
    """(255 − mean |odd frame − the frame interpolated between its neighbours|) / 255."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    if videos_NFHWC.shape[1] < 3:
        raise MetricSkipped("needs videos of 3 frames or more, to leave one out and interpolate it")
    flow = find_flow(evidence.device)
    videos = (video.to(evidence.device) for video in one_by_one(videos_NFHWC))
    values = [smoothness(video[1::2], interpolated(video[::2], flow)).cpu() for video in videos]
    interpolator = "both neighbours warped by optical flow and averaged (Jiang et al. 2018, eq. 4); VBench: AMT-S"
    origin = _origin(flow, interpolator=interpolator)
    return of_dimension("motion_smoothness", evidence, torch.stack(values), flow.package, origin)


@metric("warping_error", better="lower")
def warping_error(evidence: Evidence) -> Measurement:
    """Mean squared difference of a frame and its successor warped onto it, where both see the same (Lai et al. 2018)."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    flow = find_flow(evidence.device)
    errors = []
    for video_FHWC in one_by_one(videos_NFHWC):
        of_pairs = []
        for before, after in neighbours(video_FHWC.to(evidence.device), HELD):
            forward, backward = flow.estimate(before, after), flow.estimate(after, before)
            of_pairs.append(masked_error(_unit(before), warp(_unit(after), forward), occluded(forward, backward)))
        errors.append(torch.cat(of_pairs).mean().cpu())
    origin = _origin(
        flow, pixels="0 to 1, mean over channels", occlusion="Ruder et al. 2016", flow_of="the video itself"
    )
    return mean_or_share(evidence, torch.stack(errors), "ditbench warping_error", flow.package, **origin)


@metric("flow_score", better="none", unit="px")
def flow_score(evidence: Evidence) -> Measurement:
    """Mean length of the optical flow between neighbouring frames; more motion, not by itself a better video."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    flow = find_flow(evidence.device)
    values_N = _speeds(videos_NFHWC, flow, step=1)[..., 0].mean(dim=1)
    return mean_or_share(evidence, values_N, "ditbench flow_score", flow.package, **_origin(flow))


def fastest(speed_PHW: Tensor) -> Tensor:
    """Mean speed of the fastest 5 % of each frame's pixels, of one at least, (P,)."""
    speed_PX = speed_PHW.flatten(1)
    return speed_PX.topk(max(1, int(FASTEST_SHARE * speed_PX.shape[1])), dim=1).values.mean(dim=1)


def dynamic_threshold(side: int) -> float:
    """Pixels per frame: 6 at a short side of 256."""
    return 6.0 * side / 256.0


def dynamic_pairs(frames: int) -> int:
    """Pairs of frames that have to move: 4 of 16 frames. VBench's rule asks for none below 3 frames; here for one."""
    return max(1, round(4 * frames / 16.0))


def is_dynamic(fastest_P: Tensor, side: int, frames: int) -> Tensor:
    return (fastest_P > dynamic_threshold(side)).sum() >= dynamic_pairs(frames)


def interpolated(frames_FHWC: Tensor, flow: Flow) -> Tensor:
    """The frames half-way between neighbours, uint8 (F − 1, H, W, 3).

    Jiang et al. 2018 (arXiv:1712.00080), eq. 4 at t = 1/2: from the middle, the frame before lies at
    (F₁₀ − F₀₁) / 4 and the frame after at minus that. Both are warped and averaged.
    """
    middles = []
    for before, after in neighbours(frames_FHWC, HELD):
        to_before = (flow.estimate(after, before) - flow.estimate(before, after)) / 4
        middle_P3HW = (warp(_unit(before), to_before) + warp(_unit(after), -to_before)) / 2
        middles.append((255.0 * middle_P3HW).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(middles)


def smoothness(left_out_FHWC: Tensor, middle_PHWC: Tensor) -> Tensor:
    """The last frame of a video of even length has no later neighbour and is not compared."""
    at_once = together(middle_PHWC, HELD)
    pairs = zip(left_out_FHWC[: len(middle_PHWC)].split(at_once), middle_PHWC.split(at_once), strict=True)
    differences = [(ours.float() - middle.float()).abs().flatten(1).mean(dim=1) for ours, middle in pairs]
    return (255.0 - torch.cat(differences).mean()) / 255.0


def occluded(forward_P2HW: Tensor, backward_P2HW: Tensor) -> Tensor:
    """bool (P, H, W), Ruder et al. 2016 (arXiv:1604.08610): no way back (eq. 5), or a motion boundary (eq. 6).

    With w the flow and ŵ the way back found where it ends:
    |w + ŵ|² > 0.01 (|w|² + |ŵ|²) + 0.5, or |∇u|² + |∇v|² > 0.01 |w|² + 0.002.
    """
    back_P2HW = warp(backward_P2HW, forward_P2HW)
    length_PHW = forward_P2HW.square().sum(dim=1)
    no_way_back_PHW = (forward_P2HW + back_P2HW).square().sum(dim=1) > (
        0.01 * (length_PHW + back_P2HW.square().sum(dim=1)) + 0.5
    )
    gradient_PHW = torch.zeros_like(length_PHW)
    gradient_PHW[:, :-1] += forward_P2HW.diff(dim=2).square().sum(dim=1)
    gradient_PHW[:, :, :-1] += forward_P2HW.diff(dim=3).square().sum(dim=1)
    return no_way_back_PHW | (gradient_PHW > 0.01 * length_PHW + 0.002)


def masked_error(frames_P3HW: Tensor, warped_P3HW: Tensor, occluded_PHW: Tensor) -> Tensor:
    """Mean squared difference where nothing is occluded, (P,).

    A pair without one visible pixel counts with all its pixels; the release of Lai et al. counts it as 0, which would
    make noise the steadiest video.
    """
    visible_PHW = ~occluded_PHW
    visible_PHW = visible_PHW | ~visible_PHW.any(dim=(1, 2), keepdim=True)
    error_PHW = (frames_P3HW - warped_P3HW).square().mean(dim=1)
    return (error_PHW * visible_PHW).sum(dim=(1, 2)) / visible_PHW.sum(dim=(1, 2))


def _speeds(videos_NFHWC: Rows, flow: Flow, step: int) -> Tensor:
    """Mean and fastest speed of every pair of frames that are `step` apart, pixels, (N, P, 2)."""

    def of_pairs(before_PHWC: Tensor, after_PHWC: Tensor) -> Tensor:
        speed_PHW = flow.estimate(before_PHWC, after_PHWC).norm(dim=1)
        return torch.stack([speed_PHW.mean(dim=(1, 2)), fastest(speed_PHW)], dim=-1).cpu()

    def all_videos() -> Tensor:
        videos = (video[::step].to(flow.device) for video in one_by_one(videos_NFHWC))
        return torch.stack([torch.cat([of_pairs(*pair) for pair in neighbours(video, HELD)]) for video in videos])

    return remembered(videos_NFHWC, flow, f"speeds, step={step}", all_videos)


def _unit(frames_PHWC: Tensor) -> Tensor:
    """uint8 (P, H, W, 3) → float32 in [0, 1], (P, 3, H, W)."""
    return frames_PHWC.permute(0, 3, 1, 2).float() / 255.0


def _origin(flow: Flow, **settings: Any) -> dict[str, Any]:
    return flow.origin | {"dtype": "float32"} | settings
