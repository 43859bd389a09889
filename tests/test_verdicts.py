"""Statistics against published examples, closed forms, other libraries and simulation."""

import itertools

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
    verdicts.correct([c])
    assert c.corrected == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    values = [list(drug.values()) for drug in (DRUG_1, DRUG_2)]
    assert verdicts.correlation(*values) == pytest.approx(0.7951702, abs=5e-8)


def test_p_and_interval_are_scipy_s():
    generator = np.random.default_rng(0)
    a, b = generator.normal(93, 0.2, (2, 7))
    c = verdicts.compare(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(a, b)
    assert c.p == pytest.approx(expected.pvalue)
    verdicts.correct([c])
    assert c.corrected == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_only_common_seeds_count():
    c = verdicts.compare({0: 93.0, 1: 93.4, 5: 10.0}, {1: 93.1, 0: 92.9, 7: 99.0})
    assert c.seeds == [0, 1] and c.difference == pytest.approx(0.2)
    assert verdicts.compare({0: 93.0}, {0: 92.0}) is None
    assert verdicts.compare({0: 93.0, 1: 93.0}, {2: 92.0, 3: 92.0}) is None


def test_differences_that_do_not_vary():
    same = verdicts.compare({0: 93.0, 1: 93.5}, {0: 93.0, 1: 93.5})
    shifted = verdicts.compare({0: 94.0, 1: 94.5}, {0: 93.0, 1: 93.5})
    verdicts.correct([same, shifted])
    assert (same.p, same.verdict) == (1.0, "equivalent")
    assert (shifted.p, shifted.verdict) == (0.0, "better")


def test_accuracies_that_do_not_vary():
    """numpy's std() of equal values is 1e-14, not 0, for some of them."""
    constant = dict.fromkeys(range(3), 95.1)
    assert np.std(list(constant.values())) > 0
    assert verdicts.correlation(list(constant.values()), [93.0, 93.5, 93.1]) is None


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


def study(generator, n_seeds, effects, sd=0.15, level=verdicts.LEVEL):
    """Comparisons of len(effects) models with a baseline, all accuracies independent."""
    baseline = generator.normal(93, sd, n_seeds)
    models = [generator.normal(93 + effect, sd, n_seeds) for effect in effects]
    return compared(models, baseline, n_seeds, level)


def compared(models, baseline, n, level):
    """Over the first n seeds."""
    values = [dict(enumerate(each[:n])) for each in (*models, baseline)]
    comparisons = [verdicts.compare(each, values[-1]) for each in values[:-1]]
    verdicts.correct(comparisons, level)
    return comparisons


def is_alarm(c):
    return c.verdict in ("better", "worse")


def at_most(share, n):
    """Of n draws, up to two standard errors above it."""
    return n * share + 2 * (n * share * (1 - share)) ** 0.5


def test_the_verdict_is_holm_s():
    generator = np.random.default_rng(1)
    for _ in range(100):
        for c in study(generator, 5, [0, 0.2, 0.4, -0.6]):
            assert is_alarm(c) == (c.p_holm < verdicts.LEVEL)
            if is_alarm(c):
                assert c.verdict == ("better" if c.difference > 0 else "worse")
            low, high = verdicts.t_interval(c.difference, c.sd, 5, verdicts.LEVEL)
            assert c.corrected[0] <= low and high <= c.corrected[1]


def test_a_verdict_does_not_wait_for_other_models():
    """Two of four comparisons are there: as if the other two showed nothing."""
    generator = np.random.default_rng(3)
    baseline, *models = generator.normal([[93], [93.3], [93.4], [93], [93]], 0.1, (5, 6))
    early = [verdicts.compare(*map(dict, map(enumerate, (m, baseline)))) for m in models[:2]]
    nothing = [verdicts.compare(dict(enumerate(baseline)), dict(enumerate(baseline)))] * 2
    late = [verdicts.compare(*map(dict, map(enumerate, (m, baseline)))) for m in models[:2]]
    verdicts.correct(early, k=4)
    verdicts.correct([*late, *nothing])
    assert [c.p_holm for c in early] == [c.p_holm for c in late]
    assert [c.corrected for c in early] == [c.corrected for c in late]
    assert min(c.p_holm for c in early) == pytest.approx(4 * min(c.p for c in early))


@pytest.mark.slow
def test_no_difference_is_seldom_called_one():
    generator = np.random.default_rng(2)
    draws = [study(generator, 10, [0, 0, 0, 0]) for _ in range(1000)]
    assert sum(any(map(is_alarm, draw)) for draw in draws) <= at_most(0.05, 1000)


@pytest.mark.slow
def test_plans_that_are_extended_twice_raise_no_more_alarms():
    """5, then 10, then 20 seeds, until something is found: at 5%, 5% / 2, 5% / 3."""
    generator = np.random.default_rng(6)
    alarms = 0
    for _ in range(1000):
        baseline, *models = generator.normal(93, 0.15, (5, 20))
        plans = [(5, 1), (10, 2), (20, 3)]
        alarms += any(
            any(map(is_alarm, compared(models, baseline, n, verdicts.LEVEL / k))) for n, k in plans
        )
    assert alarms <= at_most(0.05 * (1 + 1 / 2 + 1 / 3), 1000)


@pytest.mark.slow
def test_equivalent_is_seldom_wrong():
    """One true difference just outside the margin, among four comparisons of 20 seeds."""
    generator = np.random.default_rng(7)
    draws = [study(generator, 20, [verdicts.MARGIN + 1e-6, 0, 0, 0]) for _ in range(1000)]
    assert sum(draw[0].verdict == "equivalent" for draw in draws) <= at_most(0.05, 1000)


@pytest.mark.slow
@pytest.mark.parametrize(("difference", "sd"), [(0.2, 0.22), (0.15, 0.2)])
def test_the_power_of_20_seeds_is_as_predicted(difference, sd):
    """Of the first of four comparisons; Holm's later ones have more."""
    generator = np.random.default_rng(8)
    effects, own_sd = [difference, 0, 0, 0], sd / 2**0.5
    draws = [study(generator, 20, effects, own_sd)[0] for _ in range(1000)]
    found = np.mean([draw.verdict == "better" for draw in draws])
    predicted = verdicts.power(difference, sd, 20, verdicts.LEVEL / 4)
    assert predicted - 0.03 <= found <= predicted + 0.06


def test_equivalent_within_the_margin():
    near = verdicts.compare({0: 93.0, 1: 93.11, 2: 93.2}, {0: 93.01, 1: 93.1, 2: 93.21})
    verdicts.correct([near])
    assert near.verdict == "equivalent" and max(map(abs, near.corrected)) < 0.3
    near.margin = 0.01
    assert near.verdict == "undecided"
    near.planned = {0, 1, 2, 3}
    assert near.verdict is None and near.is_interim


def test_the_variance_that_models_and_seeds_leave():
    """Of a complete table: what is left of each value without its row's and its column's mean."""
    generator = np.random.default_rng(10)
    table = generator.normal(93, 0.3, (4, 5))  # models, seeds
    models, seeds = (list(each) for each in zip(*np.ndindex(4, 5), strict=True))
    values = table.reshape(-1, 1)
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    variance, freedom = verdicts.residual_variance(values, models, seeds)
    assert freedom == 12 and variance == pytest.approx((left**2).sum() / 12)
    differences = [a - b for a, b in itertools.combinations(table, 2)]
    assert 2 * variance == pytest.approx(np.mean(np.var(differences, axis=1, ddof=1)))
    variance, freedom = verdicts.residual_variance(values, models)
    assert freedom == 16 and variance == pytest.approx(np.mean(table.var(1, ddof=1)))
    # Without two of the runs, by the pseudo-inverse: a column for each model and seed but one.
    kept = [k for k in range(20) if k not in (7, 11)]
    design = np.array([
        [1, *(models[k] == m for m in (1, 2, 3)), *(seeds[k] == s for s in (1, 2, 3, 4))]
        for k in kept
    ], float)  # fmt: skip
    left = values[kept] - design @ np.linalg.pinv(design) @ values[kept]
    own = [models[k] for k in kept], [seeds[k] for k in kept]
    variance, freedom = verdicts.residual_variance(values[kept], *own)
    assert freedom == 10 and variance == pytest.approx((left**2).sum() / 10)


def test_the_interval_of_a_standard_deviation_covers_it():
    """The models share a baseline, and their pairs share seeds: 95%, to two standard errors."""
    generator = np.random.default_rng(11)
    models, seeds = (list(each) for each in zip(*np.ndindex(5, 4), strict=True))
    covered = 0
    for _ in range(1000):
        table = generator.normal(0, 0.15, (5, 4)) + generator.normal(0, 0.3, 4)
        variance, freedom = verdicts.residual_variance(table.reshape(-1, 1), models, seeds)
        low, high = verdicts.sd_interval(float(variance[0]) ** 0.5, freedom)
        covered += low < 0.15 < high
    assert 950 - 14 <= covered <= 950 + 14


def test_the_share_of_test_images_is_binomial():
    """Images that are right with chance p, independently: a variance of p (1 - p) / N."""
    generator = np.random.default_rng(9)
    right = 1.0 * (generator.random((50, 20_000)) < 0.9)
    variance, _ = verdicts.residual_variance(right, [0] * 50)
    assert variance.sum() / 20_000 == pytest.approx(0.9 * 0.1, rel=0.02)


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
