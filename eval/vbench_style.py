"""VBench's dimensions (Huang et al. 2023, arXiv:2311.17982; code Vchitect/VBench), as far as maintained libraries reach.

The names say `vbench_style`: the definitions are VBench's, some judges are not, and each passport says which. Frames are
taken as they were generated, not from an .mp4. Those of motion are in eval/video_motion.py, those of text in
eval/video_text.py. A blank or frozen video scores perfectly in the first three: read them next to `collapse`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, linear

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import neighbours, one_by_one
from ditbench.eval.features import channels_first, full_precision
from ditbench.eval.needs import package
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.video_judges import (
    BATCH,
    CLIP,
    CLIP_LARGE,
    DINO,
    frame_features,
    judge_here,
    load_judge,
)
from ditbench.eval.weights import stored_sha256, weights_folder

AESTHETIC_FILE = "sa_0_4_vit_l_14_linear.pth"
FLICKER_HELD = 16  # bytes per value of a frame
MUSIQ_SIDE = 512  # VBench's mode "longer": frames whose longer side is larger are made smaller


@metric("vbench_style/temporal_flickering", better="higher")
def temporal_flickering(evidence: Evidence) -> Measurement:
    """(255 − mean |difference of neighbouring frames|) / 255."""
    videos = one_by_one(evidence.generated.videos_NFHWC)
    values_N = torch.stack([flickering(video.to(evidence.device)).cpu() for video in videos])
    origin = {"dtype": "float32", "static_filter": "not applied; VBench first drops videos that move, by RAFT"}
    return of_dimension("temporal_flickering", evidence, values_N, "ditbench", origin)


@metric("vbench_style/subject_consistency", better="higher", needs=(judge_here(DINO),))
def subject_consistency(evidence: Evidence) -> Measurement:
    """DINO features: mean over frames of the average cosine to the first and to the previous frame."""
    return _consistency_metric("subject_consistency", evidence, DINO)


@metric("vbench_style/background_consistency", better="higher", needs=(judge_here(CLIP),))
def background_consistency(evidence: Evidence) -> Measurement:
    """CLIP image features: mean over frames of the average cosine to the first and to the previous frame."""
    return _consistency_metric("background_consistency", evidence, CLIP)


def _aesthetic_head() -> str | None:
    here = (weights_folder() / AESTHETIC_FILE).is_file()
    return None if here else "LAION's aesthetic head is not here; `ditbench data fetch laion-aesthetic`"


@metric("vbench_style/aesthetic_quality", better="higher", needs=(_aesthetic_head, judge_here(CLIP_LARGE)))
def aesthetic_quality(evidence: Evidence) -> Measurement:
    """LAION's linear aesthetic head on CLIP L/14, over 10, mean over frames."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    if problem := _aesthetic_head():
        raise MetricSkipped(problem)
    path = weights_folder() / AESTHETIC_FILE
    judge, origin = load_judge(CLIP_LARGE, evidence.device)
    head = torch.load(path, map_location="cpu", weights_only=True)
    features_NFW = frame_features(videos_NFHWC, judge, antialias=False)
    values_N = linear(features_NFW, head["weight"].float(), head["bias"].float())[..., 0].mean(dim=1) / 10.0
    origin |= {"head": AESTHETIC_FILE, "head_sha256": stored_sha256(path), "antialias": False}
    return of_dimension("aesthetic_quality", evidence, values_N, "transformers", origin)


_pyiqa = package("pyiqa", "pyiqa")  # brings MUSIQ, and fetches its weights itself


@metric("vbench_style/imaging_quality", better="higher", needs=(_pyiqa,))
def imaging_quality(evidence: Evidence) -> Measurement:
    """MUSIQ trained on SPAQ, over 100, mean over frames."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    if problem := _pyiqa():
        raise MetricSkipped(problem)
    import pyiqa

    try:
        musiq = pyiqa.create_metric("musiq-spaq", device=evidence.device)
    except OSError as error:  # it fetches its own weights
        help_text = "run it once where there is a network"
        raise MetricSkipped(f"pyiqa could not get MUSIQ's weights ({error}); {help_text}") from error
    with torch.no_grad(), full_precision():
        scores = [musiq(musiq_frames(batch.to(evidence.device))) for batch in channels_first(videos_NFHWC, BATCH)]
    values_N = torch.cat(scores).flatten().float().cpu().unflatten(0, videos_NFHWC.shape[:2]).mean(dim=1) / 100.0
    resize = f"bilinear, longer side to at most {MUSIQ_SIDE}"
    origin = {"features": "pyiqa musiq-spaq", "dtype": "float32", "resize": resize, "antialias": False}
    return of_dimension("imaging_quality", evidence, values_N, "pyiqa", origin)


def flickering(video_FHWC: Tensor) -> Tensor:
    steps = [
        (after.float() - before.float()).abs().flatten(1).mean(dim=1)
        for before, after in neighbours(video_FHWC, FLICKER_HELD)
    ]
    return (255.0 - torch.cat(steps).mean()) / 255.0


def consistency(features_FW: Tensor) -> Tensor:
    """Mean over t ≥ 1 of (max(0, cos(f_t, f_0)) + max(0, cos(f_t, f_t−1))) / 2; features of unit length."""
    to_first_T = (features_FW[1:] @ features_FW[0]).clamp(min=0)
    to_previous_T = (features_FW[1:] * features_FW[:-1]).sum(dim=-1).clamp(min=0)
    return (to_first_T + to_previous_T).mean() / 2


def musiq_frames(frames_B3HW: Tensor) -> Tensor:
    """uint8 → [0, 1]; made smaller where the longer side is above MUSIQ_SIDE."""
    height, width = frames_B3HW.shape[-2:]
    shrink = min(1.0, MUSIQ_SIDE / max(height, width))
    size = [int(height * shrink), int(width * shrink)]
    return interpolate(frames_B3HW.float(), size=size, mode="bilinear", align_corners=False) / 255.0


def of_dimension(
    dimension: str, evidence: Evidence, values_N: Tensor, package: str, origin: dict[str, Any]
) -> Measurement:
    """Over the videos whose prompt VBench made for this dimension; over all, where prompts do not say."""
    dimensions = [prompt.about.get("dimension", ()) for prompt in evidence.generated.prompts]
    if not any(dimensions):
        return mean_or_share(evidence, values_N, f"ditbench {dimension}", package, **origin | {"prompts": "all"})
    rows = [row for row, of_prompt in enumerate(dimensions) if dimension in of_prompt]
    if not rows:
        raise MetricSkipped(f"no prompt is of VBench's dimension {dimension}; generate those that list it")
    origin = origin | {"prompts": f"those of VBench's dimension {dimension}"}
    return mean_or_share(evidence, values_N[rows], f"ditbench {dimension}", package, rows=rows, **origin)


def _consistency_metric(dimension: str, evidence: Evidence, judge_name: str) -> Measurement:
    videos_NFHWC = evidence.generated.videos_NFHWC
    judge, origin = load_judge(judge_name, evidence.device)
    features_NFW = frame_features(videos_NFHWC, judge, antialias=False)
    values_N = torch.stack([consistency(features_FW) for features_FW in features_NFW])
    return of_dimension(dimension, evidence, values_N, "transformers", origin | {"antialias": False})
