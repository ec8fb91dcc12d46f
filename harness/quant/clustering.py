"""Grouping of denoising steps: agglomerative clustering in which only neighbours may merge (HTG, Alg. 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def adjacent_clusters(points_SC: Tensor, groups: int) -> Tensor:
    """group_of_step: int64 (S,), 0 … groups − 1 in order; each group is a run of consecutive steps.

    Start with one cluster per step; merge the two neighbours whose means are closest (squared L2; the first pair on
    ties) until `groups` remain. The mean of a cluster is that of all its members. scikit-learn's constrained
    agglomerative clustering has no centroid linkage, hence this loop.

    Raises:
        ValueError: groups not in 1 … S.
    """
    steps = len(points_SC)
    if not 1 <= groups <= steps:
        raise ValueError(f"{steps} steps cannot be put into {groups} groups; choose 1 to {steps}")
    sums = list(points_SC.double())
    sizes = [1] * steps
    while len(sums) > groups:
        means = torch.stack([total / size for total, size in zip(sums, sizes, strict=True)])
        nearest = int((means[1:] - means[:-1]).square().sum(1).argmin())
        sums[nearest] = sums[nearest] + sums.pop(nearest + 1)
        sizes[nearest] += sizes.pop(nearest + 1)
    return torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes))


def group_means(points_SC: Tensor, group_of_step_S: Tensor) -> Tensor:
    """(G, C): the mean of the members of each group."""
    groups = int(group_of_step_S.max()) + 1
    return torch.stack([points_SC[group_of_step_S == group].mean(0) for group in range(groups)])
