"""What CLIP says of images: do they show their prompt, do they look good, are they distributed like others?

    CLIPScore   max(100 cos(image, prompt), 0)             Hessel et al. 2021, arXiv:2104.08718
    CLIP-IQA    softmax over 100 cos(image, antonyms)      Wang et al. 2023, arXiv:2207.12396, eq. 3
    CMMD        1000 MMD²(generated, reference), k(x, y) = exp(−‖x − y‖² / (2 · 10²))   Jayasumana et al. 2024,
                                                                                 arXiv:2401.09603

CMMD as its authors compute it counts each image as its own neighbour, which adds about 1000 · (1 − k̄) · (1 / n + 1 / m). `cmmd_unbiased` leaves
that out (eval/kernel_distance.py), so that it does not depend on n; it can come out below 0.

Depart from the papers: CLIPScore is scaled by 100 (torchmetrics, SVDQuant) instead of 2.5, and nothing is put before
the prompt (there: "A photo depicts"). CLIP-IQA looks through ViT-L/14 (there: a ResNet-50 without positional embedding).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ditbench.eval import kernel_distance
from ditbench.eval.base import Evidence, Measurement, metric
from ditbench.eval.clip import HUB, clip_here, embed_images, embed_texts, load_clip, need_prompts
from ditbench.eval.features import against_float, need_reference
from ditbench.eval.influence import counted_once, spread
from ditbench.eval.passport import need_samples, passport
from ditbench.eval.per_sample import mean_or_share, pseudo_values
from ditbench.eval.prompt_lengths import cut_off
from ditbench.eval.statistics import INFLUENCE, INFLUENCE_OF_PAIRS, student

GOOD, BAD = "Good photo.", "Bad photo."
SCALE = 100.0  # of cosines: CLIP's trained temperature
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

_CROPPED = {"resize": "bicubic, short side, centre crop", "antialias": True}
_CROPPED_FIRST = {"resize": "centre square, then bicubic", "antialias": True}


@metric("clipscore_b32", better="higher", asks=("prompts",), needs=(clip_here("b32"),))
def clipscore_b32(evidence: Evidence) -> Measurement:
    """CLIPScore, ViT-B/32: 100 · cosine of image and prompt, not below 0, mean over the samples."""
    return clipscore(evidence, HUB["b32"])


@metric("clipscore_l14", better="higher", asks=("prompts",), needs=(clip_here("l14"),))
def clipscore_l14(evidence: Evidence) -> Measurement:
    """CLIPScore, ViT-L/14: 100 · cosine of image and prompt, not below 0, mean over the samples."""
    return clipscore(evidence, HUB["l14"])


@metric("clip_iqa", better="higher", needs=(clip_here("l14"),))
def clip_iqa(evidence: Evidence) -> Measurement:
    """CLIP-IQA, ViT-L/14: how sure CLIP is of "Good photo." against "Bad photo.", mean over the images."""
    need_samples(evidence, 1)
    images_NHWC = evidence.generated.images_NHWC
    clip = load_clip(HUB["l14"], evidence.device)
    anchors_2F = embed_texts(clip, (GOOD, BAD))
    good_N = (SCALE * embed_images(clip, images_NHWC) @ anchors_2F.T).softmax(dim=1)[:, 0]
    return _mean(evidence, "clip_iqa", good_N, clip.passport | _CROPPED | {"prompts": [GOOD, BAD]})


@metric("cmmd", better="lower", asks=("reference",), needs=(clip_here("l14_336"),))
def cmmd(evidence: Evidence) -> Measurement:
    """CMMD to the reference: distance between the two sets' CLIP ViT-L/14-336 embeddings."""
    return clip_mmd(evidence)


@metric("cmmd_unbiased", better="lower", asks=("reference",), needs=(clip_here("l14_336"),))
def cmmd_unbiased(evidence: Evidence) -> Measurement:
    """CMMD to the reference without the bias of small sets: pairs of different images only, by the design of the labels."""
    return clip_mmd(evidence, unbiased=True)


@metric("cmmd_float", better="lower", paired=True, needs=(clip_here("l14_336"),))
def cmmd_float(evidence: Evidence) -> Measurement:
    """CMMD to the float model's images: distance between the two sets' CLIP ViT-L/14-336 embeddings."""
    return clip_mmd(against_float(evidence), pairs=True)


def clipscore(evidence: Evidence, name: str) -> Measurement:
    need_samples(evidence, 1)
    images_NHWC, texts = evidence.generated.images_NHWC, need_prompts(evidence.generated)
    clip = load_clip(name, evidence.device)
    cosine_N = (embed_images(clip, images_NHWC) * embed_texts(clip, texts)).sum(dim=1)
    settings = {"scale": SCALE, "template": "{prompt}"} | cut_off(clip.tokenizer, clip.max_tokens, texts)
    return _mean(evidence, "clipscore", (SCALE * cosine_N).clamp(min=0), clip.passport | _CROPPED | settings)


def clip_mmd(evidence: Evidence, pairs: bool = False, unbiased: bool = False) -> Measurement:
    """pairs: row i of the reference has the noise of generated row i, so both come and go together.

    Of pairs there is only the biased form: an image and its counterpart are no independent samples.
    """
    n, design = need_samples(evidence, 2), evidence.design
    reference = need_reference(evidence)
    images_NHWC = evidence.generated.images_NHWC
    clip = load_clip(HUB["l14_336"], evidence.device)
    generated_NF, reference_MF = (
        embed_images(clip, images, crop_first=True).double().numpy() for images in (images_NHWC, reference.images_NHWC)
    )
    if pairs:
        influence = kernel_distance.influence_of_pairs(generated_NF, reference_MF, gaussian_kernel)
    else:
        within = kernel_distance.within(generated_NF, design.strata_N, gaussian_kernel)
        influence = kernel_distance.influence(generated_NF, reference_MF, within, gaussian_kernel)
    influence = influence.times(CMMD_SCALE)
    if unbiased:
        value = CMMD_SCALE * kernel_distance.unbiased(within, generated_NF, reference_MF, gaussian_kernel)
        estimator, n_dependence = "unbiased by design (U-statistic), unit vectors", "none in expectation"
    else:
        value = CMMD_SCALE * mmd2(generated_NF, reference_MF)
        estimator = "biased (V-statistic), unit vectors"
        n_dependence = "biased upwards by about b / n: compare at equal n, or read cmmd_unbiased"
    low, high = student(value, spread(influence, design.strata_N))
    settings = clip.passport | _CROPPED_FIRST | {"dtype": "float32, kernel float64"}
    settings |= {"sigma": CMMD_SIGMA, "scale": CMMD_SCALE, "estimator": estimator, "n_dependence": n_dependence}
    settings |= {"design": design.name, "ci_method": INFLUENCE_OF_PAIRS if pairs else INFLUENCE}
    kept = pseudo_values(evidence, value, counted_once(influence, design.strata_N))
    card = passport("ditbench cmmd", "ditbench", reference=reference, **settings)
    return Measurement(value, (low if unbiased else max(low, 0.0), high), n, card, kept)


def mmd2(x_NF: np.ndarray, y_MF: np.ndarray) -> float:
    """Squared MMD, the biased estimate: Gretton et al. 2012, eq. 5. Kernel matrices are held a block of rows at a time."""
    return _mean_kernel(x_NF, x_NF) + _mean_kernel(y_MF, y_MF) - 2 * _mean_kernel(x_NF, y_MF)


def gaussian_kernel(x_NF: np.ndarray, y_MF: np.ndarray) -> np.ndarray:
    square_NM = (x_NF**2).sum(axis=1)[:, None] + (y_MF**2).sum(axis=1) - 2 * x_NF @ y_MF.T
    return np.exp(-square_NM / (2 * CMMD_SIGMA**2))


def _mean_kernel(x_NF: np.ndarray, y_MF: np.ndarray) -> float:
    blocks = range(0, len(x_NF), kernel_distance.KERNEL_ROWS)
    total = sum(gaussian_kernel(x_NF[start : start + kernel_distance.KERNEL_ROWS], y_MF).sum() for start in blocks)
    return float(total / (len(x_NF) * len(y_MF)))


def _mean(evidence: Evidence, kind: str, values_N: Tensor, settings: dict[str, Any]) -> Measurement:
    return mean_or_share(evidence, values_N, f"ditbench {kind}", "ditbench", **settings)
