"""Two runs compared over seeds: held against scipy and simulation."""

import numpy as np
import pytest
from scipy import stats

from ditbench.eval.base import PerSample
from ditbench.eval.paired_differences import Difference, differences, holm
from ditbench.eval.seed_differences import (
    OF_THE_SAMPLES,
    OVER_SEEDS,
    differences_over_seeds,
    is_positive,
    logarithm,
    logarithms_over_seeds,
    mean_over_seeds,
    of_the_ratio,
    usual_variance,
)


def over_seeds(differences_S):
    return differences_over_seeds([differences_S])[0]


def of_seed(value, error, n=100):
    return Difference(value, (value - 1.959964 * error, value + 1.959964 * error), 0.5, n, "", "")


def test_three_seeds_are_tested_by_students_t_over_the_seeds():
    found = over_seeds([of_seed(x, 0.01) for x in (1.0, 1.4, 1.5)])
    expected = stats.ttest_1samp([1.0, 1.4, 1.5], 0.0)
    assert found.p == pytest.approx(expected.pvalue) and found.ci95 == pytest.approx(
        tuple(expected.confidence_interval())
    )
    assert found.test == OVER_SEEDS and found.n == 300


def test_seeds_that_agree_by_chance_prove_no_more_than_their_samples_do():
    found = over_seeds([of_seed(x, 0.6) for x in (1.0, 1.001, 1.0)])
    low, high = found.ci95
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * 0.6 / 3**0.5, rel=1e-3) and found.p > 0.05


def test_two_seeds_say_nothing_of_another_one_and_their_interval_is_of_their_samples():
    for values in ((1.0, 1.0), (1.0, 3.0)):
        found = mean_over_seeds(values, [0.3, 0.4])
        low, high = found.ci95
        assert (high - low) / 2 == pytest.approx(1.96 * 0.25, rel=1e-3) and found.method == OF_THE_SAMPLES


def test_the_usual_variance_is_found_again():
    random = np.random.default_rng(4)
    true_C = 0.25 * 3 / random.chisquare(3, 20_000)  # scaled inverse chi-squared: s₀² = 0.25, d₀ = 3
    variance, freedom = usual_variance(true_C * random.chisquare(2, 20_000) / 2, 2)
    assert variance == pytest.approx(0.25, rel=0.05) and freedom == pytest.approx(3, rel=0.1)
    assert usual_variance(0.25 * random.chisquare(2, 20_000) / 2, 2)[1] == 4.0, "never for more, however alike they are"


@pytest.mark.parametrize("unlike", [0.0, 1.0])
def test_one_false_alarm_in_fifteen_families_at_most_over_three_seeds(unlike):
    """Eight runs that are equally good, and unequally steady over the seeds; nothing is known of the samples."""
    random, alarms, families = np.random.default_rng(5), 0, 400
    for _ in range(families):
        values_RS = random.normal(0, np.exp(random.normal(0, unlike, (8, 1))), (8, 3))
        pairs = [values_RS[i] - values_RS[j] for i in range(8) for j in range(i)]
        alarms += (
            min(holm([d.p for d in differences_over_seeds([[of_seed(x, 0) for x in pair] for pair in pairs])])) < 0.05
        )
    assert alarms / families < 0.075


def test_three_seeds_tell_ten_decibels_from_a_spread_of_half_a_decibel():
    """Sixteen runs, 120 comparisons: on two degrees of freedom Holm would ask for 49 standard errors."""
    random = np.random.default_rng(6)
    values_RS = 10.0 * np.arange(16)[:, None] + random.normal(0, 0.5, (16, 3))
    pairs = [values_RS[i] - values_RS[j] for i in range(16) for j in range(i)]
    found = differences_over_seeds([[of_seed(x, 0.1) for x in pair] for pair in pairs])
    assert max(holm([difference.p for difference in found])) < 0.05


def test_the_logarithm_of_a_number_has_its_relative_spread():
    """Small relative spread, where the delta method is exact: mean log m, each sample its share of m."""
    run = PerSample(np.array([19.0, 20.0, 22.0, 19.0]), pseudo=True)
    assert (
        is_positive(run)
        and not is_positive(PerSample(run.values_N))
        and not is_positive(PerSample(-run.values_N, pseudo=True))
    )
    assert logarithm(run).values_N == pytest.approx(np.log(20.0) + np.array([-0.05, 0.0, 0.1, -0.05]))
    assert logarithm(run).pseudo


def test_paired_logarithms_are_the_logarithm_of_the_ratio():
    """Both runs share their noise: a ratio that is the same for each sample has no spread."""
    run = PerSample(np.array([19.0, 20.0, 22.0, 19.0]), pseudo=True)
    twice = PerSample(2 * run.values_N, pseudo=True)
    (found,) = differences([(logarithm(twice), logarithm(run))])
    assert found.value == pytest.approx(np.log(2.0)) and np.ptp(found.ci95) == pytest.approx(0, abs=1e-9)


def test_the_interval_of_a_positive_number_over_seeds_is_students_of_its_logarithm_carried_back():
    values_S = [1341.0, 1415.0, 1154.0]
    mean, (low, high) = logarithms_over_seeds(values_S, [(value * 0.99, value * 1.01) for value in values_S])
    expected = np.exp(stats.t.interval(0.95, 2, loc=np.log(values_S).mean(), scale=stats.sem(np.log(values_S))))
    assert (low, high) == pytest.approx(tuple(expected)) and mean.method == OVER_SEEDS
    _, (low, high) = logarithms_over_seeds([20.0, 20.0, 20.0], [(19.0, 20.0**2 / 19.0)] * 3)
    assert (
        high / 20
        == pytest.approx(20 / low)
        == pytest.approx((20 / 19) ** (stats.t.ppf(0.975, 2) / 1.96 / 3**0.5), rel=1e-4)
    )


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6])
def test_that_interval_is_positive_holds_the_mean_and_covers_where_the_numbers_own_does_not(spread):
    random, covered, plainly, draws = np.random.default_rng(7), 0, 0, 3000
    expected = 20 * np.exp(spread**2 / 2)
    for _ in range(draws):
        values_S = 20 * np.exp(spread * random.normal(size=5))
        _, (low, high) = logarithms_over_seeds(values_S, [(value, value) for value in values_S])
        assert 0 < low <= values_S.mean() <= high
        covered += low <= expected <= high
        low, high = mean_over_seeds(values_S, [0.0] * 5).ci95
        plainly += low <= expected <= high
    assert covered / draws > 0.91 and covered >= plainly
    assert (plainly / draws < 0.91) == (spread > 0.5)


def test_the_interval_of_a_difference_holds_zero_just_where_its_test_does_not_tell_two_apart():
    random = np.random.default_rng(8)
    for _ in range(200):
        first_S, second_S = 20 * np.exp(random.normal([[0.5], [0.0]], 0.25, (2, 3)))
        plain = over_seeds([of_seed(one - other, 0) for one, other in zip(first_S, second_S, strict=True)])
        logs = over_seeds([of_seed(x, 0) for x in np.log(first_S / second_S)])
        back = over_seeds([of_seed(x, 0) for x in np.log(second_S / first_S)])
        means = float(first_S.mean()), float(second_S.mean())
        found = of_the_ratio(plain, logs, *means)
        low, high = found.ci95
        assert (low > 0 or high < 0) == (found.p < 0.05) and found.p == logs.p
        assert low < found.value == plain.value < high
        turned = over_seeds([of_seed(other - one, 0) for one, other in zip(first_S, second_S, strict=True)])
        assert of_the_ratio(turned, back, *means[::-1]).ci95 == pytest.approx((-high, -low))


def test_an_end_of_that_interval_is_the_difference_of_two_numbers_with_its_ratio_the_smaller_held():
    logs = Difference(np.log(2.0), (np.log(1.5), np.log(3.0)), 0.01, 3, "t", "t", 2.0)
    found = of_the_ratio(of_seed(10.0, 1.0), logs, 20.0, 10.0)
    assert found.ci95 == pytest.approx((5.0, 20.0)) and found.freedom == 2.0 and found.ci_method == "t, of logarithms"


def test_the_interval_of_a_difference_of_two_that_are_far_apart_is_as_wide_as_the_larger_ones_own():
    random, covered, draws = np.random.default_rng(9), 0, 1000
    for _ in range(draws):
        first_S, second_S = np.array([[1300.0], [20.0]]) * np.exp(0.15 * random.normal(size=(2, 3)))
        logs = over_seeds([of_seed(x, 0) for x in np.log(first_S / second_S)])
        low, high = of_the_ratio(of_seed(0.0, 1.0), logs, first_S.mean(), second_S.mean()).ci95
        covered += low <= 1280 * np.exp(0.15**2 / 2) <= high
    assert covered / draws > 0.94


def test_a_difference_keeps_its_own_test_where_the_logarithms_say_that_the_other_run_is_better():
    """Four seeds at 10 and 27, one at 1,105 and 1,000: the mean of the first is larger, that of its logarithms smaller."""
    first_S, second_S = np.array([10.0, 10.1, 9.9, 10.0, 1105.0]), np.array([27.0, 27.2, 26.8, 27.0, 1000.0])
    plain = over_seeds([of_seed(x, 0) for x in first_S - second_S])
    logs = over_seeds([of_seed(x, 0) for x in np.log(first_S / second_S)])
    assert plain.value > 0 > logs.value and logs.p < 0.05 < plain.p
    assert of_the_ratio(plain, logs, first_S.mean(), second_S.mean()) == plain
