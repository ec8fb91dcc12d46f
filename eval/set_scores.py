"""What each sample contributes to the inception score, to precision and to recall (`Influence`, eval/influence.py)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ditbench.eval.influence import Influence, Spread, jackknife

BLOCK = 1024  # rows of a distance matrix held at once
LEFT_OUT = 0.25
DRAWS = 40
DELETE_QUARTER = "value ± t·sd over samples without a random quarter of each stratum (delete-d jackknife)"


def inception_score_influence(logits_NK: np.ndarray, score: float) -> Influence:
    """score = exp(mean_i Σ_k p_ik log p_ik − Σ_k p̄_k log p̄_k), p̄ the mean of p.

    Libraries that average the scores of splits estimate the same number; what a sample contributes to it is nearly the same. What pairs
    do together is not taken off: the score is skewed, and the interval of real digits covered 90 instead of 96 times in 100.
    """
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    probability_NK = np.exp(shifted_NK) / np.exp(shifted_NK).sum(axis=1, keepdims=True)
    marginal_K = probability_NK.mean(axis=0).clip(min=1e-300)
    certainty_N = (probability_NK * np.log(probability_NK.clip(min=1e-300))).sum(axis=1)
    of_log_N = certainty_N - probability_NK @ np.log(marginal_K)
    return Influence(score * (of_log_N - of_log_N.mean()))


def near_reference(generated_NF: Tensor, reference_MF: Tensor, neighbours: int) -> np.ndarray:
    """Whether each generated row lies in a ball around one of the reference, bool (N,): precision is the share of those.

    A ball reaches to its centre's neighbour number `neighbours` (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1).
    """
    radius_M = torch.cat(
        [torch.cdist(some, reference_MF).kthvalue(neighbours + 1).values for some in reference_MF.split(BLOCK)]
    )
    return torch.cat(
        [(torch.cdist(some, reference_MF) <= radius_M).any(dim=1) for some in generated_NF.split(BLOCK)]
    ).numpy()


def recall_influence(generated_NF: Tensor, reference_MF: Tensor, neighbours: int) -> Influence:
    """Of the share of reference rows that lie in a ball around a generated one, for more than neighbours + 1 of these.

    Without sample i its ball is gone, and the balls of those who counted it among their neighbours reach one neighbour further.
    """
    among_NN, to_reference_MN = torch.cdist(generated_NF, generated_NF), torch.cdist(reference_MF, generated_NF)
    nearest = among_NN.topk(neighbours + 2, largest=False)  # the first is the point itself
    radius_N, next_radius_N = nearest.values[:, neighbours], nearest.values[:, neighbours + 1]
    inside_MN, then_inside_MN = to_reference_MN <= radius_N, to_reference_MN <= next_radius_N
    balls_M = inside_MN.sum(dim=1)
    counted_N = among_NN <= radius_N[:, None]  # row j: whom j's ball reaches

    def without_one(index: int) -> float:
        wider = counted_N[:, index].clone()
        wider[index] = False
        left_M = balls_M - inside_MN[:, index].int()
        return float(((left_M > 0) | then_inside_MN[:, wider].any(dim=1)).float().mean())

    return jackknife(without_one, len(generated_NF))


def recall_spread(
    generated_NF: Tensor, reference_MF: Tensor, neighbours: int, strata_N: np.ndarray, seed: int
) -> Spread:
    """Delete-d jackknife (Shao & Wu 1989, Annals of Statistics 17, 1176–1197), d a quarter of each stratum.

    Recall has no derivative: leaving out one sample at a time, its variance comes out at twice what it is.
    """
    among_NN, to_reference_MN = torch.cdist(generated_NF, generated_NF), torch.cdist(reference_MF, generated_NF)
    random, values = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        rows = torch.from_numpy(_without_some(strata_N, random))
        radius = (
            among_NN[rows][:, rows].kthvalue(min(neighbours, len(rows) - 1) + 1).values
        )  # the first is the point itself
        values.append(float((to_reference_MN[:, rows] <= radius).any(dim=1).float().mean()))
    left_out = len(strata_N) - len(rows)
    return Spread(float(np.std(values, ddof=1) * np.sqrt(len(rows) / left_out)), DRAWS - 1)


def _without_some(strata_N: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """All rows but LEFT_OUT of them, evenly from all strata; always the same number."""
    n = len(strata_N)
    shuffled = random.permutation(n)
    by_stratum = shuffled[np.argsort(random.permutation(strata_N.max() + 1)[strata_N[shuffled]], kind="stable")]
    left_out = (np.arange(max(round(LEFT_OUT * n), 1)) + random.random()) * n / max(round(LEFT_OUT * n), 1)
    return np.sort(np.delete(by_stratum, left_out.astype(int)))
