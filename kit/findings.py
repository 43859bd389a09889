"""What a study shows, in numbers: each model's spread, its difference from the baseline, its cost.

Everything is worked out here once; report.md puts it into words, figures.py draws it.
"""

import itertools
from dataclasses import dataclass
from statistics import mean, stdev

from kit import costs, verdicts
from kit.results import Study, in_table_order
from kit.runs import FinishedRun, unlike
from kit.verdicts import Comparison

import numpy as np

CONTROL = "_static"  # se_static is the control of se: same parameters, gates that ignore the input


@dataclass
class ByClass:
    classes: list[str]
    baseline: list[float]  # test accuracy in percent, mean over the seeds
    against_baseline: dict[str, list[Comparison]]  # model -> one a class, corrected over all


class Findings:
    """Everything about one study."""

    def __init__(self, study: Study, cost_rows: list[dict]):
        self.study = study
        self.explained = [run.explained for run in study.all_runs if run.explained]
        self.damaged: list[str] = []  # runs that are left out, in words
        # Beside a smoke test or other settings, the published figures would only mislead.
        like_it = not study.result["quick"] and study.overrides.keys() <= {"precision", "mode"}
        self.published = study.published if like_it else {}
        # All by model, in the order of the table: its summary, its comparison with the baseline
        # and with its control (each set corrected together), a bootstrap over seeds and images.
        self.models = {model: summarize(runs) for model, runs in study.runs.items()}
        others = [model for model in self.models if model != "baseline"]
        self.against = compare(study, {model: (model, "baseline") for model in others})
        self.controls = {m.replace(CONTROL, ""): m for m in others if CONTROL in m}
        with_control = [model for model in others if model in self.controls]
        self.controlled = compare(study, {m: (m, self.controls[m]) for m in with_control})
        self.resampled = {m: resample(study, m, c.seeds) for m, c in self.against.items()}
        self.by_class = compare_classes(study, list(self.against))
        # Correlation of epochs trained and test accuracy, over the runs of all models.
        runs = [run.result for run in study.all_runs]
        of_runs = [[result[key] for result in runs] for key in ("epochs_run", "test_acc")]
        self.stopping = verdicts.correlation(*of_runs) if len(runs) >= 10 else None
        # Its row of benchmark.json, and what follows; the models that no other beats in accuracy
        # and inference time, ties as ties.
        self.costs = costs.measured(study, cost_rows)
        self.stale = costs.by_other_code(study, self.costs)
        self.relative = costs.relative(study, self.costs)
        self.front, self.tied = self.pareto_front()
        # Batch size, mode, precision and device of all of `costs`.
        self.timed = next(iter(self.costs.values()), None)
        # The models of the table, seeds of runs that would complete it; models without a verdict.
        self.wanted = in_table_order(study.published.keys() | study.runs.keys())
        seeds = sorted({run.seed for run in study.all_runs})
        missing = {m: [s for s in seeds if s not in study.by_seed(m)] for m in self.wanted}
        self.missing = {model: seeds for model, seeds in missing.items() if seeds}
        unjudged = [m for m in others if m not in self.against and "baseline" in self.models]
        pairs = {model: study.runs[model] + study.runs["baseline"] for model in unjudged}
        self.unjudged = {model: unlike(runs, study.all_runs) for model, runs in pairs.items()}

    def pareto_front(self) -> tuple[list[str], list[str]]:
        """(the Pareto front, models that are not on it by what may be chance).

        On the front no other model is both more accurate and faster by the measured means, paired
        by seed. Of the rest, those are dominated of which that is shown: by the verdict, pairs
        without the baseline corrected among themselves, or by inference times whose ranges from p10
        to p90 do not overlap. Only models with a verdict and a time are judged.
        """
        costs = self.costs
        timed = [m for m in ("baseline", *self.against) if m in self.models and m in costs]
        if len(timed) < 2 or "baseline" not in timed:
            return [], []
        pairs = compare(self.study, {pair: pair for pair in itertools.combinations(timed[1:], 2)})
        pairs |= {(model, "baseline"): c for model, c in self.against.items()}
        verdict = {pair: comparison.verdict for pair, comparison in pairs.items()}
        gain = {(a, b): c.difference for (a, b), c in pairs.items()}
        gain |= {(b, a): -difference for (a, b), difference in gain.items()}

        def dominates(a, b):
            means = [self.models[model]["test_acc_mean"] for model in (a, b)]
            gained = round(gain.get((a, b), means[0] - means[1]), 9)
            saved = costs[b]["ms_per_image"] - costs[a]["ms_per_image"]
            return min(gained, saved) >= 0 < max(gained, saved)

        def is_shown(a, b):
            more_accurate = verdict.get((a, b)) == "better" or verdict.get((b, a)) == "worse"
            return more_accurate or costs[a]["ms_per_image_p90"] < costs[b]["ms_per_image_p10"]

        above = {m: [other for other in timed if dominates(other, m)] for m in timed}
        tied = [m for m in timed if above[m] and not any(is_shown(o, m) for o in above[m])]
        return [m for m in timed if not above[m]], tied

    def with_verdict(self, verdict: str) -> list[str]:
        return [model for model, c in self.against.items() if c.verdict == verdict]


# --- Accuracy -------------------------------------------------------------------------------------


def summarize(runs: list[FinishedRun]) -> dict:
    """Over the seeds of one model. sd: the sample standard deviation (n - 1); None for one run."""
    accuracies = [run.result["test_acc"] for run in runs]
    n, middle = len(runs), mean(accuracies)
    sd = stdev(accuracies) if n > 1 else None
    means = ("test_acc_last", "val_acc", "train_seconds")
    return {
        "n": n,
        "seeds": [run.seed for run in runs],
        "test_acc_mean": middle,
        "test_acc_sd": sd,
        "test_acc_interval": verdicts.t_interval(middle, sd, n, verdicts.LEVEL) if n > 1 else None,
        "test_acc_min": min(accuracies),
        "test_acc_max": max(accuracies),
        **{f"{key}_mean": mean(run.result[key] for run in runs) for key in means},
        "epochs_run": [run.result["epochs_run"] for run in runs],
        "best_epoch": [run.result["best_epoch"] for run in runs],
        "best_lr": [
            row.get("lr")
            for run in runs
            for row in run.metrics
            if row["epoch"] == run.result["best_epoch"]
        ],
        "params": runs[0].result["params"],
    }


def compare(study: Study, pairs: dict, other: Study | None = None) -> dict[str, Comparison]:
    """{name: (model, reference)} to comparisons, corrected over all; the reference is in `other`.

    Those with less than two seeds in common are not among them.
    """
    values = {
        name: (study.accuracies(model), (other or study).accuracies(reference))
        for name, (model, reference) in pairs.items()
    }
    found = compared(values, lambda name: 100 / study.result["test_images"])
    there = other.all_runs if other else []
    for name, comparison in found.items():
        both = zip((study, other or study), pairs[name], strict=True)
        runs = [where.by_seed(model)[seed] for where, model in both for seed in comparison.seeds]
        comparison.unlike = unlike(runs, study.all_runs, there)
    return found


def compared(values: dict, step) -> dict[str, Comparison]:
    """Likewise of {name: (accuracies, those of the reference)}. step(name): that of accuracies."""
    both = ((name, verdicts.compare(*v, step(name))) for name, v in values.items())
    found = {name: comparison for name, comparison in both if comparison}
    verdicts.correct(list(found.values()))
    return found


def have_same_labels(runs: list[FinishedRun]) -> bool:
    """Whether these runs were tested on the same images, as far as their labels are there."""
    labels = [run.labels for run in runs if run.labels is not None]
    return all(np.array_equal(other, labels[0]) for other in labels)


def same_labels(runs: list[FinishedRun]) -> bool:
    """Whether the predictions of these runs are there, and of the same images."""
    labels = runs[0].labels
    return all(r.correct is not None and np.array_equal(r.labels, labels) for r in runs)


def resample(study: Study, model: str, seeds: list[int]) -> tuple[float, float] | None:
    """The bootstrap over seeds and test images; None where a run's predictions are not there."""
    runs = [study.by_seed(name)[seed] for name in (model, "baseline") for seed in seeds]
    if not same_labels(runs):
        return None
    return verdicts.bootstrap(*np.split(np.array([run.correct for run in runs]), 2))


def compare_classes(study: Study, models: list[str]) -> ByClass | None:
    """None where there is nothing to compare or a run's predictions are not there."""
    runs = [run for model in ["baseline", *models] for run in study.runs.get(model, [])]
    if not models or not same_labels(runs):
        return None
    labels, counts = np.unique(runs[0].labels, return_counts=True)
    sizes = dict(zip(labels, counts, strict=True))

    def of_class(model: str, label: int) -> dict[int, float]:
        by_seed = study.by_seed(model).items()
        return {seed: 100 * run.correct[run.labels == label].mean() for seed, run in by_seed}

    baseline = {label: of_class("baseline", label) for label in labels}
    found = compared(
        {(m, label): (of_class(m, label), baseline[label]) for m in models for label in labels},
        lambda name: 100 / sizes[name[1]],
    )
    names = dict(enumerate(study.result["classes"]))
    return ByClass(
        [str(names.get(label, label)) for label in labels],
        [mean(baseline[label].values()) for label in labels],
        {model: [found[model, label] for label in labels] for model in models},
    )


# --- What attention attends to --------------------------------------------------------------------


def ablation(row: dict) -> tuple[float, tuple[float, float]] | None:
    """(points gained when gates are replaced by their mean, 95% interval); None: no gates.

    Of n test images `won` are correct only with gates replaced, `lost` only with them intact. The
    interval is Wald's for paired proportions with 1/2 added to each cell (Agresti and Min,
    Statistics in Medicine 24, 2005), which says something even where no image changes.
    """
    if row.get("test_acc_gates_fixed") is None:
        return None
    n, won, lost = row["test_images"], row["won"], row["lost"]
    middle = (won - lost) / (n + 2)
    error = 1.96 * (won + lost + 1 - (won - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return 100 * (won - lost) / n, (100 * (middle - error), 100 * (middle + error))
