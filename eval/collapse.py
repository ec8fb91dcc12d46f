"""Alarms for samples that are broken rather than a little worse.

Averages hide them: a blank video has perfect flickering and consistency, and one of noise the highest dynamic degree.
Each alarm measures one number per sample and compares it with a threshold. Where the float model's samples are given,
an alarm counts only if the float model's own sample, from the same noise, is well clear of that threshold: a night sky
that the float model draws too is no collapse, and a scene at the threshold's edge must not alarm by chance.
Noise is then measured from the float model's sample on: what neighbouring pixels differ by is r = (1 − p) r_float + p if
white noise makes up the share p of a picture's variance, so p = (r − r_float) / (1 − r_float) alarms, and not r.

Mode collapse shows in no single picture. Two alarms hold each sample against the others of its set, and what they find against
the same number in the float model's set: `repeated` (the nearest other one: a few pictures come again and again) and `alike`
(all others on average: one picture with grain or small changes). Both look at thumbnails, which do not see grain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from ditbench.eval.base import Evidence, Measurement, metric
from ditbench.eval.batches import batches, neighbours, one_by_one, remembered
from ditbench.eval.passport import FLOAT_MODEL, need_samples
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.statistics import share_with_ci
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Rows, Samples

# Each threshold, and what the float model's own sample has to be clear of.
BLANK_STD, BLANK_STD_FLOAT = 2.0, 4.0  # grey levels; rounding a flat field gives up to 0.5, photographs 90
SATURATED_SHARE, SATURATED_SHARE_FLOAT = 0.5, 0.4  # of one channel's values; a photograph has up to 0.25, digits 0.3
FROZEN_CHANGE, FROZEN_CHANGE_FLOAT = 0.1, 0.2  # grey levels between frames; 0.1 is one pixel in ten off by one level
NOISE_RATIO = 0.75  # white noise has 1, photographs 0.01 to 0.05 at every scale
NOISE_SHARE = 1 / 3  # of the variance, beyond what the float model's sample has: as much as half of all else
SAME, SAME_OF_FLOAT = 2.0, 0.25  # levels between thumbnails; of what the float model's sample has to its nearest
ALIKE_OF_FLOAT = 0.5  # the same to all others, whose distances vary much less
NON_FINITE_SHARE = 0.0  # a single one is too many
NON_FINITE = "non-finite latents"
ALARM_SHARE = 0.1  # of the samples; below, single bad draws are a matter for the metrics

HELD = 28  # bytes per value of a frame, measured
NOISE_SCALES = (1, 2, 4, 8)  # latent noise is white only once the VAE's 8× upsampling is averaged away
NOISE_SIDE = 16  # pixels left a side; with fewer, the ratio of a good thumbnail comes near that of noise
THUMBNAIL_SIDE = 16
DISTANCES_HELD = 2**24  # distances between samples held at once


def alarms(
    samples: Samples, float_model: Samples | None = None, device: torch.device = CPU
) -> dict[str, dict[str, Any]]:
    """{alarm: {share of samples, Wilson's ci95, n, threshold, what}}; alarms that do not apply (latents not kept, images) are absent."""
    return _described(raised(samples, float_model, device))


def alarmed(found: dict[str, dict[str, Any]]) -> list[str]:
    """The alarms raised by more than ALARM_SHARE of the samples."""
    return [name for name, alarm in found.items() if alarm["share"] > ALARM_SHARE]


@metric("collapse", better="lower", of_diverged=True)
def collapse(evidence: Evidence) -> Measurement:
    """Share of samples that are blank, saturated, frozen, noise, repeated or not finite while the float model's are not."""
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
    ours = numbers(samples, device)
    theirs = {} if float_model is None else numbers(float_model, device)
    hits = {}
    for name, value_N in ours.items():
        alarm = ALARMS[name]
        hits[name] = alarm.raised(value_N, theirs.get(name))
    for name in ("repeated", "alike"):
        hits[name] &= ~hits["blank"]  # blank pictures are the same too, and have their alarm
    return hits


def numbers(samples: Samples, device: torch.device = CPU) -> dict[str, Tensor]:
    """{alarm: the number of each sample (N,)} of the alarms that apply; one pass over pixels and one over latents, remembered."""
    names = [name for name, alarm in ALARMS.items() if alarm.applies(samples)]

    def of_rows(rows: Rows, chosen: list[str], frames_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        def all_rows() -> dict[str, Tensor]:
            found: dict[str, list[Tensor]] = {name: [] for name in chosen}
            for row in one_by_one(rows):
                seen = frames_of(row).to(device)
                for name, values in found.items():
                    values.append(ALARMS[name].measure(seen).cpu())
            return {name: ALARMS[name].among(torch.stack(values).to(device)).cpu() for name, values in found.items()}

        return remembered(rows, numbers, f"{chosen} on {device}", all_rows)

    found = of_rows(
        samples.pixels,
        [name for name in names if name != NON_FINITE],
        lambda pixels: pixels if samples.is_video else pixels[None],
    )
    if samples.latents is None:
        return found
    return {**found, **of_rows(samples.latents, [NON_FINITE], lambda latent: latent)}


@dataclass(frozen=True)
class Alarm:
    """measure: a sample's frames (F, H, W, 3) or its latents, on the device → a number, bad below the threshold (`low`) or above it.

    among: where that number takes all samples, from what `measure` found of each (N, …) to one number each (N,).
    float_threshold: the float model's own number must not be beyond it.
    of_float: or, a share made of both numbers, (ours, float model's) → (N,), held against a threshold of its own.
    """

    what: str
    measure: Callable[[Tensor], Tensor]
    threshold: float
    float_threshold: float
    low: bool
    applies: Callable[[Samples], bool] = lambda samples: True
    among: Callable[[Tensor], Tensor] = lambda value_N: value_N
    of_float: Callable[[Tensor, Tensor], Tensor] | None = None

    def raised(self, ours_N: Tensor, theirs_N: Tensor | None = None) -> Tensor:
        """bool (N,); theirs: the float model's numbers."""
        if theirs_N is None:
            return self.beyond(self.threshold, ours_N)
        if self.of_float is not None:
            return self.beyond(self.float_threshold, self.of_float(ours_N, theirs_N))
        return self.beyond(self.threshold, ours_N) & ~self.beyond(self.float_threshold, theirs_N)

    def beyond(self, threshold: float, value_N: Tensor) -> Tensor:
        """bool (N,)"""
        return value_N < threshold if self.low else value_N > threshold


def spread(frames_FHWC: Tensor) -> Tensor:
    """Standard deviation over a frame's pixels of its liveliest channel, grey levels; the median over frames."""
    return _over_frames(frames_FHWC, _channel_std).median()


def saturation(frames_FHWC: Tensor) -> Tensor:
    """Share of values at 0 or 255 in the channel that has most of them, over all frames."""

    def share(frames_BHWC: Tensor) -> Tensor:
        return ((frames_BHWC == 0) | (frames_BHWC == 255)).float().mean(dim=(1, 2))

    return _over_frames(frames_FHWC, share).mean(dim=0).amax()


def change(frames_FHWC: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, grey levels."""
    return torch.cat(
        [
            (after.float() - before.float()).abs().flatten(1).mean(dim=1)
            for before, after in neighbours(frames_FHWC, HELD)
        ]
    ).mean()


def noisiness(frames_FHWC: Tensor) -> Tensor:
    """Energy of the differences of neighbouring pixels over twice the variance, which is 1 for white noise.

    Of the frame averaged over 1, 2, 4 or 8 pixels a side, whichever looks most like noise; the median over frames.
    """

    def ratio(frames_BHWC: Tensor) -> Tensor:
        frames_B3HW = frames_BHWC.permute(0, 3, 1, 2).float()
        side = min(frames_B3HW.shape[-2:])
        scales = [scale for scale in NOISE_SCALES if scale == 1 or side // scale >= NOISE_SIDE]
        ratio_B = torch.stack([_neighbour_ratio(avg_pool2d(frames_B3HW, scale)) for scale in scales]).amax(dim=0)
        return ratio_B * (_channel_std(frames_BHWC) >= BLANK_STD)  # what rounding leaves of a blank frame is noise too

    return _over_frames(frames_FHWC, ratio).median()


def thumbnail(frames_FHWC: Tensor) -> Tensor:
    """The first, middle and last frame, at most THUMBNAIL_SIDE pixels a side, as one vector of grey levels."""
    some_F3HW = frames_FHWC[sorted({0, len(frames_FHWC) // 2, len(frames_FHWC) - 1})].permute(0, 3, 1, 2).float()
    height, width = (min(side, THUMBNAIL_SIDE) for side in some_F3HW.shape[-2:])
    return adaptive_avg_pool2d(some_F3HW, (height, width)).flatten()


def nearest(thumbnail_ND: Tensor) -> Tensor:
    """Of each the distance to the nearest other one, root mean square grey levels (N,); 255 where there is no other."""
    centred_ND = thumbnail_ND - thumbnail_ND.mean(dim=0)  # or the squares' rounding would be seen
    square_N = centred_ND.square().sum(dim=1)
    found = []
    for rows in torch.arange(len(centred_ND)).split(max(1, DISTANCES_HELD // len(centred_ND))):
        distance_BN = square_N[rows, None] + square_N - 2 * centred_ND[rows] @ centred_ND.T
        distance_BN[torch.arange(len(rows)), rows] = torch.inf
        found.append(distance_BN.amin(dim=1))
    return (torch.cat(found) / centred_ND.shape[1]).clamp(min=0).sqrt().clamp(max=255.0)


def to_the_others(thumbnail_ND: Tensor) -> Tensor:
    """Of each the distance to the others, root mean square grey levels over pixels and samples (N,); 255 where there is no other."""
    if len(thumbnail_ND) < 2:
        return torch.full((len(thumbnail_ND),), 255.0)
    square_N = (thumbnail_ND - thumbnail_ND.mean(dim=0)).square().mean(dim=1)
    # Σ_j |x_i − x_j|² = N |x_i − mean|² + Σ_j |x_j − mean|², over N − 1 others
    return ((len(square_N) * square_N + square_N.sum()) / (len(square_N) - 1)).sqrt()


def non_finite(latent: Tensor) -> Tensor:
    """Share of a sample's latent values that are infinite or no number."""
    return (~latent.isfinite()).float().mean()


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


def _over_frames(frames_FHWC: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """measure (B, H, W, 3) → (B, …) of some frames at a time, (F, …) on the CPU."""
    return torch.cat([measure(some).cpu() for some in batches(frames_FHWC, HELD)])


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
        "above: energy of neighbouring pixels' differences over twice the variance (beside the float model: share of white "
        "noise in the variance, beyond its own)",
        noisiness,
        NOISE_RATIO,
        NOISE_SHARE,
        low=False,
        of_float=lambda ours_N, theirs_N: (ours_N - theirs_N) / (1 - theirs_N).clamp(min=1e-6),
    ),
    "repeated": Alarm(
        "below: distance of thumbnails to the nearest other sample, levels (beside the float model: of its distance)",
        thumbnail,
        SAME,
        SAME_OF_FLOAT,
        low=True,
        among=nearest,
        of_float=lambda ours_N, theirs_N: (
            ours_N / theirs_N
        ),  # no number, and no alarm, where the float model repeats itself
    ),
    "alike": Alarm(
        "below: distance of thumbnails to all other samples, levels (beside the float model: of its distance)",
        thumbnail,
        SAME,
        ALIKE_OF_FLOAT,
        low=True,
        among=to_the_others,
        of_float=lambda ours_N, theirs_N: (
            ours_N / theirs_N
        ),  # no number, and no alarm, where the float model repeats itself
    ),
    NON_FINITE: Alarm(
        "above: share of latent values that are not finite",
        non_finite,
        NON_FINITE_SHARE,
        NON_FINITE_SHARE,
        low=False,
        applies=lambda samples: samples.latents is not None,
    ),
}
