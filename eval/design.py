"""How the conditions of a set of samples were chosen, which decides how far a number of them would have moved.

Labels in turn (0, 1, … 9, 0, 1, …) or a prompt file gone through several times fix how many samples each condition has; only the
noise is left to chance. Labels drawn with a seed leave that to chance as well: at n = 64 an FID of ten classes is twice as large then,
and moves four times as far.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ditbench.harness.samples.samples import Samples

INDEPENDENT = "independent"


@dataclass(frozen=True)
class Design:
    """name: for the passport. strata_N: int (N,), the samples that differ by their noise alone; each stratum has two samples or more,
    unless there is one sample in all.
    """

    name: str
    strata_N: np.ndarray


def design_of(samples: Samples) -> Design:
    """Balanced where labels or prompts come in turn and more than once; else every sample is taken for a draw of its own.

    Conditions that have one sample each say nothing of the spread within them: those samples make one stratum, whose spread is
    that of noise and condition together.
    """
    n = len(samples)
    if samples.labels_N is not None:
        return _in_turn("labels", samples.labels_N.tolist(), n)
    if samples.prompts:
        return _in_turn("prompts", [prompt.text for prompt in samples.prompts], n)
    return Design(INDEPENDENT, np.zeros(n, int))


def with_company(strata_N: np.ndarray) -> np.ndarray:
    """The same strata, numbered from 0, but samples that are alone in theirs are put together; one that still is, into the smallest."""
    _, place_N, size_K = np.unique(strata_N, return_inverse=True, return_counts=True)
    alone_N = size_K[place_N] == 1
    if alone_N.sum() == 1 and len(size_K) > 1:
        smallest = np.where(size_K > 1, size_K, size_K.max() + 1).argmin()
        place_N = np.where(alone_N, smallest, place_N)
    else:
        place_N = np.where(alone_N, len(size_K), place_N)
    return np.unique(place_N, return_inverse=True)[1]


def _in_turn(what: str, conditions: Sequence[Hashable], n: int) -> Design:
    kinds = list(dict.fromkeys(conditions))
    period = len(kinds)
    taken_in_turn = all(condition == kinds[index % period] for index, condition in enumerate(conditions))
    if not taken_in_turn or period in (1, n):
        return Design(INDEPENDENT if not taken_in_turn or period == 1 else f"{what} once each", np.zeros(n, int))
    return Design(f"balanced {what} ({period:,} in turn)", with_company(np.arange(n) % period))
