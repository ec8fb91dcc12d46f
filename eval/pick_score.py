"""PickScore: which of two pictures people pick, given the prompt (Kirstain et al. 2023, arXiv:2305.01569, eq. 2).

    s(x, y) = exp(t) · E_txt(x) · E_img(y),   both of unit length, t: the trained temperature

A CLIP ViT-H/14 trained on Pick-a-Pic; weights are the authors' `yuvalkirstain/PickScore_v1`, a `CLIPModel` of transformers. Images and
prompts are prepared as their example does it (github.com/yuvalkirstain/PickScore, README): by the processor of the CLIP it was trained
from, with PIL, prompts cut at 77 tokens. Departs from it: float32 whatever the file has. Papers print the score either so (about 21)
or without exp(t), about a hundredth of it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ditbench.eval import clip_h14
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.clip import WEIGHT_FILES, Clip, embed_images, embed_texts, need_prompts
from ditbench.eval.passport import need_samples
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.prompt_lengths import cut_off
from ditbench.eval.video_judges import judge_folder
from ditbench.eval.weights import stored_sha256
from ditbench.harness.common.files import NOT_WHOLE

HUB = "yuvalkirstain/PickScore_v1"
NOT_HERE = "PickScore's weights are not here; `ditbench data fetch pick-score`"


def _weights() -> str | None:
    return None if _weight_file() else NOT_HERE


@metric("pick_score", better="higher", asks=("prompts",), needs=(_weights, clip_h14.files_here))
def pick_score(evidence: Evidence) -> Measurement:
    """PickScore of image and prompt (its trained temperature × cosine), mean over the samples."""
    need_samples(evidence, 1)
    images_NHWC, texts = evidence.generated.images_NHWC, need_prompts(evidence.generated)
    path = _weight_file()
    if path is None:
        raise MetricSkipped(NOT_HERE)
    clip = load(path, clip_h14.folder(), evidence.device)
    cosine_N = (embed_images(clip, images_NHWC).double() * embed_texts(clip, texts).double()).sum(dim=1)
    scale = float(clip.module.logit_scale.detach().double().exp())
    return mean_or_share(
        evidence, scale * cosine_N, "ditbench pick_score", "transformers", **clip.passport,
        resize="bicubic, short side, centre crop", antialias=True, scale=scale, tokenizer=clip_h14.NAME,
        **cut_off(clip.tokenizer, clip.max_tokens, texts),
    )  # fmt: skip


@cache
def load(weights: Path, tokenizer: Path, device: torch.device) -> Clip:
    """The folder of a `CLIPModel`, with the tokenizer of another one; MetricSkipped where it cannot be read."""
    from transformers import CLIPModel

    try:
        module = CLIPModel.from_pretrained(weights.parent, local_files_only=True).float().eval()
    except NOT_WHOLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricSkipped(
            f"PickScore is here but cannot be read ({reason}); fetch it again with `hf download {HUB} --force-download`"
        ) from error
    config = module.config
    side, max_tokens = config.vision_config.image_size, config.text_config.max_position_embeddings
    words = clip_h14.load_tokenizer(tokenizer)
    return Clip(HUB, module.to(device), words, side, max_tokens, stored_sha256(weights))


def _weight_file() -> Path | None:
    try:
        home = judge_folder(HUB)
    except MetricSkipped:
        return None
    return next((home / file for file in WEIGHT_FILES if (home / file).is_file()), None)
