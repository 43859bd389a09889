"""A study's results in numbers: each model's spread, difference from the baseline, and cost.

Everything is computed here, once. words.py and pages.py describe it, figures.py draws it.
"""

import functools
import itertools
from dataclasses import dataclass
from statistics import mean, stdev

from kit import costs, verdicts
from kit.results import Study, in_table_order, planned_for_both
from kit.runs import FinishedRun, unlike
from kit.verdicts import Comparison

import numpy as np

CONTROL = "_static"  # se_static is se's control: same parameters, gates that ignore the input
SEEDS_BY_CLASS = 10  # with fewer, only differences of tens of points would be significant


@dataclass
class ByClass:
    classes: list[str]
    baseline: list[float]  # test accuracy in percent, mean over the seeds
    against: dict[str, list[Comparison]]  # model -> one per class, corrected over all


@dataclass
class Spread:
    """How much accuracy varies over seeds, in points, and the seeds a study needs."""

    over_seeds: float  # standard deviation, pooled over the models
    from_images: float | None  # what the finite test set alone would give
    of_difference: float  # standard deviation of a paired difference
    interval: tuple[float, float]  # 95%
    difference_from_images: float | None
    detectable: float  # minimum detectable difference with the seeds at hand
    seeds_needed: dict[float, tuple[int, int, int]]  # points -> seeds; by `interval`'s ends


class Findings:
    def __init__(self, study: Study, cost_rows: list[dict], reference="baseline", margin=None):
        self.study, self.reference = study, reference
        self.margin = margin or verdicts.MARGIN
        self.level = verdicts.LEVEL / study.looks(reference)
        self.explained = [run.explained for run in study.all_runs if run.explained]
        self.lost: list[str] = []  # unreadable runs that a verdict may depend on, in words
        # Next to a smoke test or other settings, published numbers would mislead.
        like_it = not study.result["quick"] and study.overrides.keys() <= {"precision", "mode"}
        self.published = study.published if like_it else {}
        self.balance = balance_of(study)
        # By model, in table order: summary, comparison with the reference, comparison with the
        # control (each set corrected together).
        self.models = {model: summarize(runs) for model, runs in study.runs.items()}
        others = in_table_order({*self.models, *study.planned} - {reference})
        self.against = self.compare({model: (model, reference) for model in others})
        self.family = [m for m in others if m in self.against or m in study.planned]
        self.controls = {m.replace(CONTROL, ""): m for m in others if CONTROL in m}
        with_control = [model for model in others if model in self.controls]
        self.controlled = self.compare({m: (m, self.controls[m]) for m in with_control})
        here = [model for model in others if model in self.models]
        self.unjudged = [m for m in here if m not in self.against and reference in self.models]
        self.spread = self.spread_over_seeds()
        self.by_class = self.compare_classes()
        self.epochs = {run.result["epochs_run"] for run in study.all_runs}
        # Correlation of epochs trained with test accuracy, over all runs.
        runs = [run.result for run in study.all_runs]
        of_runs = [[result[key] for result in runs] for key in ("epochs_run", "test_acc")]
        self.stopping = verdicts.correlation(*of_runs) if len(runs) >= 10 else None
        # By model: row of benchmark.json, and what follows from it.
        self.costs = costs.measured(study, cost_rows)
        self.fastest = costs.measured(study, cost_rows, fastest=True)
        self.stale = costs.by_other_code(study, self.costs)
        self.relative = costs.relative(study, self.costs, self.fastest)
        self.dominated = self.dominated_models()
        timed = [m for m in self.models if m in self.costs]
        judged = len(timed) > 1 and self.against
        self.front = [m for m in timed if m not in self.dominated] if judged else []
        # Batch size, mode, precision and device, the same for all `costs`.
        self.timed = next(iter(self.costs.values()), None)
        self.unplanned = [
            run
            for model, seeds in study.planned.items()
            for seed, run in study.by_seed(model).items()
            if seed not in seeds
        ]
        left = {m: seeds - study.by_seed(m).keys() for m, seeds in study.planned.items()}
        self.missing = {m: sorted(left[m]) for m in in_table_order(left) if left[m]}

    def compare(self, pairs: dict, other: Study | None = None) -> dict[str, Comparison]:
        """{name: (model, reference in `other`)} -> {name: comparison} over planned seeds, corrected
        over all, unfinished ones included. Pairs with fewer than two common seeds are left out."""
        study, there = self.study, other or self.study
        planned, values = {}, {}
        for name, (model, reference) in pairs.items():
            both = study.planned.get(model), there.planned.get(reference)
            planned[name] = seeds = planned_for_both(*both)
            own = study.accuracies(model).items()
            of_plan = {seed: value for seed, value in own if seeds is None or seed in seeds}
            values[name] = of_plan, there.accuracies(reference)
        step = 100 / study.result["test_images"]
        expected = {name for name, (model, _) in pairs.items() if model in study.planned}
        found = compared(values, lambda name: step, self.level, self.margin, expected)
        for name, c in found.items():
            model, reference = pairs[name]
            both = study.by_seed(model), there.by_seed(reference)
            c.unlike = unlike([tuple(runs[seed] for runs in both) for seed in c.seeds])
            c.planned = planned[name] or set()
        return found

    @functools.cached_property
    def compared_runs(self) -> dict[str, dict[int, FinishedRun]]:
        """{model: {seed: run}} of the comparisons with the reference, its own runs first."""
        seeds = {model: c.seeds for model, c in self.against.items()}
        seeds = {self.reference: sorted({*itertools.chain(*seeds.values())})} | seeds
        return {m: {seed: self.study.by_seed(m)[seed] for seed in own} for m, own in seeds.items()}

    def spread_over_seeds(self) -> Spread | None:
        """None with fewer than two degrees of freedom.

        A paired difference has twice the variance that an accuracy has once the means of models and
        seeds are removed. Of two models that is the variance of their differences.
        """
        if not self.against:
            return None
        runs = [run for own in self.compared_runs.values() for run in own.values()]
        models, seeds = [run.result["model"] for run in runs], [run.seed for run in runs]

        def sds(values: list) -> tuple[float, float, int]:
            """values (runs, k) -> (SD over seeds of their mean over k, SD of its paired difference,
            degrees of freedom)."""
            over_seeds, _ = verdicts.residual_variance(values, models)
            within, freedom = verdicts.residual_variance(values, models, seeds)
            return *(v.sum() ** 0.5 / v.size for v in (over_seeds, 2 * within)), freedom

        over_seeds, sd, freedom = sds([[run.result["test_acc"]] for run in runs])
        if freedom < 2:
            return None
        # The variance of a mean of N images is the sum of theirs / N^2 (Jordan 2023, 2304.01910).
        of_images = [100.0 * run.correct for run in runs] if same_labels(runs) else None
        images = sds(of_images)[:2] if of_images else (None, None)
        sd = max(sd, 100 / self.study.result["test_images"])  # one image, as in each comparison
        interval = verdicts.sd_interval(sd, freedom)
        level, n = self.level / len(self.family), min(len(c.seeds) for c in self.against.values())
        needed = {
            points: tuple(verdicts.seeds_needed(points, s, level) for s in (sd, *interval))
            for points in (0.1, 0.2, 0.3)
        }
        detectable = verdicts.detectable_difference(sd, n, level)
        return Spread(over_seeds, images[0], sd, interval, images[1], detectable, needed)

    def compare_classes(self) -> ByClass | None:
        """None with few seeds, before a plan's end, or if predictions are missing."""
        final = [model for model, c in self.against.items() if not c.is_interim]
        models = [model for model in final if len(self.against[model].seeds) >= SEEDS_BY_CLASS]
        if not models:
            return None
        used = [self.compared_runs[model] for model in (self.reference, *models)]
        runs = [run for by_seed in used for run in by_seed.values()]
        if not same_labels(runs):
            return None
        labels, counts = np.unique(runs[0].labels, return_counts=True)
        sizes = dict(zip(labels, counts, strict=True))

        def of_class(model: str, label: int) -> dict[int, float]:
            by_seed = self.compared_runs[model].items()
            return {seed: 100 * run.correct[run.labels == label].mean() for seed, run in by_seed}

        baseline = {label: of_class(self.reference, label) for label in labels}
        found = compared(
            {(m, label): (of_class(m, label), baseline[label]) for m in models for label in labels},
            lambda name: 100 / sizes[name[1]], self.level, self.margin,
            {(m, label) for m in self.family for label in labels},
        )  # fmt: skip
        names = dict(enumerate(self.study.result["classes"]))
        return ByClass(
            [str(names.get(label, label)) for label in labels],
            [mean(baseline[label].values()) for label in labels],
            {model: [found[model, label] for label in labels] for model in models},
        )

    def dominated_models(self) -> dict[str, list[str]]:
        """{model: those that are better or equivalent, and faster (p10 to p90 of inference times do
        not overlap)}: not on the Pareto front."""
        timed = [m for m in self.models if m in self.costs]
        pairs = self.compare({pair: pair for pair in itertools.combinations(timed, 2)})
        verdict = {pair: c.verdict for pair, c in pairs.items()}
        opposite = {"better": "worse", "worse": "better"}
        verdict |= {(b, a): opposite.get(v, v) for (a, b), v in verdict.items()}

        def dominates(other: str, model: str) -> bool:
            p90, p10 = self.costs[other]["ms_per_image_p90"], self.costs[model]["ms_per_image_p10"]
            return p90 < p10 and verdict.get((other, model)) in ("better", "equivalent")

        found = {m: [other for other in timed if dominates(other, m)] for m in timed}
        return {model: others for model, others in found.items() if others}

    def with_verdict(self, verdict: str | None) -> list[str]:
        return [model for model, c in self.against.items() if c.verdict == verdict]


# --- Accuracy -------------------------------------------------------------------------------------


def summarize(runs: list[FinishedRun]) -> dict:
    """One model over its seeds. sd: the sample standard deviation (n - 1); None for one run."""
    accuracies = [run.result["test_acc"] for run in runs]
    means = ("test_acc_last", "val_acc", "train_seconds")
    return {
        "n": len(runs),
        "seeds": [run.seed for run in runs],
        "test_acc_mean": mean(accuracies),
        "test_acc_sd": stdev(accuracies) if len(runs) > 1 else None,
        "test_acc_min": min(accuracies),
        "test_acc_max": max(accuracies),
        **{f"{key}_mean": mean(run.result[key] for run in runs) for key in means},
        "epochs_run": [run.result["epochs_run"] for run in runs],
        "best_epoch": [run.result["best_epoch"] for run in runs],
        "params": runs[0].result["params"],
    }


def balance_of(study: Study) -> tuple[float, dict[str, float]] | None:
    """(largest class's share, balanced accuracy (mean over classes) by model), in percent; None if
    that class has at most twice an equal share, or if predictions are missing."""
    if not same_labels(study.all_runs):
        return None
    labels = study.all_runs[0].labels
    sizes = np.unique(labels, return_counts=True)[1]
    if sizes.max() * len(sizes) <= 2 * len(labels):
        return None
    masks = [labels == label for label in np.unique(labels)]
    return 100 * float(sizes.max()) / len(labels), {
        model: mean(100 * float(run.correct[mask].mean()) for run in runs for mask in masks)
        for model, runs in study.runs.items()
    }


def compared(
    values: dict, step, level: float, margin: float, expected=frozenset()
) -> dict[str, Comparison]:
    """{name: (accuracies, reference's)} -> comparisons, corrected over them and those `expected`.
    step(name): one image in points."""
    both = ((name, verdicts.compare(*v, step(name))) for name, v in values.items())
    found = {name: comparison for name, comparison in both if comparison}
    verdicts.correct(list(found.values()), level, len(found.keys() | expected))
    for comparison in found.values():
        comparison.margin = margin
    return found


def same_labels(runs: list[FinishedRun]) -> bool:
    """Whether all runs have predictions, with the same test labels."""
    labels = runs[0].labels
    return all(r.correct is not None and np.array_equal(r.labels, labels) for r in runs)


# --- What attention attends to --------------------------------------------------------------------


def ablation(row: dict) -> tuple[float, tuple[float, float]] | None:
    """(points gained by replacing gates with their mean, 95% interval); None: no gates.

    `won` test images are correct only with gates replaced, `lost` only with gates intact. This is
    Wald's interval for paired proportions with 1/2 added to each cell (Agresti and Min,
    Statistics in Medicine 24, 2005), which is informative even if no image changes.
    """
    if row.get("test_acc_gates_fixed") is None:
        return None
    n, won, lost = row["test_images"], row["won"], row["lost"]
    middle = (won - lost) / (n + 2)
    error = 1.96 * (won + lost + 1 - (won - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return 100 * (won - lost) / n, (100 * (middle - error), 100 * (middle + error))
