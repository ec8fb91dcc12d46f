"""ImageReward: what people would prefer, given the prompt (Xu et al. 2023, arXiv:2304.05977).

The score is the package image-reward's own (ImageReward-v1.0), the mean over the images. The package and its weights
must be here already; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eval.base import Evidence, Measurement, MetricSkipped, metric
from eval.clip import need_prompts
from eval.features import best_device
from eval.passport import need_samples, passport
from eval.statistics import PERCENTILE_BOOTSTRAP, mean_with_ci
from eval.weights import stored_sha256

PACKAGE = "ImageReward"
HUB = "THUDM/ImageReward"
FILES = ("ImageReward.pt", "med_config.json")

Scorer = Callable[[str, Image.Image], float]


@metric("image_reward", better="higher")
def image_reward(evidence: Evidence) -> Measurement:
    """ImageReward-v1.0 of image and prompt, mean over the samples."""
    need_samples(evidence, 1)
    images_NHWC, texts = evidence.generated.images_NHWC, need_prompts(evidence.generated)
    if importlib.util.find_spec(PACKAGE) is None:
        raise MetricSkipped("the package image-reward is missing; install it with `pip install image-reward`")
    weights, config = _local_files()
    values_N = rewards(load_scorer(weights, config), images_NHWC, texts)
    value, ci95 = mean_with_ci(values_N.numpy(), evidence.seed, evidence.resamples)
    settings = passport(
        "image-reward ImageReward-v1.0", "image-reward", reference=None, weights_sha256=stored_sha256(weights),
        dtype="float32", resize="the package's own: bicubic, short side to 224, centre crop", antialias=True,
        ci_method=PERCENTILE_BOOTSTRAP, resamples=evidence.resamples,
    )  # fmt: skip
    return Measurement(value, ci95, len(values_N), settings)


def rewards(scorer: Scorer, images_NHWC: Tensor, texts: tuple[str, ...]) -> Tensor:
    """One score per image and its prompt, float64."""
    images = (Image.fromarray(image.cpu().numpy()) for image in images_NHWC)
    with torch.no_grad():
        scores = [float(scorer(text, image)) for text, image in zip(texts, images, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)


@cache
def load_scorer(weights: Path, config: Path) -> Scorer:
    """The package's model.score."""
    import ImageReward

    try:
        return ImageReward.load(str(weights), device=str(best_device()), med_config=str(config)).score
    except (OSError, RuntimeError, KeyError) as error:  # its tokenizer is BERT's, from the hub
        raise MetricSkipped(
            f"ImageReward could not be loaded ({str(error).splitlines()[0][:200]}); "
            "`hf download google-bert/bert-base-uncased` fetches its tokenizer"
        ) from error


def _local_files() -> tuple[Path, Path]:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(HUB, file) for file in FILES]
    if not all(isinstance(path, str) for path in found):
        raise MetricSkipped(f"ImageReward's weights are not here; `hf download {HUB} {' '.join(FILES)}`")
    weights, config = (Path(str(path)) for path in found)
    return weights, config
