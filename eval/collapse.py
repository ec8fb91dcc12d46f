"""Alarms for samples that are broken rather than a little worse.

Averages hide them: a blank video has perfect flickering and consistency, and one of noise the highest dynamic degree.
Each alarm measures one number per sample and compares it with a threshold. Where the float model's samples are given,
an alarm counts only if the float model's own sample, from the same noise, is clear of the threshold by `CLEAR`: a
night sky that the float model draws too is no collapse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from eval.base import Evidence, Measurement, Samples, metric
from eval.passport import FLOAT_MODEL, need_samples, passport
from eval.statistics import PERCENTILE_BOOTSTRAP, mean_with_ci

BLANK_STD = 2.0  # grey levels; rounding a flat field gives at most 0.5, the faintest scene of use more than 5
SATURATED_SHARE = 0.5  # of one channel's values; clipped highlights and black borders of a good picture stay below
FROZEN_CHANGE = 0.1  # grey levels between frames; one pixel in ten changing by one level, less than any movement does
NOISE_RATIO = 0.75  # white noise has 1; photographs have 0.01 to 0.3 at every scale, since their power falls as 1/f²
NON_FINITE_SHARE = 0.0  # a single one is too many
CLEAR = 2.0  # how far off the threshold the float model must be; else scenes at its edge alarm by chance
ALARM_SHARE = 0.1  # of the samples; below, single bad draws are a matter for the metrics

NOISE_SCALES = (1, 2, 4, 8)  # latent noise is white only once the VAE's 8× upsampling is averaged away
NOISE_SIDE = 16  # pixels left a side; with fewer, the ratio of a good thumbnail comes near that of noise


def alarms(samples: Samples, float_model: Samples | None = None) -> dict[str, dict[str, Any]]:
    """{alarm: {share of samples, n, threshold, what}}; alarms that do not apply (latents not kept, images) are absent."""
    return {
        name: {"share": float(hit_N.double().mean()), "n": len(samples)}
        | {"threshold": ALARMS[name].threshold, "what": ALARMS[name].what}
        for name, hit_N in raised(samples, float_model).items()
    }


def alarmed(found: dict[str, dict[str, Any]]) -> list[str]:
    """The alarms raised by more than ALARM_SHARE of the samples."""
    return [name for name, alarm in found.items() if alarm["share"] > ALARM_SHARE]


@metric("collapse", better="lower")
def collapse(evidence: Evidence) -> Measurement:
    """Share of samples that are blank, saturated, frozen, noise or not finite while the float model's are not."""
    need_samples(evidence, 1)
    samples, float_model = evidence.generated, evidence.float_model
    any_N = torch.stack(list(raised(samples, float_model).values())).any(dim=0)
    value, ci95 = mean_with_ci(any_N.numpy(), evidence.seed, evidence.resamples)
    found = alarms(samples, float_model)
    settings = passport(
        "ditbench collapse",
        "ditbench",
        reference=FLOAT_MODEL if float_model else None,
        dtype="float32",
        alarms=found,
        alarmed=alarmed(found),
        alarm_share=ALARM_SHARE,
        float_model_clear_by=CLEAR,
        ci_method=PERCENTILE_BOOTSTRAP,
        resamples=evidence.resamples,
    )
    return Measurement(value, ci95, len(samples), settings)


def raised(samples: Samples, float_model: Samples | None = None) -> dict[str, Tensor]:
    """{alarm: bool (N,)}"""
    if float_model is not None and samples.pixels.shape != float_model.pixels.shape:
        raise ValueError(
            f"collapse: generated {tuple(samples.pixels.shape)} and float model {tuple(float_model.pixels.shape)} must "
            "pair row by row; generate both with the same seeds"
        )
    hits = {}
    for name, alarm in ALARMS.items():
        if alarm.applies(samples):
            hit_N = alarm.shown(samples, 1.0)
            if float_model is not None and alarm.applies(float_model):
                hit_N &= ~alarm.shown(float_model, CLEAR)
            hits[name] = hit_N
    return hits


@dataclass(frozen=True)
class Alarm:
    """measure: Samples → one number per sample. Raised below the threshold (`low`) or above it."""

    what: str
    measure: Callable[[Samples], Tensor]
    threshold: float
    low: bool
    applies: Callable[[Samples], bool] = lambda samples: True

    def shown(self, samples: Samples, slack: float) -> Tensor:
        """bool (N,); slack > 1 counts samples near the threshold too."""
        value_N = self.measure(samples)
        return value_N < self.threshold * slack if self.low else value_N > self.threshold / slack


def spread(samples: Samples) -> Tensor:
    """Standard deviation over a frame's pixels of its liveliest channel, grey levels; the median over frames."""
    return _over_frames(samples, _channel_std).median(dim=1).values


def saturation(samples: Samples) -> Tensor:
    """Share of values at 0 or 255 in the channel that has most of them, over all frames."""

    def share(frames_FHWC: Tensor) -> Tensor:
        return ((frames_FHWC == 0) | (frames_FHWC == 255)).float().mean(dim=(1, 2))

    return _over_frames(samples, share).mean(dim=1).amax(dim=-1)


def change(samples: Samples) -> Tensor:
    """Mean absolute difference of neighbouring frames, grey levels."""
    return torch.stack([video.float().diff(dim=0).abs().mean() for video in samples.videos_NFHWC])


def noisiness(samples: Samples) -> Tensor:
    """Energy of the differences of neighbouring pixels over twice the variance, which is 1 for white noise.

    Of the frame averaged over 1, 2, 4 or 8 pixels a side, whichever looks most like noise; the median over frames.
    """

    def ratio(frames_FHWC: Tensor) -> Tensor:
        frames_F3HW = frames_FHWC.permute(0, 3, 1, 2).float()
        side = min(frames_F3HW.shape[-2:])
        scales = [scale for scale in NOISE_SCALES if scale == 1 or side // scale >= NOISE_SIDE]
        ratio_F = torch.stack([_neighbour_ratio(avg_pool2d(frames_F3HW, scale)) for scale in scales]).amax(dim=0)
        return ratio_F * (_channel_std(frames_FHWC) >= BLANK_STD)  # what rounding leaves of a blank frame is noise too

    return _over_frames(samples, ratio).median(dim=1).values


def non_finite(samples: Samples) -> Tensor:
    """Share of a sample's latent values that are infinite or no number."""
    assert samples.latents is not None
    return (~samples.latents.isfinite()).flatten(1).float().mean(dim=1)


def _over_frames(samples: Samples, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """measure (F, H, W, 3) → (F, …) of every sample, (N, F, …); an image is one frame."""
    return torch.stack([measure(sample if samples.is_video else sample[None]) for sample in samples.pixels])


def _channel_std(frames_FHWC: Tensor) -> Tensor:
    return frames_FHWC.float().flatten(1, 2).std(dim=1, correction=0).amax(dim=-1)


def _neighbour_ratio(frames_F3HW: Tensor) -> Tensor:
    energy_F = sum(frames_F3HW.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (2, 3)) / 2
    variance_F = frames_F3HW.var(dim=(2, 3), correction=0).mean(dim=1)
    return energy_F / (2 * variance_F).clamp(min=1e-6)


ALARMS = {
    "blank": Alarm("median over frames of the pixels' standard deviation, levels", spread, BLANK_STD, low=True),
    "saturated": Alarm("share of a channel's values at 0 or 255", saturation, SATURATED_SHARE, low=False),
    "frozen": Alarm(
        "mean absolute difference of neighbouring frames, levels",
        change,
        FROZEN_CHANGE,
        low=True,
        applies=lambda samples: samples.is_video and samples.pixels.shape[1] > 1,
    ),
    "noise": Alarm("energy of neighbouring differences over 2 variances", noisiness, NOISE_RATIO, low=False),
    "non-finite latents": Alarm(
        "share of latent values that are not finite",
        non_finite,
        NON_FINITE_SHARE,
        low=False,
        applies=lambda samples: samples.latents is not None,
    ),
}
