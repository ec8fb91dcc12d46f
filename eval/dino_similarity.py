"""How alike DINO finds a sample and the float model's of the same noise: the cosine of their class tokens, of a video the mean of its frames.

    dinov2_similarity   DINOv2 ViT-B/14 (Oquab et al. 2023, arXiv:2304.07193), prepared as its processor does: bicubic with
                        PIL's antialiasing, short side to 256, the middle 224 × 224
    dino_similarity     DINO ViT-B/16 (Caron et al. 2021, arXiv:2104.14294), prepared as VBench's subject consistency does: bilinear
                        without antialiasing, short side to 224, nothing cropped

Two names, so that a number never depends on which of the two networks is on the machine. DINO sees what is shown and how it is laid out, and
hardly a pixel's noise: read it beside PSNR and LPIPS. Both are transformers' classes with the authors' weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import remembered
from ditbench.eval.clip import center_square
from ditbench.eval.features import channels_first, device_of, full_precision
from ditbench.eval.fidelity import paired_measurement, pixel_pairs
from ditbench.eval.video_judges import DINO, IMAGENET, judge_here, load_judge, standardised
from ditbench.eval.video_judges import judge_folder as folder_of
from ditbench.eval.weights import stored_sha256
from ditbench.harness.common.files import NOT_WHOLE
from ditbench.harness.samples.samples import Rows

DINOV2 = "facebook/dinov2-base"
SHORT_SIDE, SIDE = 256, 224  # pixels, of its preprocessor_config.json
BATCH = 32
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@metric("dinov2_similarity", better="higher", paired=True, needs=(judge_here(DINOV2),))
def dinov2_similarity(evidence: Evidence) -> Measurement:
    """Cosine to the float model's sample in DINOv2's class token, mean of the per-sample values (of a video: of its frames)."""
    both = pixel_pairs(evidence)
    network, origin = load_dinov2(folder_of(DINOV2), evidence.device)
    device = device_of(network)
    values_N = similarity(both, network, lambda batch: network(prepare(batch, device)).last_hidden_state[:, 0])
    return paired_measurement(evidence, "ditbench dinov2_similarity", "transformers", values_N, origin)


@metric("dino_similarity", better="higher", paired=True, needs=(judge_here(DINO),))
def dino_similarity(evidence: Evidence) -> Measurement:
    """Cosine to the float model's sample in DINO's class token, as VBench looks at subjects, mean of the per-sample values."""
    both = pixel_pairs(evidence)
    judge, origin = load_judge(DINO, evidence.device)
    device = device_of(judge)
    values_N = similarity(both, judge, lambda batch: judge(batch.to(device), antialias=False))
    return paired_measurement(
        evidence, "ditbench dino_similarity", "transformers", values_N, origin | {"antialias": False}
    )


def similarity(both_N: tuple[Rows, Rows], network: nn.Module, look: Callable[[Tensor], Tensor]) -> Tensor:
    """Cosine (N,) of row and row, in float64. look: uint8 (B, 3, H, W) on the CPU → features (B, width)."""
    ours, theirs = (tokens(pixels_N, network, look) for pixels_N in both_N)
    return cosine_similarity(ours.double(), theirs.double(), dim=-1).reshape(len(both_N[0]), -1).mean(dim=1)


def tokens(pixels_N: Rows, network: nn.Module, look: Callable[[Tensor], Tensor]) -> Tensor:
    """Features of all images, or of all frames of all videos in order: (N · F, width), float32 on the CPU."""

    def of_all() -> Tensor:
        with full_precision():
            return torch.cat([look(batch).float().cpu() for batch in channels_first(pixels_N, BATCH)])

    return remembered(pixels_N, network, "class tokens", of_all)


def prepare(images_B3HW: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) on the CPU → what DINOv2 takes, float32 (B, 3, 224, 224), on the device."""
    height, width = images_B3HW.shape[-2:]
    size = [SHORT_SIDE * edge // min(height, width) for edge in (height, width)]
    # In uint8, on the CPU, torch rounds after each of the two passes, as PIL does.
    images = interpolate(images_B3HW, size, mode="bicubic", antialias=True, align_corners=False)
    return standardised(center_square(images, SIDE).to(device).float(), IMAGENET)


@cache
def load_dinov2(folder: Path, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """transformers' `Dinov2Model` in float32, and its passport; MetricSkipped where the folder does not hold one."""
    from transformers import Dinov2Model

    try:
        network = Dinov2Model.from_pretrained(folder, local_files_only=True).float().eval().requires_grad_(False)
        weights = next(folder / file for file in WEIGHT_FILES if (folder / file).is_file())
    except (*NOT_WHOLE, StopIteration) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricSkipped(
            f"{folder}: not a whole {DINOV2} ({reason}); fetch it with: hf download {DINOV2}"
        ) from error
    return network.to(device), {
        "features": DINOV2,
        "weights_sha256": stored_sha256(weights),
        "resize": f"bicubic, short side to {SHORT_SIDE}, centre crop to {SIDE}",
        "antialias": True,
        "dtype": "float32",
    }
