"""Videos and their prompts, frame by frame in CLIP's embeddings, and CLIP's view of how steady a video is.

clipsim     mean over frames of cos(frame, prompt)               EvalCrafter (arXiv:2310.11440), ViDiT-Q
clip_temp   100 · mean over neighbouring frames of their cosine  EvalCrafter
vbench_style/overall_consistency, vbench_style/scene_consistency
            cos(frame, prompt) over the 8 frames VBench looks at. VBench itself asks ViCLIP (overall consistency)
            and Tag2Text (whether the scene is named in a caption); neither is in a maintained library.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.prompt_lengths import cut_off
from ditbench.eval.vbench_style import of_dimension
from ditbench.eval.video_judges import CLIP, frame_features, judge_here, load_judge

VBENCH_FRAMES = 8


@metric("clipsim", better="higher", asks=("prompts",), needs=(judge_here(CLIP),))
def clipsim(evidence: Evidence) -> Measurement:
    """Mean cosine of a video's frames and its prompt in CLIP's embeddings."""
    similarity_NF, origin = _frame_text_similarity(evidence, antialias=True)
    return mean_or_share(evidence, similarity_NF.mean(dim=1), "ditbench clipsim", "transformers", **origin)


@metric("clip_temp", better="higher", needs=(judge_here(CLIP),))
def clip_temp(evidence: Evidence) -> Measurement:
    """100 × mean cosine of neighbouring frames in CLIP's embeddings."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    judge, origin = load_judge(CLIP, evidence.device)
    values_N = 100.0 * neighbour_cosine(frame_features(videos_NFHWC, judge, antialias=True))
    origin |= {"antialias": True, "scale": 100}
    return mean_or_share(evidence, values_N, "ditbench clip_temp", "transformers", **origin)


@metric("vbench_style/overall_consistency", better="higher", asks=("prompts",), needs=(judge_here(CLIP),))
def overall_consistency(evidence: Evidence) -> Measurement:
    """Mean cosine of a video's frames and its prompt in CLIP's embeddings (VBench: ViCLIP)."""
    return _text_dimension("overall_consistency", evidence, "CLIP frame by frame; VBench: ViCLIP, one clip")


@metric("vbench_style/scene_consistency", better="higher", asks=("prompts",), needs=(judge_here(CLIP),))
def scene_consistency(evidence: Evidence) -> Measurement:
    """As overall_consistency, over VBench's prompts of scenes (VBench: share of captions that name the scene)."""
    return _text_dimension("scene", evidence, "CLIP cosine to the prompt; VBench: share of Tag2Text captions naming it")


def neighbour_cosine(features_NFW: Tensor) -> Tensor:
    """Features of unit length → (N,)."""
    return (features_NFW[:, 1:] * features_NFW[:, :-1]).sum(dim=-1).mean(dim=1)


def middle_frames(frames: int, count: int) -> list[int]:
    """The middles of `count` equal parts of a video: VBench's load_video(num_frames=count)."""
    edges = np.linspace(0, frames, min(count, frames) + 1).astype(int)
    return [int(start + end - 1) // 2 for start, end in zip(edges[:-1], edges[1:], strict=True)]


def _text_dimension(dimension: str, evidence: Evidence, judge_note: str) -> Measurement:
    similarity_NF, origin = _frame_text_similarity(evidence, antialias=False)
    chosen = middle_frames(similarity_NF.shape[1], VBENCH_FRAMES)
    origin |= {"judge_is": judge_note, "frames": chosen}
    return of_dimension(dimension, evidence, similarity_NF[:, chosen].mean(dim=1), "transformers", origin)


def _frame_text_similarity(evidence: Evidence, antialias: bool) -> tuple[Tensor, dict]:
    """Cosines (N, F) of every frame and the prompt of its video."""
    videos_NFHWC = evidence.generated.videos_NFHWC
    if not evidence.generated.prompts:
        raise MetricSkipped("needs the prompts; these videos were made without")
    judge, origin = load_judge(CLIP, evidence.device)
    texts = [prompt.text for prompt in evidence.generated.prompts]
    texts_NW = judge.texts(texts)
    features_NFW = frame_features(videos_NFHWC, judge, antialias)
    origin |= {"antialias": antialias} | cut_off(judge.tokenizer, judge.max_tokens, texts)
    return (features_NFW * texts_NW[:, None]).sum(dim=-1), origin
