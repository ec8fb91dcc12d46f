"""HPSv2.1: how much people would like a picture, given the prompt (Wu et al. 2023, arXiv:2306.09341).

    score = 100 · E_img(y) · E_txt(x),   both of unit length, in a CLIP ViT-H/14 trained on HPD v2

The checkpoint is the authors' `HPS_v2.1_compressed.pt`, which is open_clip's; it is read into transformers' `CLIPModel`
(eval/open_clip_weights.py), with LAION's configuration and tokenizer of the same ViT-H/14. The package hpsv2 wants protobuf below 4
and brings an open_clip of its own, so it is not used. The score is that of their `hpsv2.score`, times 100 as their benchmark prints it.

Images as their `create_model_and_transforms` prepares them: to floats in [0, 1] first, then the longer side to 224 by torchvision's bicubic
resize (neither rounded nor clamped), black bars beside the shorter one, CLIP's mean and deviation. Nothing is cropped, other than in
CLIP's own preprocessing. Their resize names no antialiasing, and torchvision's default for tensors changed from without to with in
0.17 (January 2024): here it is with, as their package computes it today. Numbers made with an older torchvision differ.

Departs from theirs: float32 (there: half precision by autocast on a GPU), and a prompt is unescaped from HTML but not mended by
ftfy, which changes nothing in ASCII: `prompts_not_ascii` in the passport counts the others.
"""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ditbench.eval import clip_h14
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import remembered
from ditbench.eval.clip import BATCH, DEVIATION, MEAN, Clip, embed_texts, need_prompts
from ditbench.eval.features import channels_first, device_of, full_precision
from ditbench.eval.open_clip_weights import as_transformers
from ditbench.eval.passport import need_samples
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.prompt_lengths import cut_off
from ditbench.eval.video_judges import judge_folder
from ditbench.eval.weights import stored_sha256
from ditbench.harness.common.files import NOT_WHOLE
from ditbench.harness.samples.samples import Rows

HUB, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
NOT_HERE = "HPSv2.1's weights are not here; `ditbench data fetch hpsv2.1`"
SCALE = 100.0  # of cosines, as in their benchmark's table


def _weights() -> str | None:
    return None if _weight_file() else NOT_HERE


@metric("hpsv2.1", better="higher", asks=("prompts",), needs=(_weights, clip_h14.files_here))
def hpsv2(evidence: Evidence) -> Measurement:
    """HPSv2.1 of image and prompt (100 × cosine), mean over the samples."""
    need_samples(evidence, 1)
    images_NHWC, texts = evidence.generated.images_NHWC, need_prompts(evidence.generated)
    path = _weight_file()
    if path is None:
        raise MetricSkipped(NOT_HERE)
    clip = load(path, clip_h14.folder(), evidence.device)
    cleaned = tuple(clean(text) for text in texts)
    cosine_N = (embed(clip, images_NHWC).double() * embed_texts(clip, cleaned).double()).sum(dim=1)
    return mean_or_share(
        evidence, SCALE * cosine_N, "ditbench hpsv2.1", "transformers", **clip.passport,
        resize="bicubic in floats, long side, black bars", antialias=True, scale=SCALE, tokenizer=clip_h14.NAME,
        text="HTML unescaped; no ftfy", prompts_not_ascii=sum(not text.isascii() for text in texts),
        **cut_off(clip.tokenizer, clip.max_tokens, cleaned),
    )  # fmt: skip


def clean(text: str) -> str:
    """As open_clip's tokenizer begins (its ftfy aside): twice, since prompts from the web are often escaped twice."""
    return html.unescape(html.unescape(text)).strip()


def embed(clip: Clip, images_NHWC: Rows) -> Tensor:
    """Unit vectors (N, width), float32 on the CPU."""

    def of_all() -> Tensor:
        rows, device = [], device_of(clip.module)
        with full_precision():
            for batch in channels_first(images_NHWC, BATCH):
                seen = clip.module.vision_model(pixel_values=prepare(batch.to(device), clip.side)).pooler_output
                rows.append(normalize(clip.module.visual_projection(seen), dim=-1).cpu())
        return torch.cat(rows)

    return remembered(images_NHWC, clip.module, "hpsv2.1", of_all)


def prepare(images_B3HW: Tensor, side: int) -> Tensor:
    """uint8 → what the network takes, float32 (B, 3, side, side)."""
    from torchvision.transforms.functional import InterpolationMode, normalize, pad, resize

    scale = side / max(images_B3HW.shape[-2:])
    size = [round(edge * scale) for edge in images_B3HW.shape[-2:]]
    fitted = resize(images_B3HW.float() / 255.0, size, InterpolationMode.BICUBIC, antialias=True)
    below, right = (side - edge for edge in size)
    square = pad(fitted, [right // 2, below // 2, right - right // 2, below - below // 2])
    return normalize(square, list(MEAN), list(DEVIATION))


@cache
def load(weights: Path, home: Path, device: torch.device) -> Clip:
    """The checkpoint in a `CLIPModel` of home's configuration; MetricSkipped where it is not one, or not whole."""
    from transformers import CLIPConfig, CLIPModel

    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
        config = CLIPConfig.from_pretrained(home, local_files_only=True)
        module = CLIPModel(config).requires_grad_(False)
        module.load_state_dict(as_transformers(state))
    except NOT_WHOLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MetricSkipped(
            f"{weights}: not HPSv2.1's checkpoint ({reason}); fetch it again with `hf download {HUB} {FILE} --force-download`"
        ) from error
    side, max_tokens = config.vision_config.image_size, config.text_config.max_position_embeddings
    tokenizer = clip_h14.load_tokenizer(home)
    module = module.float().eval().to(device)
    return Clip("ViT-H/14, HPSv2.1", module, tokenizer, side, max_tokens, stored_sha256(weights))


def _weight_file() -> Path | None:
    try:
        path = judge_folder(HUB) / FILE
    except MetricSkipped:
        return None
    return path if path.is_file() else None
