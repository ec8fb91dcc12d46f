"""How often the "95 %" intervals cover, on real digits: writes results/intervals/coverage-N.csv, a row per metric, model and design.

    python bench/intervals.py 64 256 1024          # as long as it takes: minutes to an hour on one core
    python bench/docs_tables.py                   # then fills the table of docs/protocols.md

The model draws real digits (scikit-learn's 1,797, by label, with replacement), so that what an interval ought to cover is known: exactly, or
as the mean over TRUTH draws. `digits` are the reference's own; `noisy digits` have noise on them, as a quantized model might. Labels are
balanced (0, 1, … in turn) or independent. Features, logits and nearness are the shipped judge's, computed once per digit; everything
from there on is what the metrics call.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ditbench.harness.models.zoo as zoo
from ditbench.eval import frechet, kernel_distance, set_scores
from ditbench.eval.base import PerSample
from ditbench.eval.clip_metrics import gaussian_kernel, mmd2
from ditbench.eval.influence import Spread, spread
from ditbench.eval.paired_differences import differences
from ditbench.eval.statistics import (
    Interval,
    mean_of_shares_with_ci,
    mean_with_ci,
    share_by_design,
    student,
    student_of_log,
)
from ditbench.harness.models.zoo import digits, judge

OUT = Path(__file__).resolve().parent.parent / "results" / "intervals"
DESIGNS, MODELS = ("balanced", "independent"), ("digits", "noisy digits")
DRAWS, TRUTH = 200, 200
NOISE = 40.0  # grey levels
NEIGHBOURS = 3
CLASSES = 10
FIELDS = ("n", "design", "model", "metric", "truth", "mean", "sd", "sd_estimated", "coverage", "draws")

Found = dict[str, tuple[float, Interval]]


@dataclass(frozen=True)
class Seen:
    """All 1,797 digits as the judge sees them."""

    features_NF: np.ndarray
    logits_NK: np.ndarray
    near_N: np.ndarray
    right_N: np.ndarray
    leans_N: np.ndarray  # whether its ink lies left of the middle


@dataclass(frozen=True)
class World:
    labels_N: np.ndarray
    reference_MF: np.ndarray
    seen: dict[str, Seen]
    psnr_N: np.ndarray  # of a digit and its noisy copy
    within_reference: dict[str, float]  # mean kernels of two reference digits


def world() -> World:
    """The digits, the same with noise, and what the judge sees in them."""
    real = digits.load("all")
    images = {"digits": ((real.images_N1HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)}
    noise = torch.randn(images["digits"].shape, generator=torch.Generator().manual_seed(0))
    images["noisy digits"] = (images["digits"] + NOISE * noise).round().clamp(0, 255).to(torch.uint8)
    network = judge.load(Path(zoo.__path__[0]) / "weights" / "tiny-dit" / "judge")
    with torch.no_grad():
        features = {name: network.features(x.repeat(1, 3, 1, 1)) for name, x in images.items()}
        logits = {name: network(x.repeat(1, 3, 1, 1)) for name, x in images.items()}
    reference = features["digits"]
    seen = {
        name: Seen(
            features[name].numpy().astype(np.float64),
            logits[name].numpy().astype(np.float64),
            set_scores.near_reference(features[name], reference, NEIGHBOURS),
            (logits[name].argmax(dim=1) == real.labels_N).numpy(),
            leans_left(images[name]),
        )
        for name in images
    }
    error_N = (images["digits"].float() - images["noisy digits"].float()).square().flatten(1).mean(dim=1)
    psnr_N = (10 * torch.log10(255**2 / error_N)).numpy().astype(np.float64)
    reference_MF = reference.numpy().astype(np.float64)
    together = np.zeros(len(reference_MF), int)
    within_reference = {
        "KID": kernel_distance.within(reference_MF, together).plain,
        "CMMD": kernel_distance.within(unit(reference_MF), together, gaussian_kernel).plain,
    }
    return World(real.labels_N.numpy(), reference_MF, seen, psnr_N, within_reference)


def leans_left(images_N1HW: torch.Tensor) -> np.ndarray:
    ink_NW = images_N1HW[:, 0].double().sum(dim=1)
    middle_N = (ink_NW * torch.arange(ink_NW.shape[1])).sum(dim=1) / ink_NW.sum(dim=1)
    return (middle_N < (ink_NW.shape[1] - 1) / 2).numpy()


def drawn(labels_N: np.ndarray, n: int, design: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Digits (indices) of n samples, and the strata of the design."""
    wanted_N = np.arange(n) % CLASSES if design == "balanced" else random.integers(0, CLASSES, n)
    of_label = [np.flatnonzero(labels_N == label) for label in range(CLASSES)]
    chosen_N = np.array([random.choice(of_label[label]) for label in wanted_N])
    return chosen_N, wanted_N if design == "balanced" else np.zeros(n, int)


class Numbers:
    """Every number of one drawn set, and its interval. `values` alone are cheap."""

    def __init__(self, world: World, model: str, rows_N: np.ndarray, strata_N: np.ndarray, seed: int) -> None:
        (other,) = (name for name in MODELS if name != model)
        self.world, self.rows_N, self.strata_N, self.seed = world, rows_N, strata_N, seed
        self.mine, self.theirs = world.seen[model], world.seen[other]
        self.x_NF, self.y_NF = self.mine.features_NF[rows_N], self.theirs.features_NF[rows_N]
        self.all_rows = np.arange(len(rows_N))

    def values(self) -> dict[str, float]:
        """Of the numbers whose expectation is not known exactly."""
        x, reference = torch.from_numpy(self.x_NF).float(), torch.from_numpy(self.world.reference_MF).float()
        return {
            "FID": frechet.distance(self.x_NF, self.world.reference_MF)(self.all_rows),
            "FID to float": frechet.distance(self.x_NF, self.y_NF)(self.all_rows),
            "difference of FID": self._fid_apart(),
            "IS": self._score(),
            "recall": recall_of(x, reference),
            "CMMD to float": mmd2(unit(self.x_NF), unit(self.y_NF)),
        }

    def intervals(self) -> Found:
        found = self.values()
        return self._of_sets(found) | self._of_samples()

    def _of_sets(self, values: dict[str, float]) -> Found:
        x_NF, reference_MF, strata_N = self.x_NF, self.world.reference_MF, self.strata_N
        of_fid = frechet.influence(x_NF, reference_MF)
        limit = frechet.infinity(x_NF, reference_MF, of_fid, strata_N, self.seed)
        of_limit = spread(limit.influence, strata_N)
        of_limit = Spread(float(np.hypot(of_limit.sd, limit.split_sd)), of_limit.freedom)
        within = kernel_distance.within(x_NF, strata_N)
        cubic = kernel_distance.cubic_kernel
        of_kid = kernel_distance.influence(x_NF, reference_MF, within, cubic)
        kid = within.by_design + self.world.within_reference["KID"]
        kid -= 2 * float(kernel_distance.across(x_NF, reference_MF).mean())
        unit_x, unit_y, unit_r = unit(x_NF), unit(self.y_NF), unit(reference_MF)
        unit_within = kernel_distance.within(unit_x, strata_N, gaussian_kernel)
        of_cmmd = kernel_distance.influence(unit_x, unit_r, unit_within, gaussian_kernel)
        cmmd = unit_within.by_design + self.world.within_reference["CMMD"]
        cmmd -= 2 * float(kernel_distance.across(unit_x, unit_r, gaussian_kernel).mean())
        logits_NK = self.mine.logits_NK[self.rows_N]
        features = [torch.from_numpy(each).float() for each in (x_NF, reference_MF)]
        other = frechet.influence(self.y_NF, reference_MF)
        apart = PerSample(of_fid.first_N - other.first_N + values["difference of FID"], pseudo=True, design_N=strata_N)
        return {
            "FID": (values["FID"], student_of_log(values["FID"], spread(of_fid, strata_N))),
            "FD∞": (limit.value, student(limit.value, of_limit)),
            "KID": (kid, student(kid, spread(of_kid, strata_N))),
            "IS": (
                values["IS"],
                student(values["IS"], spread(set_scores.inception_score_influence(logits_NK, values["IS"]), strata_N)),
            ),
            "recall": (
                values["recall"],
                student(values["recall"], set_scores.recall_spread(*features, NEIGHBOURS, strata_N, self.seed)),
            ),
            "CMMD": (cmmd, student(cmmd, spread(of_cmmd, strata_N))),
            "FID to float": self._of_pairs(values["FID to float"], frechet.influence_of_pairs(x_NF, self.y_NF)),
            "CMMD to float": self._of_pairs(
                values["CMMD to float"], kernel_distance.influence_of_pairs(unit_x, unit_y, gaussian_kernel)
            ),
            "difference of FID": _difference(apart, PerSample(np.zeros(len(strata_N)), pseudo=True)),
        }

    def _of_pairs(self, value: float, influence) -> tuple[float, Interval]:
        return value, student(value, spread(influence, self.strata_N))

    def _of_samples(self) -> Found:
        rows_N, strata_N = self.rows_N, self.strata_N
        left_N, other_N = self.mine.leans_N[rows_N], self.theirs.leans_N[rows_N]
        labels_N = self.world.labels_N[rows_N]
        categories = [left_N[labels_N == label] for label in range(CLASSES) if (labels_N == label).any()]
        sure_N, other_sure_N = (self._sureness(seen)[rows_N] for seen in (self.mine, self.theirs))
        psnr, psnr_ci = mean_with_ci(self.world.psnr_N[rows_N], strata_N)
        assert psnr_ci is not None
        return {
            "PSNR": (psnr, psnr_ci),
            "precision": share_by_design(self.mine.near_N[rows_N], strata_N),
            "share (recognised)": share_by_design(self.mine.right_N[rows_N], strata_N),
            "share (leans left)": share_by_design(left_N, strata_N),
            "mean of categories' shares": mean_of_shares_with_ci((int(c.sum()), len(c)) for c in categories),
            "difference of numbers": _difference(
                PerSample(sure_N, design_N=strata_N), PerSample(other_sure_N, design_N=strata_N)
            ),
            "difference of shares": _difference(
                PerSample(left_N.astype(float), True), PerSample(other_N.astype(float), True)
            ),
        }

    def exact(self) -> dict[str, float]:
        """What the model has in expectation, of the numbers of which that is known."""
        world, mine, theirs = self.world, self.mine, self.theirs
        weights_N = 1 / (CLASSES * np.bincount(world.labels_N)[world.labels_N])
        known = {
            "PSNR": world.psnr_N,
            "precision": mine.near_N,
            "share (recognised)": mine.right_N,
            "share (leans left)": mine.leans_N,
            "mean of categories' shares": mine.leans_N,
            "difference of numbers": self._sureness(mine) - self._sureness(theirs),
            "difference of shares": mine.leans_N.astype(float) - theirs.leans_N,
        }
        inside = weights_N @ kernel_distance.cubic_kernel(mine.features_NF, mine.features_NF) @ weights_N
        across_N = kernel_distance.across(mine.features_NF, world.reference_MF)
        unit_NF = unit(mine.features_NF)
        unit_inside = weights_N @ gaussian_kernel(unit_NF, unit_NF) @ weights_N
        unit_across_N = kernel_distance.across(unit_NF, unit(world.reference_MF), gaussian_kernel)
        centred_NF = mine.features_NF - weights_N @ mine.features_NF
        return {name: float(weights_N @ values_N) for name, values_N in known.items()} | {
            "KID": float(inside + world.within_reference["KID"] - 2 * weights_N @ across_N),
            "CMMD": float(unit_inside + world.within_reference["CMMD"] - 2 * weights_N @ unit_across_N),
            "FD∞": frechet.distance_of_moments(
                weights_N @ mine.features_NF, (centred_NF * weights_N[:, None]).T @ centred_NF, world.reference_MF
            ),
        }

    def _sureness(self, seen: Seen) -> np.ndarray:
        """How far the judge's logit of the label is above the best other one's."""
        logits_NK, labels_N = seen.logits_NK.copy(), self.world.labels_N
        own_N = logits_NK[np.arange(len(labels_N)), labels_N].copy()
        logits_NK[np.arange(len(labels_N)), labels_N] = -np.inf
        return own_N - logits_NK.max(axis=1)

    def _score(self) -> float:
        probability_NK = torch.from_numpy(self.mine.logits_NK[self.rows_N]).softmax(dim=1).numpy()
        marginal_K = probability_NK.mean(axis=0)
        certainty = (probability_NK * np.log(probability_NK.clip(1e-300))).sum(axis=1).mean()
        return float(np.exp(certainty - (marginal_K * np.log(marginal_K.clip(1e-300))).sum()))

    def _fid_apart(self) -> float:
        mine, theirs = (frechet.distance(each, self.world.reference_MF) for each in (self.x_NF, self.y_NF))
        return mine(self.all_rows) - theirs(self.all_rows)


def recall_of(generated_NF: torch.Tensor, reference_MF: torch.Tensor) -> float:
    radius_N = torch.cdist(generated_NF, generated_NF).kthvalue(NEIGHBOURS + 1).values
    return float((torch.cdist(reference_MF, generated_NF) <= radius_N).any(dim=1).float().mean())


def unit(x_NF: np.ndarray) -> np.ndarray:
    return x_NF / np.linalg.norm(x_NF, axis=1, keepdims=True)


def simulate(world: World, n: int, design: str, model: str, draws: int = DRAWS, truth: int = TRUTH) -> list[dict]:
    """A row of FIELDS per metric."""
    random = np.random.default_rng([n, DESIGNS.index(design), MODELS.index(model)])

    def numbers(seed: int) -> Numbers:
        return Numbers(world, model, *drawn(world.labels_N, n, design, random), seed)

    found = [numbers(seed).intervals() for seed in range(draws)]
    more = [numbers(seed).values() for seed in range(truth)]
    known = [*more, *({name: each[name][0] for name in numbers(0).values()} for each in found)]
    expected = {name: float(np.mean([each[name] for each in known])) for name in known[0]} | numbers(0).exact()
    rows = []
    for name in found[0]:
        values = np.array([each[name][0] for each in found])
        limits = np.array([each[name][1] for each in found])
        at = expected[name]
        rows.append(
            {
                "n": n, "design": design, "model": model, "metric": name, "truth": at, "mean": values.mean(),
                "sd": values.std(ddof=1), "sd_estimated": float(np.sqrt(((limits[:, 1] - limits[:, 0]) ** 2).mean()) / 3.92),
                "coverage": float(((limits[:, 0] <= at) & (at <= limits[:, 1])).mean()), "draws": draws,
            }
        )  # fmt: skip
    return rows


def _difference(one: PerSample, other: PerSample) -> tuple[float, Interval]:
    (found,) = differences([(one, other)])
    return found.value, found.ci95


def main(sizes: list[int], say: Callable[[str], None] = print) -> None:
    torch.set_num_threads(1)
    all_digits = world()
    for n in sizes:
        rows = []
        for model in MODELS:
            for design in DESIGNS:
                start = time.time()
                rows += simulate(all_digits, n, design, model)
                say(f"n = {n}, {design} labels, {model}: {time.time() - start:.0f} s")
                OUT.mkdir(parents=True, exist_ok=True)
                with (OUT / f"coverage-{n}.csv").open("w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(
                        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                        for row in rows
                    )


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [64, 256, 1024])
