"""Is a difference real? Statistics over paired seeds, and the verdicts that follow from them.

One seed fixes split, order of images and the backbone's first weights of every model, so models are
compared seed by seed. The test was chosen before any result was seen: the paired t test, Holm's
correction over all comparisons with the baseline; verdicts follow from its interval alone. Welch's
test, P(A > B) and the bootstrap are reported as well, for those who would have chosen otherwise.
"""

import bisect
import functools
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of false alarms over all comparisons of a study together
POWER = 0.8


@dataclass
class Comparison:
    """A model against a reference, the baseline say, over the seeds both have; in percent."""

    seeds: list[int]
    accuracy: float  # the model's mean over those seeds
    reference: float  # that of what it is compared with
    difference: float  # mean of the paired differences, model - reference
    sd: float  # their sample standard deviation (n - 1), at least a step
    p: float  # paired t test, two-sided
    p_welch: float | None  # Welch's test; None where one model's accuracies do not vary
    correlation: float | None  # of the pairs; None likewise, and of two, where it is 1 or -1
    prob_better: float  # P(model > reference) = Mann-Whitney's U / (n m), ties count half
    interval: tuple[float, float]  # 95%, of this comparison alone
    p_holm: float = float("nan")  # corrected over all comparisons of the study
    corrected: tuple[float, float] = (float("nan"), float("nan"))  # the interval that goes with it
    detectable: float = float("nan")  # what a study like this one finds with 80% power
    unlike: list[str] = field(default_factory=list)  # in what else its runs differ, in words

    @property
    def verdict(self) -> str:
        """From the corrected interval alone."""
        if self.corrected[0] > 0:
            return "better"
        return "worse" if self.corrected[1] < 0 else "not distinguishable"


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
    differences = a - b
    mean, sd = float(differences.mean()), max(step, float(differences.std(ddof=1)))
    varied = np.ptp(a) > 0 and np.ptp(b) > 0
    u = stats.mannwhitneyu(a, b).statistic
    error = sd / len(seeds) ** 0.5  # of the mean; 0 only if all differences are the same
    return Comparison(
        seeds=seeds,
        accuracy=float(a.mean()),
        reference=float(b.mean()),
        difference=mean,
        sd=sd,
        p=float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1) if error else mean == 0),
        p_welch=float(stats.ttest_ind(a, b, equal_var=False).pvalue) if varied else None,
        correlation=correlation(a, b),
        prob_better=float(u) / len(seeds) ** 2,
        interval=t_interval(mean, sd, len(seeds), LEVEL),
    )


def correlation(a, b) -> float | None:
    """Pearson's r; None where one does not vary, and of two pairs, where it is 1 or -1."""
    varied = np.ptp(a) > 0 and np.ptp(b) > 0  # std() of equal values may be 1e-14
    return float(np.corrcoef(a, b)[0, 1]) if varied and len(a) > 2 else None


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


def correct(comparisons: list[Comparison]) -> None:
    """Fills in what depends on how many comparisons there are.

    The interval of the i-th smallest p has the level at which Holm tests it, LEVEL / (k - i + 1);
    from the first that is not significant on, that one's. So it excludes 0 exactly where Holm's
    adjusted p is below LEVEL.
    """
    adjusted = holm([comparison.p for comparison in comparisons])
    significant = True  # until the first that is not
    for rank, i in enumerate(np.argsort([c.p for c in comparisons], kind="stable")):
        c, n = comparisons[i], len(comparisons[i].seeds)
        if significant:
            level = LEVEL / (len(comparisons) - rank)
            significant = adjusted[i] < LEVEL
        c.p_holm = adjusted[i]
        c.corrected = t_interval(c.difference, c.sd, n, level)
        c.detectable = detectable_difference(c.sd, n, LEVEL / len(comparisons))


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
    """The seeds that `difference` takes; it and the `sd` over seeds in points of test accuracy."""
    sd_of_differences = sd * 2**0.5  # if the accuracies of a pair do not correlate
    alone, corrected = (
        seeds_needed(difference, sd_of_differences, LEVEL / k) for k in (1, comparisons)
    )
    return (
        f"To detect a difference of {difference:g} points with 80% power at a level of 5%, with a "
        f"standard deviation of {sd:g} over seeds:\n"
        f"{alone:6,} seeds per model for a single comparison with the baseline\n"
        f"{corrected:6,} seeds per model for the first of {comparisons} comparisons (Holm)\n"
        "(paired t test; fewer where seeds affect all models alike)"
    )


def bootstrap(
    model: np.ndarray, reference: np.ndarray, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the mean paired difference in points, over other seeds and other images.

    model, reference: bool (seeds, images), whether each image was classified correctly, the seeds
    paired. Each resample takes seeds and images with replacement, the same for both.
    """
    gains = model.astype(np.float32) - reference.astype(np.float32)  # (seeds, images)
    n_seeds, n_images = gains.shape
    by_seed = gains @ image_counts(n_images, resamples, seed)  # (seeds, resamples)
    generator = np.random.default_rng([seed, 1])
    seed_counts = generator.multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=resamples)
    means = (seed_counts.T * by_seed).sum(0) / (n_seeds * n_images)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return float(low), float(high)


@functools.lru_cache(maxsize=1)  # all comparisons of a study resample the same images
def image_counts(n_images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image is in each resample: float32 (images, resamples)."""
    generator = np.random.default_rng([seed, 0])
    counts = np.empty((resamples, n_images), np.float32)
    for row in counts:
        row[:] = np.bincount(generator.integers(n_images, size=n_images), minlength=n_images)
    return counts.T
