"""How often the "95 %" intervals cover, on real digits: writes results/intervals/coverage-N.csv, a row per metric, model and design.

    python bench/intervals.py 64 256 1024          # minutes to an hour on one core; --only FID,KID for some of the metrics
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ditbench.harness.models.zoo as zoo
from ditbench.eval import frechet, kernel_distance, set_scores
from ditbench.eval.base import PerSample
from ditbench.eval.clip_metrics import gaussian_kernel, mmd2
from ditbench.eval.influence import Influence, Spread, spread
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
    """The numbers of one drawn set, and their intervals."""

    def __init__(self, world: World, model: str, rows_N: np.ndarray, strata_N: np.ndarray, seed: int) -> None:
        (other,) = (name for name in MODELS if name != model)
        self.world, self.rows_N, self.strata_N, self.seed = world, rows_N, strata_N, seed
        self.mine, self.theirs = world.seen[model], world.seen[other]
        self.x_NF, self.y_NF = self.mine.features_NF[rows_N], self.theirs.features_NF[rows_N]
        self.all_rows = np.arange(len(rows_N))

    def value(self, metric: str) -> float:
        """Of one of the ESTIMATED metrics, whose expectation is not known exactly."""
        return ESTIMATED[metric](self)

    def interval(self, metric: str) -> tuple[float, Interval]:
        return INTERVALS[metric](self)

    def fid_value(self) -> float:
        return frechet.distance(self.x_NF, self.world.reference_MF)(self.all_rows)

    def to_float_value(self) -> float:
        return frechet.distance(self.x_NF, self.y_NF)(self.all_rows)

    def apart_value(self) -> float:
        mine, theirs = (frechet.distance(each, self.world.reference_MF) for each in (self.x_NF, self.y_NF))
        return mine(self.all_rows) - theirs(self.all_rows)

    def score_value(self) -> float:
        probability_NK = torch.from_numpy(self.mine.logits_NK[self.rows_N]).softmax(dim=1).numpy()
        marginal_K = probability_NK.mean(axis=0)
        certainty = (probability_NK * np.log(probability_NK.clip(1e-300))).sum(axis=1).mean()
        return float(np.exp(certainty - (marginal_K * np.log(marginal_K.clip(1e-300))).sum()))

    def recall_value(self) -> float:
        generated_NF, reference_MF = self._tensors()
        radius_N = torch.cdist(generated_NF, generated_NF).kthvalue(NEIGHBOURS + 1).values
        return float((torch.cdist(reference_MF, generated_NF) <= radius_N).any(dim=1).float().mean())

    def cmmd_to_float_value(self) -> float:
        return mmd2(unit(self.x_NF), unit(self.y_NF))

    def fid(self) -> tuple[float, Interval]:
        value = self.fid_value()
        return value, student_of_log(value, self._spread(frechet.influence(self.x_NF, self.world.reference_MF)))

    def fd_infinity(self) -> tuple[float, Interval]:
        whole = frechet.influence(self.x_NF, self.world.reference_MF)
        limit = frechet.infinity(self.x_NF, self.world.reference_MF, whole, self.strata_N, self.seed)
        of_samples = self._spread(limit.influence)
        total = Spread(float(np.hypot(of_samples.sd, limit.split_sd)), of_samples.freedom)
        return limit.value, student(limit.value, total)

    def kid(self) -> tuple[float, Interval]:
        return self._kernel("KID", self.x_NF, self.world.reference_MF, kernel_distance.cubic_kernel)

    def cmmd(self) -> tuple[float, Interval]:
        return self._kernel("CMMD", unit(self.x_NF), unit(self.world.reference_MF), gaussian_kernel)

    def score(self) -> tuple[float, Interval]:
        value = self.score_value()
        influence = set_scores.inception_score_influence(self.mine.logits_NK[self.rows_N], value)
        return value, student(value, self._spread(influence))

    def recall(self) -> tuple[float, Interval]:
        value = self.recall_value()
        return value, student(value, set_scores.recall_spread(*self._tensors(), NEIGHBOURS, self.strata_N, self.seed))

    def to_float(self) -> tuple[float, Interval]:
        value = self.to_float_value()
        return value, student(value, self._spread(frechet.influence_of_pairs(self.x_NF, self.y_NF)))

    def cmmd_to_float(self) -> tuple[float, Interval]:
        value = self.cmmd_to_float_value()
        influence = kernel_distance.influence_of_pairs(unit(self.x_NF), unit(self.y_NF), gaussian_kernel)
        return value, student(value, self._spread(influence))

    def apart(self) -> tuple[float, Interval]:
        mine, theirs = (frechet.influence_of_rows(each, self.world.reference_MF) for each in (self.x_NF, self.y_NF))
        return self._difference(mine - theirs + self.apart_value(), np.zeros(len(self.rows_N)), pseudo=True)

    def psnr(self) -> tuple[float, Interval]:
        value, ci95 = mean_with_ci(self.world.psnr_N[self.rows_N], self.strata_N)
        assert ci95 is not None
        return value, ci95

    def precision(self) -> tuple[float, Interval]:
        return share_by_design(self.mine.near_N[self.rows_N], self.strata_N)

    def recognised(self) -> tuple[float, Interval]:
        return share_by_design(self.mine.right_N[self.rows_N], self.strata_N)

    def leaning(self) -> tuple[float, Interval]:
        return share_by_design(self.mine.leans_N[self.rows_N], self.strata_N)

    def by_category(self) -> tuple[float, Interval]:
        leans_N, labels_N = self.mine.leans_N[self.rows_N], self.world.labels_N[self.rows_N]
        categories = [leans_N[labels_N == label] for label in range(CLASSES) if (labels_N == label).any()]
        return mean_of_shares_with_ci((int(each.sum()), len(each)) for each in categories)

    def numbers_apart(self) -> tuple[float, Interval]:
        return self._difference(*(self._sureness(seen)[self.rows_N] for seen in (self.mine, self.theirs)))

    def shares_apart(self) -> tuple[float, Interval]:
        one, other = (seen.leans_N[self.rows_N].astype(float) for seen in (self.mine, self.theirs))
        return self._difference(one, other, yes_no=True)

    def _kernel(
        self, name: str, x_NF: np.ndarray, reference_MF: np.ndarray, kernel: kernel_distance.Kernel
    ) -> tuple[float, Interval]:
        within = kernel_distance.within(x_NF, self.strata_N, kernel)
        across = float(kernel_distance.across(x_NF, reference_MF, kernel).mean())
        value = within.by_design + self.world.within_reference[name] - 2 * across
        return value, student(value, self._spread(kernel_distance.influence(x_NF, reference_MF, within, kernel)))

    def _difference(
        self, one_N: np.ndarray, other_N: np.ndarray, yes_no: bool = False, pseudo: bool = False
    ) -> tuple[float, Interval]:
        design_N = self.strata_N if self.strata_N.any() else None
        pair = (PerSample(each, yes_no, pseudo=pseudo, design_N=design_N) for each in (one_N, other_N))
        (found,) = differences([tuple(pair)])
        return found.value, found.ci95

    def _spread(self, influence: Influence) -> Spread:
        return spread(influence, self.strata_N)

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.x_NF).float(), torch.from_numpy(self.world.reference_MF).float()

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


ESTIMATED: dict[str, Callable[[Numbers], float]] = {
    "FID": Numbers.fid_value,
    "IS": Numbers.score_value,
    "recall": Numbers.recall_value,
    "FID to float": Numbers.to_float_value,
    "CMMD to float": Numbers.cmmd_to_float_value,
    "difference of FID": Numbers.apart_value,
}
INTERVALS: dict[str, Callable[[Numbers], tuple[float, Interval]]] = {
    "FID": Numbers.fid,
    "FD∞": Numbers.fd_infinity,
    "KID": Numbers.kid,
    "IS": Numbers.score,
    "recall": Numbers.recall,
    "CMMD": Numbers.cmmd,
    "FID to float": Numbers.to_float,
    "CMMD to float": Numbers.cmmd_to_float,
    "difference of FID": Numbers.apart,
    "PSNR": Numbers.psnr,
    "precision": Numbers.precision,
    "share (recognised)": Numbers.recognised,
    "share (leans left)": Numbers.leaning,
    "mean of categories' shares": Numbers.by_category,
    "difference of numbers": Numbers.numbers_apart,
    "difference of shares": Numbers.shares_apart,
}


def unit(x_NF: np.ndarray) -> np.ndarray:
    return x_NF / np.linalg.norm(x_NF, axis=1, keepdims=True)


def simulate(
    world: World,
    n: int,
    design: str,
    model: str,
    metrics: Sequence[str] = tuple(INTERVALS),
    draws: int = DRAWS,
    truth: int = TRUTH,
) -> list[dict[str, Any]]:
    """A row of FIELDS per metric; the same draws whichever metrics are asked for."""
    random = np.random.default_rng([n, DESIGNS.index(design), MODELS.index(model)])
    drawn_rows = [drawn(world.labels_N, n, design, random) for _ in range(draws + truth)]
    numbers = [Numbers(world, model, *rows, seed) for seed, rows in enumerate(drawn_rows)]
    exact, rows = numbers[0].exact(), []
    for name in metrics:
        found = [each.interval(name) for each in numbers[:draws]]
        values, limits = np.array([value for value, _ in found]), np.array([ci95 for _, ci95 in found])
        at = exact.get(name)
        if at is None:
            at = float(np.mean([*values, *(each.value(name) for each in numbers[draws:])]))
        rows.append(
            {
                "n": n, "design": design, "model": model, "metric": name, "truth": at, "mean": float(values.mean()),
                "sd": float(values.std(ddof=1)),
                "sd_estimated": float(np.sqrt(((limits[:, 1] - limits[:, 0]) ** 2).mean()) / 3.92),
                "coverage": float(((limits[:, 0] <= at) & (at <= limits[:, 1])).mean()), "draws": draws,
            }
        )  # fmt: skip
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Into the table, in the place of rows of the same metric, design and model."""
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {_key(row): row for row in csv.DictReader(file)}
    for row in rows:
        kept[_key(row)] = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
    order = {name: place for place, name in enumerate((*MODELS, *DESIGNS, *INTERVALS))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept, key=lambda key: [order[part] for part in key]))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["model"], row["design"], row["metric"]


def main(arguments: Sequence[str]) -> None:
    """n …, and --only METRIC[,METRIC …]."""
    torch.set_num_threads(1)
    sizes = [int(each) for each in arguments if each.isdigit()] or [64, 256, 1024]
    named = arguments[arguments.index("--only") + 1].split(",") if "--only" in arguments else tuple(INTERVALS)
    all_digits = world()
    for n in sizes:
        for model in MODELS:
            for design in DESIGNS:
                for name in named:
                    start = time.time()
                    write(OUT / f"coverage-{n}.csv", simulate(all_digits, n, design, model, [name]))
                    print(f"n = {n}, {design} labels, {model}, {name}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
