"""Statistics against published examples, closed forms, other libraries and simulation."""

from kit import verdicts

import numpy as np
import pytest
from scipy import stats

# Student (1908), extra hours of sleep with two drugs, ten patients: the `sleep` data of R.
DRUG_1 = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
DRUG_2 = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))


def test_student_s_own_example():
    c = verdicts.compare(DRUG_2, DRUG_1)
    assert c.difference == pytest.approx(1.58) and c.seeds == list(range(10))
    assert c.p == pytest.approx(0.002833, abs=5e-7)  # R: t.test(..., paired = TRUE)
    assert c.interval == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert c.p_welch == pytest.approx(0.07939, abs=5e-6)  # R: t.test(extra ~ group)
    assert c.correlation == pytest.approx(0.7951702, abs=5e-8)


def test_p_and_interval_are_scipy_s():
    generator = np.random.default_rng(0)
    a, b = generator.normal(93, 0.2, (2, 7))
    c = verdicts.compare(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(a, b)
    assert c.p == pytest.approx(expected.pvalue)
    assert c.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert c.prob_better == pytest.approx(np.mean(pairs))


def test_only_common_seeds_count():
    c = verdicts.compare({0: 93.0, 1: 93.4, 5: 10.0}, {1: 93.1, 0: 92.9, 7: 99.0})
    assert c.seeds == [0, 1] and c.difference == pytest.approx(0.2)
    assert verdicts.compare({0: 93.0}, {0: 92.0}) is None
    assert verdicts.compare({0: 93.0, 1: 93.0}, {2: 92.0, 3: 92.0}) is None


def test_differences_that_do_not_vary():
    same = verdicts.compare({0: 93.0, 1: 93.5}, {0: 93.0, 1: 93.5})
    shifted = verdicts.compare({0: 94.0, 1: 94.5}, {0: 93.0, 1: 93.5})
    verdicts.correct([same, shifted])
    assert (same.p, same.verdict) == (1.0, "not distinguishable")
    assert (shifted.p, shifted.verdict) == (0.0, "better")


def test_accuracies_that_do_not_vary():
    """numpy's std() of equal values is 1e-14, not 0, for some of them."""
    constant = dict.fromkeys(range(3), 95.1)
    assert np.std(list(constant.values())) > 0
    c = verdicts.compare(constant, {0: 93.0, 1: 93.5, 2: 93.1})
    assert (c.p_welch, c.correlation) == (None, None)


def test_holm_on_a_textbook_example():
    assert verdicts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert verdicts.holm([0.5, 0.9]) == [1.0, 1.0]
    assert verdicts.holm([]) == []


def test_values_of_statsmodels():
    p_values = [0.0004, 0.0121, 0.0095, 0.2, 0.0121, 0.64]
    # statsmodels 0.15.0: multipletests(p_values, method="holm"), TTestPower().power, .solve_power
    assert verdicts.holm(p_values) == pytest.approx([0.0024, 0.0484, 0.0475, 0.4, 0.0484, 0.64])
    assert verdicts.power(0.9428, 1, 10) == pytest.approx(0.7560511184)
    assert verdicts.power(1.5, 1, 5, 0.05 / 3) == pytest.approx(0.4271613863)
    assert verdicts.power(-0.5, 1, 20, 0.0125) == pytest.approx(0.3288738627)
    assert verdicts.detectable_difference(1, 5, 0.05 / 4) == pytest.approx(2.47679, abs=1e-5)


def study(generator, n_seeds, effects, sd=0.15):
    """Comparisons of len(effects) models with a baseline, all accuracies independent."""
    baseline = dict(enumerate(generator.normal(93, sd, n_seeds)))
    comparisons = [
        verdicts.compare(dict(enumerate(generator.normal(93 + effect, sd, n_seeds))), baseline)
        for effect in effects
    ]
    verdicts.correct(comparisons)
    return comparisons


def test_the_verdict_is_holm_s():
    generator = np.random.default_rng(1)
    for _ in range(100):
        for c in study(generator, 5, [0, 0.2, 0.4, -0.6]):
            assert (c.verdict != "not distinguishable") == (c.p_holm < verdicts.LEVEL)
            assert c.verdict in ("not distinguishable", "better" if c.difference > 0 else "worse")
            assert c.corrected[0] <= c.interval[0] and c.interval[1] <= c.corrected[1]


def test_no_difference_is_seldom_called_one():
    generator = np.random.default_rng(2)
    draws = [study(generator, 5, [0, 0, 0]) for _ in range(500)]
    alarms = sum(any(c.verdict != "not distinguishable" for c in draw) for draw in draws)
    assert alarms <= 500 * 0.05 + 2 * (500 * 0.05 * 0.95) ** 0.5


def test_a_difference_of_half_a_point_is_found():
    generator = np.random.default_rng(3)
    found = sum(study(generator, 5, [0.5, 0, 0])[0].verdict == "better" for _ in range(500))
    assert found >= 0.8 * 500


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_are_the_textbook_s(effect, pairs):
    assert verdicts.seeds_needed(effect, sd=1.0) == pairs  # G*Power: means, matched pairs


def test_the_detectable_difference_is_detected_by_power():
    difference = verdicts.detectable_difference(sd=0.2, n=5)
    assert verdicts.power(difference, sd=0.2, n=5) == pytest.approx(0.8, abs=1e-6)
    generator = np.random.default_rng(4)
    samples = generator.normal(difference, 0.2, (4000, 5))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.02
    )


def test_bootstrap_covers_what_it_should():
    generator = np.random.default_rng(5)
    model = generator.random((10, 2000)) < 0.95
    baseline = generator.random((10, 2000)) < 0.93
    low, high = verdicts.bootstrap(model, baseline)
    difference = 100 * (model.mean() - baseline.mean())
    # Independent images: the standard error of the mean over 10 x 2,000 of them, in points.
    error = 100 * (model.astype(float) - baseline).std() / 20_000**0.5
    assert low < difference < high
    assert 3.0 * error < high - low < 6.5 * error
    assert verdicts.bootstrap(model, baseline) == (low, high)  # seeded
    assert verdicts.bootstrap(model, model) == (0, 0)
