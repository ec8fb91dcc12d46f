import numpy as np
import pytest
from scipy.stats import norm, t

from ditbench.eval import statistics


def test_mean_interval_covers_the_true_mean_about_95_times_in_100():
    random = np.random.default_rng(3)
    intervals = [statistics.mean_with_ci(random.normal(2.0, 5.0, 60), seed, 200)[1] for seed in range(400)]
    covered = np.mean([low <= 2.0 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.98


@pytest.mark.parametrize(("n", "least"), [(5, 0.87), (10, 0.91)])
def test_mean_interval_of_few_samples_covers_nearly_as_often(n, least):
    random = np.random.default_rng(4)
    intervals = [statistics.mean_with_ci(random.normal(2.0, 5.0, n), seed, 400)[1] for seed in range(1000)]
    assert least <= np.mean([low <= 2.0 <= high for low, high in intervals]) <= 0.97


def test_percentiles_of_few_samples_are_those_that_give_students_interval():
    for n in (3, 8, 50):
        low, high = statistics.percentiles95(n)
        assert low + high == pytest.approx(100)
        assert -norm.ppf(low / 100) * np.sqrt((n - 1) / n) == pytest.approx(t.ppf(0.975, n - 1))
    assert statistics.percentiles95(10**6)[0] == pytest.approx(2.5, abs=1e-4)


def test_one_sample_has_no_interval():
    assert statistics.mean_with_ci(np.array([3.0]), 0, 50) == (3.0, None)


def test_mean_interval_is_as_wide_as_the_normal_theory_says():
    values = np.random.default_rng(0).normal(0.0, 1.0, 2000)
    mean, (low, high) = statistics.mean_with_ci(values, seed=0, resamples=2000)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.06)


def test_share_interval_is_wilsons_formula():
    hits, n, z = 45, 50, 1.959963984540054
    share = hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    value, interval = statistics.share_with_ci(hits, n)
    assert value == share
    assert interval == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_share_interval_of_all_hits_still_leaves_room_below():
    value, (low, high) = statistics.share_with_ci(20, 20)
    assert value == 1.0 and 0.8 < low < 0.9 and high == pytest.approx(1.0)


def test_bootstrap_of_a_mean_agrees_with_its_standard_error():
    values = np.random.default_rng(1).normal(0.0, 3.0, 500)
    value, (low, high) = statistics.bootstrap_ci(lambda rows: values[rows].mean(), 500, seed=0, resamples=1000)
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(500), rel=0.08)
    assert (high + low) / 2 == pytest.approx(value)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.arange(50.0)
    first, again, other = (statistics.mean_with_ci(values, seed, 100)[1] for seed in (7, 7, 8))
    assert first == again != other


def test_resampling_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()
    statistics.mean_with_ci(np.arange(9.0), 0, 50)
    statistics.bootstrap_ci(lambda rows: float(rows.sum()), 9, 0, 50)
    assert (np.random.get_state()[1] == before).all()


def test_the_mean_of_one_share_has_wilsons_interval():
    assert statistics.mean_of_shares_with_ci([(7, 20)])[1] == pytest.approx(statistics.share_with_ci(7, 20)[1])


def test_the_mean_of_shares_combines_their_intervals():
    (low_a, high_a), (low_b, high_b) = (statistics.share_with_ci(*each)[1] for each in ((2, 10), (15, 30)))
    value, interval = statistics.mean_of_shares_with_ci([(2, 10), (15, 30)])
    below = np.sqrt((0.2 - low_a) ** 2 + (0.5 - low_b) ** 2) / 2
    above = np.sqrt((high_a - 0.2) ** 2 + (high_b - 0.5) ** 2) / 2
    assert value == pytest.approx(0.35) and interval == pytest.approx((0.35 - below, 0.35 + above))


def test_the_mean_of_shares_keeps_a_width_at_both_ends():
    for hits, inner in ((0, 1), (10, 0)):
        value, interval = statistics.mean_of_shares_with_ci([(hits, 10)] * 6)
        assert interval[1 - inner] == pytest.approx(value) and 0.05 < abs(interval[inner] - value) < 0.15


def test_the_interval_of_a_mean_of_shares_covers_it_about_95_times_in_100():
    random, shares = np.random.default_rng(2), (0.97, 0.8, 0.4)
    draws = [[(int(random.binomial(20, share)), 20) for share in shares] for _ in range(600)]
    intervals = [statistics.mean_of_shares_with_ci(draw)[1] for draw in draws]
    assert 0.93 <= np.mean([low <= np.mean(shares) <= high for low, high in intervals]) <= 0.98
