"""Is a difference real? Statistics over paired seeds, and the verdicts that follow from them.

A seed fixes the split, the image order and the backbone's initial weights for all models. So models
are compared seed by seed: a paired t test with Holm's correction over all comparisons of a study.
The test was chosen before seeing any results, and the number of seeds is planned (RUNS/plan.json):
no verdict until all of them have finished, and only they are compared. If more are planned later,
the level is 5% / 2, then 5% / 3.
"""

import bisect
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # family-wise error rate over all comparisons of a study
POWER = 0.8
MARGIN = 0.3  # points of test accuracy: smaller differences count as equivalent
VERDICTS = ("better", "worse", "equivalent", "undecided")


@dataclass
class Comparison:
    """A model against a reference, say the baseline, over their common seeds; in percent."""

    seeds: list[int]
    accuracy: float  # the model's mean over these seeds
    reference: float  # the reference's
    differences: list[float]  # model - reference, per seed
    difference: float  # mean of them
    sd: float  # their sample standard deviation (n - 1), at least one step
    p: float  # paired t test, two-sided
    p_holm: float = float("nan")  # corrected over all comparisons of the study
    corrected: tuple[float, float] = (float("nan"), float("nan"))  # confidence interval, likewise
    margin: float = MARGIN
    planned: set[int] = field(default_factory=set)  # for both, or for the one with a plan
    unlike: list[str] = field(default_factory=list)  # other differences within its pairs, in words

    @property
    def is_interim(self) -> bool:
        return not self.planned <= {*self.seeds}

    @property
    def verdict(self) -> str | None:
        """One of VERDICTS, from the corrected interval; None until all planned seeds finish."""
        low, high = self.corrected
        if self.is_interim:
            return None
        if low > 0 or high < 0:
            return "better" if low > 0 else "worse"
        return "equivalent" if max(-low, high) < self.margin else "undecided"


def compare(
    model: dict[int, float], reference: dict[int, float], step: float = 0.0
) -> Comparison | None:
    """Compares {seed: accuracy} of both; None with fewer than two common seeds.

    step: the resolution of accuracies, one test image in points. Differences that agree more
    closely do so by chance, so their standard deviation is taken to be at least `step`.
    """
    seeds = sorted(model.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    a, b = (np.array([values[seed] for seed in seeds]) for values in (model, reference))
    differences = a - b
    mean, sd = float(differences.mean()), max(step, float(differences.std(ddof=1)))
    error = sd / len(seeds) ** 0.5  # of the mean; 0 only if all differences are equal
    p = float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1) if error else mean == 0)
    means = float(a.mean()), float(b.mean())
    return Comparison(seeds, *means, differences.tolist(), mean, sd, p)


def t_interval(mean: float, sd: float, n: int, level: float) -> tuple[float, float]:
    """Confidence interval of the mean; coverage: 1 - level."""
    half = float(stats.t.isf(level / 2, n - 1)) * sd / n**0.5
    return mean - half, mean + half


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) adjusted p: the i-th smallest times (k - i + 1), made non-decreasing."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def correct(comparisons: list[Comparison], level: float = LEVEL, k: int = 0) -> None:
    """Sets p_holm and the interval of each comparison; `k`: their number and those still to come.

    The i-th smallest p gets an interval at its level in Holm's test, level / (k - i + 1); after the
    first non-significant one, all use its level. So an interval excludes 0 exactly where Holm's
    adjusted p is below the level.
    """
    k = max(k, len(comparisons))
    adjusted = holm([c.p for c in comparisons] + [1.0] * (k - len(comparisons)))
    significant = True  # until the first that is not
    for rank, i in enumerate(np.argsort([c.p for c in comparisons], kind="stable")):
        c = comparisons[i]
        if significant:
            own_level = level / (k - rank)
            significant = adjusted[i] < level
        c.p_holm = adjusted[i]
        c.corrected = t_interval(c.difference, c.sd, len(c.seeds), own_level)


# --- Spread over seeds, and the number of seeds needed --------------------------------------------


def correlation(a, b) -> float | None:
    """Pearson's r; None if either is constant, and for two pairs, where r is 1 or -1."""
    varied = np.ptp(a) > 0 and np.ptp(b) > 0  # std() of equal values may be 1e-14
    return float(np.corrcoef(a, b)[0, 1]) if varied and len(a) > 2 else None


def residual_variance(values: list, *factors: list) -> tuple[np.ndarray, int]:
    """(variance of each column of `values` (runs, k), its degrees of freedom) once the effects of
    `factors` are removed by least squares. A factor lists each run's model, say, or seed."""
    design = np.hstack([np.equal.outer(factor, sorted({*factor})) for factor in factors])
    effects, _, rank, _ = np.linalg.lstsq(design.astype(float), values)
    freedom = len(values) - int(rank)
    return np.square(values - design @ effects).sum(axis=0) / freedom, freedom


def sd_interval(sd: float, freedom: int) -> tuple[float, float]:
    """95% confidence interval of a standard deviation (chi-squared)."""
    low, high = (sd * (freedom / stats.chi2.ppf(q, freedom)) ** 0.5 for q in (0.975, 0.025))
    return float(low), float(high)


def power(difference: float, sd: float, n: int, level: float = LEVEL) -> float:
    """Power of the paired t test with n pairs whose differences have this `sd`."""
    critical = stats.t.isf(level / 2, n - 1)
    shift = abs(difference) * n**0.5 / sd
    found = stats.nct.sf(critical, n - 1, shift)  # significant in the right direction
    lost = stats.nct.cdf(-critical, n - 1, shift)  # significant in the wrong direction
    return float(np.nan_to_num(found, nan=1.0) + np.nan_to_num(lost, nan=0.0))  # nan: far tail


def detectable_difference(sd: float, n: int, level: float = LEVEL) -> float:
    """Minimum detectable difference at 80% power."""
    most = 1.0  # in units of `sd`
    while power(most, 1.0, n, level) < POWER:
        most *= 2
    return sd * float(optimize.brentq(lambda effect: power(effect, 1.0, n, level) - POWER, 0, most))


def seeds_needed(difference: float, sd: float, level: float = LEVEL) -> int:
    """Pairs needed to detect `difference` with 80% power; `sd` is of differences."""
    pairs = range(2, 10**13)
    return pairs[bisect.bisect_left(pairs, POWER, key=lambda n: power(difference, sd, n, level))]


def seeds_in_words(difference: float, sd: float, comparisons: int, level: float) -> str:
    """Seeds needed to detect `difference`; `sd`: of paired differences; both in points."""
    alone, corrected = (seeds_needed(difference, sd, level / k) for k in (1, comparisons))
    return (
        f"To detect a difference of {difference:g} points with 80% power at a level of "
        f"{100 * level:.2g}%, with a standard deviation of {sd:.2g} of paired differences:\n"
        f"{alone:6,} seeds per model for a single comparison with the baseline\n"
        f"{corrected:6,} seeds per model for the first of {comparisons} comparisons (Holm)\n"
        "(paired t test)"
    )
