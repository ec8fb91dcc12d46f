"""What the smoothing methods share: ranges of weights, SmoothQuant's factor, and where a site's transform takes place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ditbench.harness.quant.target import Site, Target
from ditbench.harness.quant.transforms import Transform


def weight_absmax(target: Target, site: Site) -> Tensor:
    """Largest |weight| per input channel over all layers that read the site, (C,), on the CPU as statistics are."""
    return torch.stack([target.weight(n).float().abs().amax(0) for n in site.consumers]).amax(0).cpu()


def smoothing_scale(act_absmax_C: Tensor, weight_absmax_C: Tensor, strength: float, floor: float) -> Tensor:
    """max|X|^α / max|W|^(1−α), one factor per input channel (SmoothQuant, arXiv:2211.10438, Eq. 4).

    strength: α; 1 moves all range from X into W, 0 all range from W into X. floor: of both ranges and of the factor.
    """
    act_range_C = act_absmax_C.clamp(min=floor)
    weight_range_C = weight_absmax_C.clamp(min=floor)
    return (act_range_C**strength / weight_range_C ** (1 - strength)).clamp(min=floor)


def place(
    target: Target, by_site: Mapping[str, Transform], *, fold: bool = True
) -> tuple[dict[str, Transform], frozenset[str]]:
    """Each site's transform at the layers that read it, and the sites whose shift and scale their producer takes over.

    Layers left in float follow a fold, since their input changes too; they are spared what runs online.
    """
    transforms: dict[str, Transform] = {}
    folded = set()
    for site in target.linear_sites():
        shared = by_site.get(site.name, Transform())
        if shared.is_identity:
            continue
        if fold and site.foldable and not shared.shift_and_scale_only().is_identity:
            folded.add(site.name)
        transforms |= {name: shared for name in site.consumers if name in target.layers or site.name in folded}
    return transforms, frozenset(folded)
