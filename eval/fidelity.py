"""How far a quantized model's samples are from the float model's, one by one: same noise, same label or prompt.

With few images these tell methods apart where FID cannot: both sides share their noise, so it cancels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import BATCH, frames, together
from ditbench.eval.features import need_float_model
from ditbench.eval.passport import FLOAT_MODEL, need_samples
from ditbench.eval.per_sample import mean_or_share
from ditbench.harness.common.devices import float64_device
from ditbench.harness.samples.samples import Rows

CAP_DB = 100.0  # what identical samples count as; their true value is infinite
SSIM_SIGMA, SSIM_KERNEL = 1.5, 11
PSNR_HELD, SSIM_HELD, SQNR_HELD = (
    26,
    240,
    32,
)  # bytes per value of a sample while it is compared, measured (of SSIM in float32, twice)


@metric("psnr", better="higher", paired=True, unit="dB")
def psnr(evidence: Evidence) -> Measurement:
    """Peak signal-to-noise ratio to the float model's image or video, mean of the per-sample values."""
    pixels_N, float_N = pixel_pairs(evidence)
    device, values = float64_device(evidence.device), pixels_N.shape[1:].numel()
    squares = [
        (ours.double() - theirs.double()).square().flatten(1).sum(dim=1).cpu()
        for ours, theirs in frame_pairs(device, pixels_N, float_N, held=PSNR_HELD)
    ]
    # Sums of whole numbers, exact in float64: a video's is that of its frames whatever is added to what.
    error_N = _of_samples(squares, len(pixels_N)).sum(dim=1) / values / 255.0**2
    settings = {"averaged": "per sample (not over the set's MSE)", "peak": 255, "cap_db": CAP_DB, "dtype": "float64"}
    return paired_measurement(evidence, "ditbench psnr", "ditbench", _decibel(1.0 / error_N), settings)


@metric("ssim", better="higher", paired=True)
def ssim(evidence: Evidence) -> Measurement:
    """Structural similarity to the float model's image, mean of the per-sample values (of a video: of its frames).

    As Wang et al. 2004 and scikit-image (gaussian_weights=True, use_sample_covariance=False) have it: a Gaussian window, at those places
    only where it lies inside the image. torchmetrics reflects the image at its borders and averages what it finds there as well. Per colour
    channel, then their mean (Wang et al.: grey images); the image is not made smaller beforehand (their later code does so from 384 pixels a side on).
    """
    pixels_N, float_N = pixel_pairs(evidence)
    sigma, kernel = _ssim_window(min(pixels_N.shape[-3:-1]))
    device = float64_device(evidence.device)  # E[x²] − E[x]² of bright, flat places loses the fourth decimal in float32
    values = [
        ssim_inside(unit_range(batch).double(), unit_range(float_batch).double(), sigma, kernel).cpu()
        for batch, float_batch in frame_pairs(device, pixels_N, float_N, held=SSIM_HELD)
    ]
    settings = {"data_range": 1.0, "k1": 0.01, "k2": 0.03, "gaussian_sigma": sigma, "kernel_size": kernel}
    settings |= {"borders": "windows inside the image only", "channels": "mean of R, G, B", "downsampling": "none"}
    values_N = _of_samples(values, len(pixels_N)).mean(dim=1)
    return paired_measurement(
        evidence, "torchmetrics ssim, inside", "torchmetrics", values_N, settings | {"dtype": "float64"}
    )


@metric("sqnr", better="higher", paired=True, unit="dB", asks=("latents",))
def sqnr(evidence: Evidence) -> Measurement:
    """Signal-to-quantization-noise ratio of the latents: signal is the float model's, noise the difference to it."""
    need_samples(evidence, 1)
    latents_N, float_NChw = evidence.generated.latents, need_float_model(evidence).latents
    if latents_N is None or float_NChw is None:
        raise MetricSkipped("no latents were kept with the samples")
    _same_shape(latents_N, float_NChw)
    device, signals, noises = float64_device(evidence.device), [], []
    at_once = together(latents_N, held=SQNR_HELD)
    for ours, theirs in zip(latents_N.split(at_once), float_NChw.split(at_once), strict=True):
        ours, theirs = ours.to(device), theirs.to(device)
        signals.append(theirs.double().square().flatten(1).sum(dim=1).cpu())
        noises.append((ours.double() - theirs.double()).square().flatten(1).sum(dim=1).cpu())
    signal_N, noise_N = torch.cat(signals), torch.cat(noises)
    if (signal_N == 0).any():
        raise MetricSkipped("a latent of the float model is all zeros; a ratio to it has no meaning")
    settings = {"averaged": "per sample", "cap_db": CAP_DB, "dtype": "float64"}
    return paired_measurement(evidence, "ditbench sqnr", "ditbench", _decibel(signal_N / noise_N), settings)


def paired_measurement(
    evidence: Evidence, implementation: str, package: str, values_N: Tensor, settings: dict
) -> Measurement:
    """The mean of one value per sample, against the float model."""
    return mean_or_share(evidence, values_N.cpu(), implementation, package, reference=FLOAT_MODEL, **settings)


def _decibel(ratio_N: Tensor) -> Tensor:
    return (10.0 * torch.log10(ratio_N)).clamp(max=CAP_DB)


def unit_range(images_NHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → float32 in [0, 1], (B, 3, H, W)."""
    return images_NHWC.permute(0, 3, 1, 2).float() / 255.0


def ssim_inside(ours_B3HW: Tensor, theirs_B3HW: Tensor, sigma: float, kernel: int) -> Tensor:
    """Mean SSIM (B,) over the places whose window lies inside the image; values in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, places_B3HW = structural_similarity_index_measure(
        ours_B3HW, theirs_B3HW, sigma=sigma, data_range=1.0, k1=0.01, k2=0.03, reduction="none", return_full_image=True
    )
    edge = kernel // 2
    return places_B3HW[..., edge:-edge, edge:-edge].flatten(1).mean(dim=1)


def _ssim_window(side: int) -> tuple[float, int]:
    """(sigma, kernel size): 1.5 and 11, or the largest odd window that fits a smaller image.

    torchmetrics derives the kernel from sigma: 2 · int(3.5 sigma + 0.5) + 1.
    """
    if side >= SSIM_KERNEL:
        return SSIM_SIGMA, SSIM_KERNEL
    if side < 3:
        raise MetricSkipped(f"ssim needs images of 3 pixels or more a side, got {side}")
    half = (side - 1) // 2
    return half / 3.5, 2 * half + 1


def pixel_pairs(evidence: Evidence) -> tuple[Rows, Rows]:
    """Generated and float pixels, row by row: images (N, H, W, 3) or videos (N, F, H, W, 3)."""
    need_samples(evidence, 1)
    pixels_N, float_N = evidence.generated.pixels, need_float_model(evidence).pixels
    _same_shape(pixels_N, float_N)
    return pixels_N, float_N


def frame_pairs(
    device: torch.device, ours_N: Rows, theirs_N: Rows, held: int, most: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some images, or frames of videos, of both at a time, (B, H, W, 3) on the device."""
    for ours, theirs in zip(frames(ours_N, held, most), frames(theirs_N, held, most), strict=True):
        yield ours.to(device), theirs.to(device)


def _of_samples(of_frames: list[Tensor], n: int) -> Tensor:
    """One value per image or frame → (N, F), F = 1 for images."""
    return torch.cat(of_frames).reshape(n, -1)


def _same_shape(samples: Rows, float_samples: Rows) -> None:
    if samples.shape != float_samples.shape:
        raise ValueError(
            f"fidelity: generated {tuple(samples.shape)} and float model {tuple(float_samples.shape)} must pair row by "
            "row; generate both with the same seeds"
        )
