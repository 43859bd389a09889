"""Is a difference real? Statistics over paired seeds, and the verdicts that follow from them.

One seed fixes split, order of images and the backbone's first weights of every model, so models are
compared seed by seed: a paired t test, with Holm's correction over all comparisons of a study. The
test was chosen before any result was seen, and the number of seeds is planned (RUNS/plan.json):
there is no verdict before all of them are finished, and after k plans the level is 5% / k.
"""

import bisect
import functools
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of false alarms over all comparisons of a study together
POWER = 0.8
MARGIN = 0.3  # points of test accuracy: what is closer counts as equivalent
VERDICTS = ("better", "worse", "equivalent", "undecided")


@dataclass
class Comparison:
    """A model against a reference, the baseline say, over the seeds both have; in percent."""

    seeds: list[int]
    accuracy: float  # the model's mean over those seeds
    reference: float  # that of what it is compared with
    difference: float  # mean of the paired differences, model - reference
    sd: float  # their sample standard deviation (n - 1), at least a step
    p: float  # paired t test, two-sided
    p_holm: float = float("nan")  # corrected over all comparisons of the study
    corrected: tuple[float, float] = (float("nan"), float("nan"))  # the interval that goes with it
    margin: float = MARGIN
    planned: int | None = None  # seeds that both should have; None: no plan was recorded
    unlike: list[str] = field(default_factory=list)  # in what else its pairs differ, in words

    @property
    def is_interim(self) -> bool:
        return len(self.seeds) < (self.planned or 0)

    @property
    def verdict(self) -> str | None:
        """One of VERDICTS, from the corrected interval alone; None before all seeds are there."""
        low, high = self.corrected
        if self.is_interim:
            return None
        if low > 0 or high < 0:
            return "better" if low > 0 else "worse"
        return "equivalent" if max(-low, high) < self.margin else "undecided"


def compare(
    model: dict[int, float], reference: dict[int, float], step: float = 0.0
) -> Comparison | None:
    """{seed: accuracy} against {seed: accuracy}; None with less than two common seeds.

    step: that of accuracies, one test image in points. Differences that happen to agree closer than
    that say nothing about how much they vary, so their standard deviation counts as no less.
    """
    seeds = sorted(model.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    a, b = (np.array([values[seed] for seed in seeds]) for values in (model, reference))
    mean, sd = float((a - b).mean()), max(step, float((a - b).std(ddof=1)))
    error = sd / len(seeds) ** 0.5  # of the mean; 0 only if all differences are the same
    p = float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1) if error else mean == 0)
    return Comparison(seeds, float(a.mean()), float(b.mean()), mean, sd, p)


def t_interval(mean: float, sd: float, n: int, level: float) -> tuple[float, float]:
    """Where the true mean lies with a confidence of 1 - level."""
    half = float(stats.t.isf(level / 2, n - 1)) * sd / n**0.5
    return mean - half, mean + half


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) adjusted p: the i-th smallest times (k - i + 1), never below one before it."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def correct(comparisons: list[Comparison], level: float = LEVEL) -> None:
    """Fills in what depends on how many comparisons there are.

    The interval of the i-th smallest p has the level at which Holm tests it, level / (k - i + 1);
    from the first that is not significant on, that one's. So it excludes 0 exactly where Holm's
    adjusted p is below the level.
    """
    adjusted = holm([comparison.p for comparison in comparisons])
    significant = True  # until the first that is not
    for rank, i in enumerate(np.argsort([c.p for c in comparisons], kind="stable")):
        c = comparisons[i]
        if significant:
            own_level = level / (len(comparisons) - rank)
            significant = adjusted[i] < level
        c.p_holm = adjusted[i]
        c.corrected = t_interval(c.difference, c.sd, len(c.seeds), own_level)


# --- How much seeds vary, and how many it takes ---------------------------------------------------


def correlation(a, b) -> float | None:
    """Pearson's r; None where one does not vary, and of two pairs, where it is 1 or -1."""
    varied = np.ptp(a) > 0 and np.ptp(b) > 0  # std() of equal values may be 1e-14
    return float(np.corrcoef(a, b)[0, 1]) if varied and len(a) > 2 else None


def pooled_sd(groups: list[tuple[float, int]]) -> tuple[float, tuple[float, float]]:
    """(the common standard deviation of groups (sd, n), its 95% interval by chi squared)."""
    freedom = sum(n - 1 for _, n in groups)
    squares = sum(sd**2 * (n - 1) for sd, n in groups)
    low, high = (float((squares / stats.chi2.ppf(q, freedom)) ** 0.5) for q in (0.975, 0.025))
    return (squares / freedom) ** 0.5, (low, high)


def sd_from_images(values: np.ndarray) -> float:
    """The standard deviation of accuracy, in points, that a finite test set makes by itself.

    values (seeds, images): 1 where a run is right, or the difference of a pair. Of each image the
    variance over seeds; the mean of all N images has their sum / N^2 (Jordan 2023, arXiv
    2304.01910).
    """
    return float(100 * values.var(axis=0, ddof=1).sum() ** 0.5 / values.shape[1])


def power(difference: float, sd: float, n: int, level: float = LEVEL) -> float:
    """Of the paired t test with n pairs whose differences have this standard deviation."""
    if sd == 0:
        return 1.0
    critical = stats.t.isf(level / 2, n - 1)
    shift = abs(difference) * n**0.5 / sd
    found = stats.nct.sf(critical, n - 1, shift)  # in the right direction
    lost = stats.nct.cdf(-critical, n - 1, shift)  # significant in the wrong one
    return float(np.nan_to_num(found, nan=1.0) + np.nan_to_num(lost, nan=0.0))  # nan: far out


def detectable_difference(sd: float, n: int, level: float = LEVEL) -> float:
    """The difference that n pairs find with 80% power."""
    return sd * detectable_effect(n, level)


@functools.cache
def detectable_effect(n: int, level: float) -> float:
    """The same in standard deviations of the differences."""
    most = 1.0
    while power(most, 1.0, n, level) < POWER:
        most *= 2
    return float(optimize.brentq(lambda effect: power(effect, 1.0, n, level) - POWER, 0, most))


def seeds_needed(difference: float, sd: float, level: float = LEVEL) -> int:
    """How many pairs find this difference with 80% power; `sd` is that of differences."""
    enough = 2
    while power(difference, sd, enough, level) < POWER:
        enough *= 2
    candidates = range(2, enough)
    return 2 + bisect.bisect_left(candidates, POWER, key=lambda n: power(difference, sd, n, level))


def seeds_in_words(difference: float, sd: float, comparisons: int) -> str:
    """The seeds that `difference` takes; it and the `sd` of paired differences in points."""
    alone, corrected = (seeds_needed(difference, sd, LEVEL / k) for k in (1, comparisons))
    return (
        f"To detect a difference of {difference:g} points with 80% power at a level of 5%, with a "
        f"standard deviation of {sd:.2g} of paired differences:\n"
        f"{alone:6,} seeds per model for a single comparison with the baseline\n"
        f"{corrected:6,} seeds per model for the first of {comparisons} comparisons (Holm)\n"
        "(paired t test)"
    )
