import numpy as np
import pytest
from scipy.stats import t

from ditbench.eval import statistics
from ditbench.eval.influence import Spread


@pytest.mark.parametrize(("n", "least"), [(3, 0.93), (10, 0.93), (60, 0.93)])
def test_mean_interval_covers_the_true_mean_about_95_times_in_100(n, least):
    random = np.random.default_rng(3)
    intervals = [statistics.mean_with_ci(random.normal(2.0, 5.0, n))[1] for _ in range(1000)]
    assert least <= np.mean([low <= 2.0 <= high for low, high in intervals]) <= 0.98


def test_mean_interval_of_a_few_values_in_the_tails_is_wider_than_students_of_n():
    values_N = np.array([0.0] * 38 + [1.0, -1.0])
    mean, (low, high) = statistics.mean_with_ci(values_N)
    usual = t.ppf(0.975, 39) * values_N.std(ddof=1) / np.sqrt(40)
    assert mean == 0.0 and high == -low and 1.02 * usual < high < 1.5 * usual


def test_what_strata_differ_by_does_not_widen_the_interval_of_a_balanced_mean():
    random, strata_N = np.random.default_rng(0), np.arange(60) % 10
    values_N = 100.0 * strata_N + random.normal(0.0, 1.0, 60)
    _, (low, high) = statistics.mean_with_ci(values_N, strata_N)
    assert high - low == pytest.approx(2 * t.ppf(0.975, 50) / np.sqrt(60), rel=0.25)
    _, (low, high) = statistics.mean_with_ci(values_N)
    assert high - low > 100


def test_one_sample_has_no_interval():
    assert statistics.mean_with_ci(np.array([3.0])) == (3.0, None)


def test_a_share_that_labels_explain_has_a_narrower_interval_when_labels_are_balanced():
    strata_N = np.arange(400) % 4
    found_N = np.random.default_rng(0).random(400) < np.array([0.02, 0.98, 0.98, 0.02])[strata_N]
    share, (low, high) = statistics.share_by_design(found_N, strata_N)
    plain_low, plain_high = statistics.share_with_ci(int(found_N.sum()), 400)[1]
    assert share == found_N.mean() and plain_low < low < share < high < plain_high
    assert high - low < 0.5 * (plain_high - plain_low)
    assert statistics.share_by_design(found_N, np.zeros(400, int))[1] == (plain_low, plain_high)


def test_a_share_of_balanced_labels_has_wilsons_interval_of_as_many_samples_as_it_is_worth():
    strata_N = np.arange(60) % 3
    found_N = np.isin(np.arange(60), [*range(0, 60, 3), *range(1, 31, 3), 5, 8])  # 20, 10 and 2 of 20 each
    share, found = statistics.share_by_design(found_N, strata_N)
    within = sum(20 * np.var(found_N[strata_N == k], ddof=1) for k in range(3)) / 60**2
    effect = within / (share * (1 - share) / 60) + np.sqrt(2 / 57) / 2
    n, z = 60 / effect, 1.959963984540054
    assert n > 80 and n != round(n)
    middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert found == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))


def test_a_share_of_few_samples_that_agree_within_strata_by_chance_keeps_a_width():
    found_N, strata_N = np.array([1, 1, 0, 0, 1, 1, 0, 0], bool), np.repeat(np.arange(4), 2)
    _, (low, high) = statistics.share_by_design(found_N, strata_N)
    assert high - low > 0.35


def test_the_interval_on_the_logarithm_stays_above_zero_and_is_students_where_the_spread_is_small():
    low, high = statistics.student_of_log(5.0, Spread(4.0, 20.0))
    assert 0 < low < 5.0 < high and high - 5.0 > 5.0 - low
    assert statistics.student_of_log(5.0, Spread(0.001, 20.0)) == pytest.approx(
        statistics.student(5.0, Spread(0.001, 20.0)), abs=1e-6
    )
    for value in (-1.0, 1e-7):  # a logarithm that moves by millions
        assert statistics.student_of_log(value, Spread(0.5, 20.0)) == statistics.student(value, Spread(0.5, 20.0))


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
