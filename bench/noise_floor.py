"""How often two models of equal quality are told apart (type I error), and a worse one from the float model (power).

    python bench/noise_floor.py          # writes results/intervals/noise_floor.csv, a row per rule, metric and n
    python bench/docs_tables.py          # then fills the table of docs/protocols.md

The float model draws real digits with balanced labels. The model held against it draws the same digit for the same noise SAME times in 100, else
another of the label: it has the same distribution. The worse one has noise on a share of its digits, so large that its expected FID
is about `effect` standard deviations (of one seed's FID) higher.

    range of three seeds     what was the noise floor: |difference to the float row| ≤ range of three seeds of the float model
    Student, three seeds     paired differences of three seeds
    pairs, one seed          what is: the paired difference of one seed, its spread from each sample's influence
    pairs, three seeds       the same, averaged over three seeds
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


import intervals
import numpy as np
import torch
from scipy.stats import t

from ditbench.eval import frechet, kernel_distance
from ditbench.eval.base import PerSample
from ditbench.eval.influence import counted_once
from ditbench.eval.paired_differences import Difference, differences

OUT = intervals.OUT / "noise_floor.csv"
SAME = 0.8
SEEDS = 3
ALPHA = 0.05
RULES = ("range of three seeds", "Student, three seeds", "pairs, one seed", "pairs, three seeds")
FIELDS = ("n", "metric", "worse share", "effect", *RULES, "trials")

Scored = dict[str, PerSample]


def scored(world: intervals.World, features_NF: np.ndarray, strata_N: np.ndarray) -> Scored:
    """FID and KID (up to what the reference adds) with what each sample contributes."""
    reference_MF = world.reference_MF
    fid = frechet.distance(features_NF, reference_MF)(np.arange(len(strata_N)))
    of_fid = frechet.contributed(frechet.influence(features_NF, reference_MF), features_NF.shape[1], strata_N)
    within = kernel_distance.within(features_NF, strata_N)
    of_kid = kernel_distance.influence(features_NF, reference_MF, within, kernel_distance.cubic_kernel)
    kid = within.by_design - 2 * float(kernel_distance.across(features_NF, reference_MF).mean())
    return {
        "FID": PerSample(fid + of_fid.first_N, pseudo=True, design_N=strata_N),
        "KID": PerSample(kid + counted_once(of_kid, strata_N).first_N, pseudo=True, design_N=strata_N),
    }


def pair_of_models(world: intervals.World, n: int, worse: float, random: np.random.Generator) -> tuple[Scored, Scored]:
    """The float model and another one on the same noise."""
    chosen_N, strata_N = intervals.drawn(world.labels_N, n, "balanced", random)
    others_N, _ = intervals.drawn(world.labels_N, n, "balanced", random)
    other_N = np.where(random.random(n) < SAME, chosen_N, others_N)
    real_NF, noisy_NF = (world.seen[name].features_NF for name in intervals.MODELS)
    bad_N1 = (random.random(n) < worse)[:, None]
    features_NF = np.where(bad_N1, noisy_NF[other_N], real_NF[other_N])
    return scored(world, real_NF[chosen_N], strata_N), scored(world, features_NF, strata_N)


def told_apart(found: list[tuple[Scored, Scored]], name: str) -> tuple[bool, ...]:
    """What each of RULES says of the pairs of SEEDS seeds."""
    steps = [differences([(other[name], one[name])])[0] for one, other in found]
    values_S = np.array([each.value for each in steps])
    floats_S = [float(one[name].values_N.mean()) for one, _ in found]
    limit = float(t.ppf(1 - ALPHA / 2, SEEDS - 1)) * values_S.std(ddof=1) / np.sqrt(SEEDS)
    half = np.sqrt(sum(_half(each) ** 2 for each in steps)) / SEEDS
    return (
        abs(values_S[0]) > max(floats_S) - min(floats_S),
        abs(values_S.mean()) > limit,
        steps[0].p < ALPHA,
        abs(values_S.mean()) > half,
    )


def _half(difference: Difference) -> float:
    return (difference.ci95[1] - difference.ci95[0]) / 2


def simulate(world: intervals.World, n: int, worse: float, trials: int) -> list[dict]:
    random = np.random.default_rng([n, round(100 * worse)])
    said: dict[str, list[tuple[bool, ...]]] = {"FID": [], "KID": []}
    values: dict[str, list[tuple[float, float]]] = {"FID": [], "KID": []}
    for _ in range(trials):
        found = [pair_of_models(world, n, worse, random) for _ in range(SEEDS)]
        for name in said:
            said[name].append(told_apart(found, name))
            values[name] += [(float(a[name].values_N.mean()), float(b[name].values_N.mean())) for a, b in found]
    rows = []
    for name, verdicts in said.items():
        one, other = np.array(values[name]).T
        rates = dict(zip(RULES, np.mean(verdicts, axis=0).tolist(), strict=True))
        effect = float((other.mean() - one.mean()) / one.std(ddof=1))
        rows.append({"n": n, "metric": name, "worse share": worse, "effect": effect} | rates | {"trials": trials})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    world, rows = intervals.world(), []
    for n, shares in ((64, (0.0, 0.1, 0.2)), (256, (0.0, 0.05, 0.1))):
        for worse in shares:
            rows += simulate(world, n, worse, trials=400 if worse == 0 else 200)
            print(rows[-2:], flush=True)
            OUT.parent.mkdir(parents=True, exist_ok=True)
            with OUT.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(
                    {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                    for row in rows
                )


if __name__ == "__main__":
    main()
