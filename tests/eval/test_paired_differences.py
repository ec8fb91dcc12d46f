"""Paired tests against hand counts, scipy and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ditbench.eval import paired_differences
from ditbench.eval.base import PerSample


def numbers(*values):
    return PerSample(np.array(values, float))


def outcomes(text, strata=None):
    """ "yyn-": yes, yes, no, does not count."""
    values_N = np.array([{"y": 1.0, "n": 0.0, "-": np.nan}[letter] for letter in text])
    return PerSample(values_N, yes_no=True, strata_N=None if strata is None else np.array(strata))


def one(first, second):
    (difference,) = paired_differences.differences([(first, second)])
    return difference


def test_the_sign_test_counts_binomial_tails():
    assert paired_differences.sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert paired_differences.sign_test(2, 8) == paired_differences.sign_test(8, 2)
    assert paired_differences.sign_test(0, 0) == 1.0


def test_yes_no_outcomes_get_mcnemars_exact_test_whose_concordant_pairs_do_not_count():
    found = one(outcomes("yyyyyy" + "n" + "yyyy" + "nnn"), outcomes("nnnnnn" + "y" + "yyyy" + "nnn"))
    assert found.value == pytest.approx(5 / 14) and found.n == 14
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7)
    assert (found.test, found.ci_method) == (paired_differences.SIGN_TEST, paired_differences.AGRESTI_MIN)


def test_few_sign_flips_are_all_counted():
    assert paired_differences.sign_flip_p(np.array([[1.0, 2.0, 3.0]]))[0] == 2 / 8  # only +++ and −−− reach 6
    assert (
        paired_differences.sign_flip_p(np.array([[1.0, 2.0, -3.0, 0.0]]))[0] == 1.0
    )  # the sum is 0, as near as it gets
    assert paired_differences.sign_flip_p(np.array([[3.0, 2.0, -1.0]]))[0] == 4 / 8  # ±6 and ±4


def test_sign_flips_of_a_few_agree_with_scipys_exact_permutation_test():
    delta_N = np.random.default_rng(4).normal(0.4, 1.0, 11)
    expected = stats.permutation_test(
        (delta_N,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    assert paired_differences.sign_flip_p(delta_N[None])[0] == pytest.approx(expected.pvalue, abs=1e-12)


def test_many_random_sign_flips_agree_with_scipys_and_their_p_is_never_zero():
    random = np.random.default_rng(5)
    delta_PN = np.stack([random.normal(shift, 1.0, 120) for shift in (0.0, 0.1, 0.2, 3.0)])
    ours = paired_differences.sign_flip_p(delta_PN, seed=1)
    for p, delta_N in zip(ours[:3], delta_PN[:3], strict=True):
        expected = stats.permutation_test(
            (delta_N,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", vectorized=True,
            n_resamples=9999, rng=np.random.default_rng(0),
        ).pvalue  # fmt: skip
        assert p == pytest.approx(expected, abs=0.02)
    assert ours[3] == 1 / (paired_differences.FLIPS + 1)


def test_p_is_uniform_when_nothing_differs():
    random = np.random.default_rng(6)
    p_P = paired_differences.sign_flip_p(random.normal(0.0, 1.0, (400, 40)), seed=2)
    assert 0.02 <= (p_P < 0.05).mean() <= 0.08 and 0.42 <= (p_P < 0.5).mean() <= 0.58


def test_numbers_get_their_mean_difference_with_students_interval_of_the_pairs():
    random = np.random.default_rng(7)
    prompt_N = random.normal(25.0, 10.0, 300)  # what both share, and what makes either's own interval wide
    first, second = prompt_N + 0.5 + random.normal(0, 1, 300), prompt_N + random.normal(0, 1, 300)
    found = one(numbers(*first), numbers(*second))
    delta_N = first - second
    half = 1.96 * delta_N.std(ddof=1) / np.sqrt(300)
    assert found.value == pytest.approx(delta_N.mean())
    assert found.ci95 == pytest.approx((found.value - half, found.value + half), abs=0.15 * half)
    assert found.p < 0.001 and (found.test, found.ci_method) == (
        paired_differences.FLIP_TEST,
        paired_differences.PAIRED_STUDENT,
    )
    assert stats.ttest_ind(first, second).pvalue > 0.1  # unpaired, nothing could be told


def test_which_comes_first_only_turns_the_sign():
    first, second = numbers(*np.arange(30.0)), numbers(*np.arange(30.0)[::-1] * 0.7)
    there, back = one(first, second), one(second, first)
    assert there.p == back.p and there.value == -back.value
    assert there.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]))


def test_samples_that_do_not_count_take_no_part():
    found = one(outcomes("y-y-ny"), outcomes("n-y-yn"))
    assert found.n == 4 and found.value == pytest.approx(1 / 4)
    without = one(numbers(5, np.nan, 7, 9), numbers(4, np.nan, 4, 1))
    assert without.n == 3 and without.value == pytest.approx(4.0) and without.p == 2 / 8
    assert without.ci95 == pytest.approx(stats.ttest_1samp([1.0, 3.0, 8.0], 0).confidence_interval(), rel=0.6)


def test_an_interval_is_of_the_samples_that_count_alone():
    nothing = [np.nan] * 58
    found = one(numbers(5, 7, *nothing), numbers(0, 0, *nothing))
    half = stats.t.ppf(0.975, 1) * np.sqrt(2) / np.sqrt(2)
    assert found.n == 2 and found.ci95 == pytest.approx((6.0 - half, 6.0 + half))


def test_one_pair_puts_no_limits_to_the_difference():
    found = one(numbers(5), numbers(2))
    assert (found.value, found.ci95, found.p) == (3.0, (-np.inf, np.inf), 1.0)


def test_pairs_of_runs_with_other_samples_missing_have_each_their_own_interval():
    nan, random = np.nan, np.random.default_rng(3)
    first = [numbers(*random.normal(size=20)) for _ in range(3)]
    second = [numbers(*random.normal(size=19), nan), numbers(nan, *random.normal(size=19)), numbers(*[0.0] * 20)]
    together = paired_differences.differences(list(zip(first, second, strict=True)))
    assert [each.ci95 for each in together] == [one(*pair).ci95 for pair in zip(first, second, strict=True)]


def test_agresti_and_mins_interval_is_their_formula_and_has_a_width_where_runs_agree():
    middle, half = 7 / 52, 1.959963984540054 * np.sqrt(14 - 49 / 52) / 52
    assert paired_differences.agresti_min(10, 3, 50) == pytest.approx((middle - half, middle + half))
    low, high = paired_differences.agresti_min(0, 0, 50)
    assert low == -high and high == pytest.approx(1.959963984540054 / 52)
    assert paired_differences.agresti_min(20, 0, 20)[1] == 1.0 and one(outcomes("yy"), outcomes("yy")).p == 1.0


def test_agresti_and_mins_interval_covers_the_true_difference():
    random = np.random.default_rng(8)
    counts = random.multinomial(40, [0.2, 0.08, 0.72], size=1000)
    covered = [low <= 0.12 <= high for low, high in (paired_differences.agresti_min(a, b, 40) for a, b, _ in counts)]
    assert 0.93 <= np.mean(covered) <= 0.98


def test_a_mean_of_categories_is_compared_as_one():
    strata = [0, 0, 0, 0, 0, 0, 1, 1]
    found = one(outcomes("yyyynnnn", strata), outcomes("nnnnnnyn", strata))
    assert found.value == pytest.approx((4 / 6 - 1 / 2) / 2)
    # Weights of the pairs that differ: 1/12 four times, 3/12 once. No swap brings ±1 ±1 ±1 ±1 ±3 nearer to 0 than 1.
    assert found.p == 1.0 and (found.test, found.ci_method) == (
        paired_differences.FLIP_TEST,
        paired_differences.AGRESTI_MIN_OF_GROUPS,
    )
    (low_0, high_0), (low_1, high_1) = paired_differences.agresti_min(4, 0, 6), paired_differences.agresti_min(0, 1, 2)
    below, above = np.hypot(4 / 6 - low_0, -1 / 2 - low_1) / 2, np.hypot(high_0 - 4 / 6, high_1 + 1 / 2) / 2
    assert found.ci95 == pytest.approx((1 / 12 - below, 1 / 12 + above))


def test_outcomes_without_categories_would_get_the_same_p_from_sign_flips():
    delta_N = np.array([1.0] * 7 + [-1.0] * 3)
    assert paired_differences.sign_flip_p(delta_N[None])[0] == pytest.approx(paired_differences.sign_test(7, 3))


def test_holms_adjustment_by_hand():
    assert paired_differences.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired_differences.holm([0.5, 0.9]) == [1.0, 1.0] and paired_differences.holm([]) == []


def test_runs_of_different_sizes_do_not_pair():
    with pytest.raises(ValueError, match="3 and 2 samples do not pair"):
        one(numbers(1, 2, 3), numbers(1, 2))


def test_the_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()
    one(numbers(*range(40)), numbers(*range(1, 41)))
    assert (np.random.get_state()[1] == before).all()


def balanced(*values, pseudo=False):
    return PerSample(np.array(values, float), pseudo=pseudo, design_N=np.arange(len(values)) % 4)


def test_what_labels_differ_by_neither_widens_the_interval_nor_hides_a_difference_when_they_are_balanced():
    random = np.random.default_rng(9)
    delta_N = 5.0 * (np.arange(80) % 4 - 1.5) + 0.5 + random.normal(0.0, 1.0, 80)
    found, blind = one(balanced(*delta_N), balanced(*[0.0] * 80)), one(numbers(*delta_N), numbers(*[0.0] * 80))
    assert found.value == blind.value == pytest.approx(delta_N.mean())
    assert found.ci95[1] - found.ci95[0] < 0.3 * (blind.ci95[1] - blind.ci95[0])
    assert found.p < 0.01 and blind.p > 0.2 and found.ci95[0] > 0


def test_p_is_uniform_when_nothing_differs_but_the_labels():
    random = np.random.default_rng(10)
    pairs = [
        (balanced(*(3.0 * (np.arange(40) % 4 - 1.5) + random.normal(0, 1, 40))), balanced(*[0.0] * 40))
        for _ in range(400)
    ]
    p_P = np.array([each.p for each in paired_differences.differences(pairs)])
    assert 0.02 <= (p_P < 0.05).mean() <= 0.08


def test_differences_are_centred_within_labels_and_widened_by_what_centring_takes_before_signs_are_flipped():
    delta_N, label_N = np.array([-2.0, 1.4, -1.7, 2.4, -1.1, 2.2, -0.1, 3.0]), np.arange(8) % 2
    moved_N = [(delta_N[i] - delta_N[label_N == label_N[i]].mean()) * np.sqrt(4 / 3) + delta_N.mean() for i in range(8)]
    sums = [abs(np.dot(signs, moved_N)) for signs in itertools.product((1, -1), repeat=8)]
    ours, theirs = (PerSample(values_N, design_N=label_N) for values_N in (delta_N, np.zeros(8)))
    assert one(ours, theirs).p == np.mean([each >= abs(sum(moved_N)) - 1e-9 for each in sums]) == 0.125


def test_numbers_of_the_whole_set_are_compared_by_students_t_of_what_each_sample_contributes():
    random = np.random.default_rng(11)
    first, second = 7.0 + random.normal(0, 1, 60), 6.6 + random.normal(0, 1, 60)
    found = one(PerSample(first, pseudo=True), PerSample(second, pseudo=True))
    expected = stats.ttest_rel(first, second)
    assert found.p == pytest.approx(expected.pvalue, rel=0.2) and found.test == paired_differences.T_TEST
    assert found.value == pytest.approx(first.mean() - second.mean())
    same = one(PerSample(first, pseudo=True), PerSample(first, pseudo=True))
    assert (same.value, same.p, same.ci95) == (0.0, 1.0, (0.0, 0.0))


def test_numbers_of_the_set_to_which_no_sample_contributes_are_not_told_apart():
    """Recall of few samples: without any one of them others cover what it covered. That says nothing of other samples."""
    found = paired_differences.differences(
        [(PerSample(np.full(24, 0.9), pseudo=True), PerSample(np.ones(24), pseudo=True))]
    )[0]
    assert found.value == pytest.approx(-0.1) and found.p == 1.0 and found.ci95 == (-np.inf, np.inf)
    same = paired_differences.differences([(PerSample(np.ones(24), pseudo=True), PerSample(np.ones(24), pseudo=True))])[
        0
    ]
    assert same.p == 1.0 and same.ci95 == (0.0, 0.0)
