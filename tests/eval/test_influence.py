"""What each sample contributes to a number of the set is its derivative, and the spread that comes of it is that of fresh samples."""

import numpy as np
import pytest
import torch

from ditbench.eval import frechet, kernel_distance, libraries, set_scores
from ditbench.eval.influence import Influence, _variance_of_pairs, rows_of_pairs, spread, spread_within

WIDTH = 6


def gaussian(n: int, seed: int, shift: float = 0.0, width: int = WIDTH) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width))
    return random.normal(size=(n, width)) @ mixing + shift


def weighted_frechet(x, reference, weight_N):
    """The distance of a weighted set (covariances over n), whose derivatives are asked for."""
    weight_N = weight_N / weight_N.sum()
    mean = weight_N @ x
    return frechet.distance_of_moments(mean, ((x - mean) * weight_N[:, None]).T @ (x - mean), reference)


def weighted_score(logits, weight_N):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    weight_N = weight_N / weight_N.sum()
    marginal = weight_N @ p
    return np.exp(weight_N @ (p * np.log(p)).sum(axis=1) - (marginal * np.log(marginal)).sum())


def weighted_mmd(x, y, weight_N):
    weight_N = weight_N / weight_N.sum()
    k = kernel_distance.cubic_kernel
    return weight_N @ k(x, x) @ weight_N - 2 * weight_N @ k(x, y).mean(axis=1)


X, Y = gaussian(24, 0, 0.3), gaussian(40, 1)
TALL_AND_WIDE = {
    "fid": (lambda w: weighted_frechet(X, Y, w), lambda: frechet.influence(X, Y)),
    "fid of fewer images than features": (
        lambda w: weighted_frechet(gaussian(24, 0, 0.3, 30), gaussian(60, 1, 0.0, 30), w),
        lambda: frechet.influence(gaussian(24, 0, 0.3, 30), gaussian(60, 1, 0.0, 30)),
    ),
    "is": (
        lambda w: weighted_score(X, w),
        lambda: set_scores.inception_score_influence(X, weighted_score(X, np.ones(24))),
    ),
}


@pytest.mark.parametrize("name", TALL_AND_WIDE)
def test_the_influence_is_the_derivative_by_a_samples_weight(name):
    number, influence = TALL_AND_WIDE[name]
    step, found = 1e-2, influence().first_N
    for index in (0, 7, 23):
        more, less = np.ones(24), np.ones(24)
        more[index] += step
        less[index] -= step
        assert found[index] == pytest.approx(24 * (number(more) - number(less)) / (2 * step), rel=1e-3, abs=1e-4)
    assert found.mean() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["fid"])
def test_what_two_samples_do_together_is_the_mixed_derivative_but_for_what_either_does_alone(name):
    number, influence = TALL_AND_WIDE[name]
    found, step, chosen = influence(), 1e-2, [0, 5, 11, 20]
    assert found.rows_R.tolist() == list(range(24))
    mixed = np.zeros((4, 4))
    for i, one in enumerate(chosen):
        for j, other in enumerate(chosen):
            for a in (1, -1):
                for b in (1, -1):
                    weights = np.ones(24)
                    weights[one] += a * step
                    weights[other] += b * step
                    mixed[i, j] += a * b * number(weights) * 24**2 / (4 * step**2)
    ours = found.second_RR[np.ix_(chosen, chosen)]

    def alone(g):  # the double difference of a 2×2 block without diagonal keeps what is of pairs only
        return [g[i, j] - g[i, m] - g[k, j] + g[k, m] for i, j, k, m in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 2, 1))]

    assert alone(ours) == pytest.approx(alone(mixed), rel=2e-2, abs=1e-3)


def test_kids_influence_is_the_derivative_of_the_set_without_its_diagonal():
    together = np.zeros(24, int)
    within = kernel_distance.within(X, together)
    found = kernel_distance.influence(X, Y, within, kernel_distance.cubic_kernel)
    k_xx, k_xy = kernel_distance.cubic_kernel(X, X), kernel_distance.cubic_kernel(X, Y)
    by_hand = 2 * ((k_xx.sum(axis=1) - np.diag(k_xx)) / 23 - k_xy.mean(axis=1))
    np.testing.assert_allclose(found.first_N, by_hand - by_hand.mean(), atol=1e-9)
    np.testing.assert_allclose(found.second_RR, 2 * k_xx)


def test_pairs_come_and_go_together():
    noisy = X + 1.0 + 0.1 * np.random.default_rng(5).normal(size=X.shape)
    strata_N = np.zeros(24, int)
    of_pairs = spread(frechet.influence_of_pairs(noisy, X), strata_N).sd
    assert 0 < of_pairs < 0.3 * spread(frechet.influence(noisy, X), strata_N).sd
    assert spread(frechet.influence_of_pairs(X, X), strata_N).sd == pytest.approx(0.0, abs=1e-6)
    of_kernel = kernel_distance.influence_of_pairs(X, X, kernel_distance.cubic_kernel)
    assert spread(of_kernel, strata_N).sd == 0.0


@pytest.mark.parametrize(("n", "width"), [(80, 6), (20, 40)])
def test_the_distance_of_some_rows_is_the_libraries_also_with_fewer_images_than_features(n, width):
    generated, reference = gaussian(n, 0, 0.3, width), gaussian(200, 1, 0.0, width)
    rows = np.random.default_rng(0).integers(0, n, n)
    expected, _ = libraries.torch_fidelity_fid(torch.from_numpy(generated[rows]), torch.from_numpy(reference), 0)
    assert frechet.distance(generated, reference)(rows) == pytest.approx(expected, rel=1e-4)


def test_a_reference_of_fewer_rows_than_features_has_its_covariance_over_one_less_too():
    generated, reference = gaussian(60, 0, 0.3, 30), gaussian(12, 1, 0.0, 30)
    cov, cov_ref = np.cov(generated, rowvar=False), np.cov(reference, rowvar=False)
    size, vectors = np.linalg.eigh(cov_ref)
    root = vectors * np.sqrt(size.clip(min=0)) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov @ root).clip(min=0)).sum()
    gap = generated.mean(axis=0) - reference.mean(axis=0)
    expected = gap @ gap + np.trace(cov) + np.trace(cov_ref) - 2 * trace_root
    assert frechet.distance(generated, reference)(np.arange(60)) == pytest.approx(expected, rel=1e-5)


def test_what_samples_contribute_to_fid_is_drawn_together_only_where_there_are_more_of_them_than_features():
    for n, width, together in ((80, 6, True), (20, 20, False), (20, 40, False)):
        strata_N = np.zeros(n, int)
        whole = frechet.influence(gaussian(n, 0, 0.1, width), gaussian(200, 1, 0.0, width))
        kept = frechet.contributed(whole, width, strata_N)
        expected = spread(whole, strata_N).sd if together else spread_within(whole.first_N, strata_N).sd
        assert spread_within(kept.first_N, strata_N).sd == pytest.approx(expected)
        assert expected < 0.99 * spread_within(whole.first_N, strata_N).sd or not together


def test_the_spread_of_recall_is_that_of_torch_fidelitys_recall_without_a_quarter_times_root_three():
    """Shao & Wu's delete-d jackknife: the variance over the draws, times what is kept over what is left out."""
    x, y, strata_N = gaussian(32, 0, 0.5), gaussian(40, 1), np.arange(32) % 4
    found = set_scores.recall_spread(torch.from_numpy(x), torch.from_numpy(y), 3, strata_N, seed=5)
    random, recalls = np.random.default_rng(5), []
    for _ in range(set_scores.DRAWS):
        rows = set_scores._without_some(strata_N, random)
        assert len(rows) == 24
        recalls.append(libraries.torch_fidelity_prc(torch.from_numpy(x[rows]).float(), torch.from_numpy(y).float())[1])
    assert found.sd == pytest.approx(np.std(recalls, ddof=1) * np.sqrt(3), rel=1e-6) and found.sd > 0


def test_precision_and_recall_of_samples_are_torch_fidelitys():
    x, y = torch.from_numpy(gaussian(60, 0, 0.5)).float(), torch.from_numpy(gaussian(90, 1)).float()
    precision, recall, settings = libraries.torch_fidelity_prc(x, y)
    near_N = set_scores.near_reference(x, y, settings["neighbours"])
    assert near_N.mean() == pytest.approx(precision) and 0.05 < precision < 0.95
    contributed_N = set_scores.recall_influence(x, y, settings["neighbours"]).first_N
    without = [libraries.torch_fidelity_prc(x[[i for i in range(60) if i != out]], y)[1] for out in (0, 17, 59)]
    differences = np.diff(contributed_N[[0, 17, 59]])
    np.testing.assert_allclose(differences, -59 * np.diff(without), atol=1e-4)
    assert 0.05 < recall < 0.95 and contributed_N.std() > 0


def test_a_spread_within_strata_is_that_of_the_strata_with_one_taken_off_each():
    values_N, strata_N = np.array([1.0, 3.0, 10.0, 14.0, 12.0]), np.array([0, 0, 1, 1, 1])
    found = spread_within(values_N, strata_N)
    assert found.sd == pytest.approx(np.sqrt(2 * 2.0 + 3 * 4.0) / 5) and 1 <= found.freedom <= 3
    assert spread_within(np.array([1.0]), np.array([0])).sd == 0.0


def test_what_pairs_do_together_is_counted_once():
    """A number of pairs alone: T = Σ_{i<j} 2 x_i·x_j / n², x of mean 0 and width 20, whose variance is 40 (n − 1) / n³."""
    truth, found, without = [], [], []
    random = np.random.default_rng(2)
    for _ in range(400):
        x = random.normal(size=(40, 20))
        total = x.sum(axis=0)
        truth.append((total @ total - (x**2).sum()) / 40**2)
        first = 2 * (x @ total - (x**2).sum(axis=1)) / 40
        influence = Influence(first - first.mean(), 2 * x @ x.T, np.arange(40))
        found.append(spread(influence, np.zeros(40, int)).sd ** 2)
        without.append(spread(Influence(influence.first_N), np.zeros(40, int)).sd ** 2)
    assert np.var(truth) == pytest.approx(40 * 39 / 40**3, rel=0.3)
    assert np.mean(found) == pytest.approx(40 * 39 / 40**3, rel=0.2)
    assert np.mean(without) > 1.6 * 40 * 39 / 40**3


def test_half_of_the_variance_is_left_however_much_pairs_seem_to_do():
    random = np.random.default_rng(3)
    first, g = random.normal(size=30), 1e3 * random.normal(size=(30, 30))
    alone = spread(Influence(first), np.zeros(30, int)).sd
    together = spread(Influence(first, g + g.T, np.arange(30)), np.zeros(30, int)).sd
    assert together == pytest.approx(alone / np.sqrt(2))


@pytest.mark.parametrize("strata_N", [np.zeros(6, int), np.arange(12) % 3], ids=["one of six", "three of four"])
def test_what_pairs_do_is_estimated_without_bias_in_small_strata(strata_N):
    """g_ij = x_i·x_j with E g² = 8: Σ_{i<j} E g² / n⁴, although centring within strata takes some of it away."""
    random, n = np.random.default_rng(4), len(strata_N)
    found = []
    for _ in range(3000):
        x = random.normal(size=(n, 8)) + 5.0 * strata_N[:, None]  # neither what strata differ by is a matter of pairs
        alone = 10.0 * random.normal(size=n)  # nor what a sample does in all of its pairs
        found.append(_variance_of_pairs(x @ x.T + alone[:, None] + alone, strata_N, n))
    assert np.mean(found) == pytest.approx(n * (n - 1) / 2 * 8 / n**4, rel=0.05)


def test_the_rows_whose_pairs_are_looked_at_are_spread_over_the_labels_and_always_the_same():
    rows = rows_of_pairs(2000)
    assert len(rows) == 512 and (rows == rows_of_pairs(2000)).all() and len(set(rows.tolist())) == 512
    assert np.bincount(rows % 10).min() > 30


def test_fd_infinity_takes_off_the_bias_of_few_samples():
    reference = gaussian(4000, 1)
    values, distances = [], []
    for seed in range(40):
        generated, strata_N = gaussian(60, 100 + seed), np.zeros(60, int)
        whole = frechet.influence(generated, reference)
        values.append(frechet.infinity(generated, reference, whole, strata_N, seed).value)
        distances.append(frechet.distance(generated, reference)(np.arange(60)))
    assert np.mean(distances) > 6 * np.std(distances) / np.sqrt(40)
    assert abs(np.mean(values)) < 0.25 * np.mean(distances)
    with pytest.raises(ValueError, match="4 or more"):
        frechet.infinity(reference[:3], reference, whole, np.zeros(3, int), 0)


def test_the_choice_of_halves_adds_the_error_of_its_mean_over_splits():
    generated, reference, strata_N = gaussian(40, 0, 0.3), gaussian(200, 1), np.arange(40) % 4
    whole = frechet.influence(generated, reference)
    found = frechet.infinity(generated, reference, whole, strata_N, seed=7, splits=5)
    random, means, contributed_N = np.random.default_rng(7), [], np.zeros(40)
    for _ in range(5):
        halves = frechet.split(strata_N, random)
        means.append(np.mean([frechet.distance(generated[rows], reference)(np.arange(20)) for rows in halves]))
        for rows in halves:
            contributed_N[rows] += frechet.influence_of_rows(generated[rows], reference) / 5
    assert found.split_sd == pytest.approx(np.std(means, ddof=1) / np.sqrt(5))
    assert found.value == pytest.approx(2 * frechet.distance(generated, reference)(np.arange(40)) - np.mean(means))
    by_hand = 2 * whole.first_N - contributed_N
    np.testing.assert_allclose(found.influence.first_N, by_hand - by_hand.mean(), atol=1e-9)


def test_halves_have_half_of_each_stratum_and_share_no_row():
    strata_N = np.arange(43) % 7
    one, other = frechet.split(strata_N, np.random.default_rng(0))
    assert sorted([*one, *other]) == list(range(43)) and abs(len(one) - len(other)) <= 1
    assert np.abs(np.bincount(strata_N[one]) - np.bincount(strata_N[other])).max() <= 1
    left = set_scores._without_some(strata_N, np.random.default_rng(0))
    assert len(left) == 43 - round(43 / 4) and np.bincount(strata_N[left]).min() >= 4
