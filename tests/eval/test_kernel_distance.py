"""KID by the design of the labels, against plain loops and against the truth of a small model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ditbench.eval import kernel_distance, libraries
from ditbench.eval.base import evaluate
from ditbench.eval.features import judge_pair

CENTRES_KF = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 1.0], [0.0, -3.0, 2.0]])


def drawn(labels_N, seed):
    return CENTRES_KF[labels_N] + np.random.default_rng(seed).normal(size=(len(labels_N), 3))


def kernel(a, b):
    return (a @ b / 3 + 1) ** 3


def test_the_mean_over_pairs_by_design_is_a_plain_loop_over_strata(monkeypatch):
    strata_N = np.array([0, 0, 0, 1, 1, 2, 2])
    x, total = drawn(strata_N, 0), 0.0
    for a in range(3):
        for b in range(3):
            pairs = [
                kernel(x[i], x[j])
                for i in range(7)
                for j in range(7)
                if strata_N[i] == a and strata_N[j] == b and i != j
            ]
            total += np.mean(pairs) * (strata_N == a).mean() * (strata_N == b).mean()
    for rows_at_once in (100, 3):
        monkeypatch.setattr(kernel_distance, "KERNEL_ROWS", rows_at_once)
        found = kernel_distance.within(x, strata_N)
        assert found.by_design == pytest.approx(total, rel=1e-12)
        plain = np.mean([kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
        assert found.plain == pytest.approx(plain, rel=1e-12) and found.plain < found.by_design


def test_kid_has_no_bias_whether_labels_are_balanced_or_independent():
    """The reference is of the same distribution, so the truth is 0. As the libraries have it, balanced labels give −0.5."""
    random, values = np.random.default_rng(1), {"balanced": [], "independent": [], "the libraries'": []}
    for seed in range(150):
        reference = drawn(random.integers(0, 3, 300), 10_000 + seed)
        for design in ("balanced", "independent"):
            labels_N = np.arange(30) % 3 if design == "balanced" else random.integers(0, 3, 30)
            x = drawn(labels_N, seed)
            within = kernel_distance.within(x, labels_N if design == "balanced" else np.zeros(30, int))
            value = kernel_distance.unbiased(within, x, reference, kernel_distance.cubic_kernel)
            values[design].append(value)
            if design == "balanced":
                values["the libraries'"].append(value + within.plain - within.by_design)
    error = {name: np.std(found) / np.sqrt(150) for name, found in values.items()}
    assert abs(np.mean(values["balanced"])) < 3 * error["balanced"]
    assert abs(np.mean(values["independent"])) < 3 * error["independent"]
    assert np.mean(values["the libraries'"]) < -10 * error["the libraries'"]


@pytest.mark.parametrize("library", libraries.KID)
def test_kid_is_the_librarys_number_of_independent_labels_and_its_pairs_are_weighted_by_balanced_ones(
    library, evidence
):
    name, pair = f"{library}/kid_judge", judge_pair(evidence)
    theirs, _ = libraries.KID[library](pair.generated_NF, pair.reference_MF, evidence.seed)
    labels_N = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 96))
    random_ = replace(evidence, generated=replace(evidence.generated, labels_N=labels_N))
    independent, balanced = evaluate([name], random_)[name], evaluate([name], evidence)[name]
    assert independent["value"] == theirs and independent["passport"]["design"] == "independent"
    within = kernel_distance.within(pair.generated_NF.numpy(), np.arange(96) % 10)
    assert balanced["value"] == pytest.approx(theirs + within.by_design - within.plain, rel=1e-9)
    assert balanced["value"] != theirs and "by design" in balanced["passport"]["estimator"]
