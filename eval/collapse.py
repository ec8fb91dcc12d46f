"""Alarms for samples that are broken rather than a little worse.

Averages hide them: a blank video has perfect flickering and consistency, and one of noise the highest dynamic degree.
Each alarm measures one number per sample and compares it with a threshold. Where the float model's samples are given,
an alarm counts only if the float model's own sample, from the same noise, is well clear of that threshold: a night sky
that the float model draws too is no collapse, and a scene at the threshold's edge must not alarm by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ditbench.eval.base import Evidence, Measurement, metric
from ditbench.eval.passport import FLOAT_MODEL, need_samples
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.statistics import share_with_ci
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Samples

# Each threshold, and what the float model's own sample has to be clear of.
BLANK_STD, BLANK_STD_FLOAT = 2.0, 4.0  # grey levels; rounding a flat field gives up to 0.5, photographs 90
SATURATED_SHARE, SATURATED_SHARE_FLOAT = 0.5, 0.4  # of one channel's values; a photograph has up to 0.25, digits 0.3
FROZEN_CHANGE, FROZEN_CHANGE_FLOAT = 0.1, 0.2  # grey levels between frames; 0.1 is one pixel in ten off by one level
NOISE_RATIO, NOISE_RATIO_FLOAT = 0.75, 0.5  # white noise has 1, photographs 0.01 to 0.05 at every scale
NON_FINITE_SHARE = 0.0  # a single one is too many
ALARM_SHARE = 0.1  # of the samples; below, single bad draws are a matter for the metrics

NOISE_SCALES = (1, 2, 4, 8)  # latent noise is white only once the VAE's 8× upsampling is averaged away
NOISE_SIDE = 16  # pixels left a side; with fewer, the ratio of a good thumbnail comes near that of noise


def alarms(
    samples: Samples, float_model: Samples | None = None, device: torch.device = CPU
) -> dict[str, dict[str, Any]]:
    """{alarm: {share of samples, Wilson's ci95, n, threshold, what}}; alarms that do not apply (latents not kept, images) are absent."""
    return _described(raised(samples, float_model, device))


def alarmed(found: dict[str, dict[str, Any]]) -> list[str]:
    """The alarms raised by more than ALARM_SHARE of the samples."""
    return [name for name, alarm in found.items() if alarm["share"] > ALARM_SHARE]


@metric("collapse", better="lower")
def collapse(evidence: Evidence) -> Measurement:
    """Share of samples that are blank, saturated, frozen, noise or not finite while the float model's are not."""
    need_samples(evidence, 1)
    samples, float_model = evidence.generated, evidence.float_model
    hits = raised(samples, float_model, evidence.device)
    any_N = torch.stack(list(hits.values())).any(dim=0)
    found = _described(hits)
    return mean_or_share(
        evidence,
        any_N,
        "ditbench collapse",
        "ditbench",
        reference=FLOAT_MODEL if float_model is not None else None,
        dtype="float32",
        alarms=found,
        alarmed=alarmed(found),
        alarm_share=ALARM_SHARE,
    )


def raised(samples: Samples, float_model: Samples | None = None, device: torch.device = CPU) -> dict[str, Tensor]:
    """{alarm: bool (N,)}; samples are looked at on the device, one by one."""
    if float_model is not None and samples.pixels.shape != float_model.pixels.shape:
        raise ValueError(
            f"collapse: generated {tuple(samples.pixels.shape)} and float model {tuple(float_model.pixels.shape)} must "
            "pair row by row; generate both with the same seeds"
        )
    hits = {}
    for name, alarm in ALARMS.items():
        if alarm.applies(samples):
            hit_N = alarm.beyond(alarm.threshold, samples, device)
            if float_model is not None and alarm.applies(float_model):
                hit_N &= ~alarm.beyond(alarm.float_threshold, float_model, device)
            hits[name] = hit_N
    return hits


@dataclass(frozen=True)
class Alarm:
    """measure: Samples, device → one number per sample (on the CPU), bad below the threshold (`low`) or above it."""

    what: str
    measure: Callable[[Samples, torch.device], Tensor]
    threshold: float
    float_threshold: float
    low: bool
    applies: Callable[[Samples], bool] = lambda samples: True

    def beyond(self, threshold: float, samples: Samples, device: torch.device) -> Tensor:
        """bool (N,)"""
        value_N = self.measure(samples, device)
        return value_N < threshold if self.low else value_N > threshold


def spread(samples: Samples, device: torch.device = CPU) -> Tensor:
    """Standard deviation over a frame's pixels of its liveliest channel, grey levels; the median over frames."""
    return _over_frames(samples, _channel_std, device).median(dim=1).values


def saturation(samples: Samples, device: torch.device = CPU) -> Tensor:
    """Share of values at 0 or 255 in the channel that has most of them, over all frames."""

    def share(frames_FHWC: Tensor) -> Tensor:
        return ((frames_FHWC == 0) | (frames_FHWC == 255)).float().mean(dim=(1, 2))

    return _over_frames(samples, share, device).mean(dim=1).amax(dim=-1)


def change(samples: Samples, device: torch.device = CPU) -> Tensor:
    """Mean absolute difference of neighbouring frames, grey levels."""
    return torch.stack([video.to(device).float().diff(dim=0).abs().mean().cpu() for video in samples.videos_NFHWC])


def noisiness(samples: Samples, device: torch.device = CPU) -> Tensor:
    """Energy of the differences of neighbouring pixels over twice the variance, which is 1 for white noise.

    Of the frame averaged over 1, 2, 4 or 8 pixels a side, whichever looks most like noise; the median over frames.
    """

    def ratio(frames_FHWC: Tensor) -> Tensor:
        frames_F3HW = frames_FHWC.permute(0, 3, 1, 2).float()
        side = min(frames_F3HW.shape[-2:])
        scales = [scale for scale in NOISE_SCALES if scale == 1 or side // scale >= NOISE_SIDE]
        ratio_F = torch.stack([_neighbour_ratio(avg_pool2d(frames_F3HW, scale)) for scale in scales]).amax(dim=0)
        return ratio_F * (_channel_std(frames_FHWC) >= BLANK_STD)  # what rounding leaves of a blank frame is noise too

    return _over_frames(samples, ratio, device).median(dim=1).values


def non_finite(samples: Samples, device: torch.device = CPU) -> Tensor:
    """Share of a sample's latent values that are infinite or no number."""
    assert samples.latents is not None
    return (~samples.latents.isfinite()).flatten(1).float().mean(dim=1)


def _described(hits: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "share": float(hit_N.double().mean()),
            "ci95": list(share_with_ci(int(hit_N.sum()), len(hit_N))[1]),
            "n": len(hit_N),
            "threshold": ALARMS[name].threshold,
            "float_threshold": ALARMS[name].float_threshold,
            "what": ALARMS[name].what,
        }
        for name, hit_N in hits.items()
    }


def _over_frames(samples: Samples, measure: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """measure (F, H, W, 3) → (F, …) of every sample, (N, F, …); an image is one frame."""
    return torch.stack(
        [measure((sample if samples.is_video else sample[None]).to(device)).cpu() for sample in samples.pixels]
    )


def _channel_std(frames_FHWC: Tensor) -> Tensor:
    return frames_FHWC.float().flatten(1, 2).std(dim=1, correction=0).amax(dim=-1)


def _neighbour_ratio(frames_F3HW: Tensor) -> Tensor:
    energy_F = sum(frames_F3HW.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (2, 3)) / 2
    variance_F = frames_F3HW.var(dim=(2, 3), correction=0).mean(dim=1)
    return energy_F / (2 * variance_F).clamp(min=1e-6)


ALARMS = {
    "blank": Alarm(
        "below: standard deviation of a frame's pixels, levels", spread, BLANK_STD, BLANK_STD_FLOAT, low=True
    ),
    "saturated": Alarm(
        "above: share of a channel's values at 0 or 255", saturation, SATURATED_SHARE, SATURATED_SHARE_FLOAT, low=False
    ),
    "frozen": Alarm(
        "below: mean absolute difference of neighbouring frames, levels",
        change,
        FROZEN_CHANGE,
        FROZEN_CHANGE_FLOAT,
        low=True,
        applies=lambda samples: samples.is_video and samples.pixels.shape[1] > 1,
    ),
    "noise": Alarm(
        "above: energy of neighbouring pixels' differences over twice the variance",
        noisiness,
        NOISE_RATIO,
        NOISE_RATIO_FLOAT,
        low=False,
    ),
    "non-finite latents": Alarm(
        "above: share of latent values that are not finite",
        non_finite,
        NON_FINITE_SHARE,
        NON_FINITE_SHARE,
        low=False,
        applies=lambda samples: samples.latents is not None,
    ),
}
