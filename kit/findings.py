"""What a study shows, in numbers: each model's spread, its difference from the baseline, its cost.

Everything is worked out here once; sections.py puts it into words and tables, figures.py draws it.
"""

import itertools
from dataclasses import dataclass
from statistics import mean, median, stdev

import numpy as np

from kit import verdicts
from kit.results import Run, Study, costs_of, fastest_costs_of, in_table_order, is_finite
from kit.verdicts import Comparison

CONTROL = "_static"  # se_static is the control of se: as many parameters, but blind gates


@dataclass
class ByClass:
    """Test accuracy of every class; the comparisons are corrected over models and classes."""

    classes: list[str]
    baseline: list[float]  # percent, mean over the seeds
    against: dict[str, list[Comparison]]  # model -> a comparison with the baseline for each class


@dataclass
class Cost:
    """What a model costs, and how many times the baseline's that is; None: not measured."""

    values: dict[str, float | None]  # by the names of COSTS
    ratios: dict[str, float | None]
    training_spread: tuple[float, float] | None  # of the training ratio, over seeds


# params; flops: FlopCounterMode's, exact for convolutions and matrix products; eager, fast: ms an
# image, the published way and in the fastest mode; training: seconds an epoch; memory: MB.
COSTS = ("params", "flops", "eager", "fast", "training", "memory")


@dataclass
class Findings:
    study: Study
    models: dict[str, dict]  # model -> its summary, in the order of the table
    against: dict[str, Comparison]  # model -> against the baseline, Holm-corrected together
    resampled: dict[str, tuple[float, float] | None]  # model -> bootstrap over seeds and images
    controlled: dict[str, Comparison]  # model -> against its control, corrected together
    by_class: ByClass | None
    costs: dict[str, dict]  # model -> its row of benchmark.json, measured the published way
    fastest: dict[str, dict]  # model -> its row in the fastest mode
    relative: dict[str, Cost]  # model -> its cost beside the baseline's
    front: list[str]  # models that no other beats in accuracy and inference time, ties as ties
    missing: dict[str, list[int]]  # model -> seeds of runs that would complete the table
    explained: list[dict]  # rows of explain.json that are of this study's runs


def find(study: Study, cost_rows: list[dict], explained: list[dict] = ()) -> Findings:
    """Everything about one study. cost_rows: benchmark.json's; explained: explained_of()'s."""
    costs, fastest = costs_of(study, cost_rows), fastest_costs_of(study, cost_rows)
    against = against_baseline(study)
    return Findings(
        study=study,
        models={model: summarize(runs) for model, runs in study.runs.items()},
        against=against,
        resampled={model: resample(study, model, c.seeds) for model, c in against.items()},
        controlled=against_controls(study),
        by_class=compare_classes(study, list(against)),
        costs=costs,
        fastest=fastest,
        relative=relative_costs(study, costs, fastest),
        front=pareto_front(study, against, costs),
        missing=missing_runs(study),
        explained=list(explained),
    )


# --- Accuracy -------------------------------------------------------------------------------------


def summarize(runs: list[Run]) -> dict:
    """Over the seeds of one model. sd: the sample standard deviation (n - 1); None for one run."""
    results = [run.result for run in runs]
    accuracies = [result["test_acc"] for result in results]
    sd = stdev(accuracies) if len(results) > 1 else None
    interval = None
    if sd is not None:
        interval = verdicts.t_interval(mean(accuracies), sd, len(results), verdicts.LEVEL)
    return {
        "n": len(results),
        "seeds": [run.seed for run in runs],
        "test_acc_mean": mean(accuracies),
        "test_acc_sd": sd,
        "test_acc_interval": interval,  # 95 %, Student's t
        "test_acc_min": min(accuracies),
        "test_acc_max": max(accuracies),
        "test_acc_last_mean": mean(result["test_acc_last"] for result in results),
        "val_acc_mean": mean(result["val_acc"] for result in results),
        "epochs_run_mean": mean(result["epochs_run"] for result in results),
        "train_seconds_mean": mean(result["train_seconds"] for result in results),
        "images_per_second_mean": mean(result["images_per_second"] for result in results),
        "params": results[0]["params"],
    }


def accuracies(study: Study, model: str) -> dict[int, float]:
    """{seed: test accuracy}."""
    return {seed: run.result["test_acc"] for seed, run in study.by_seed(model).items()}


def compared(pairs: dict[str, tuple], n_images: int | None) -> dict[str, Comparison]:
    """{name: (accuracies, those of the reference)} to comparisons, corrected over all of them.

    Those with less than two seeds in common are not among them. n_images: that they are of.
    """
    step = 100 / n_images if n_images else 0.0
    found = {name: verdicts.compare(*pair, step) for name, pair in pairs.items()}
    found = {name: comparison for name, comparison in found.items() if comparison}
    verdicts.correct(list(found.values()))
    return found


def against_baseline(study: Study) -> dict[str, Comparison]:
    baseline = accuracies(study, "baseline")
    others = [model for model in study.runs if model != "baseline"]
    pairs = {model: (accuracies(study, model), baseline) for model in others}
    return compared(pairs, study.n_images)


def against_controls(study: Study) -> dict[str, Comparison]:
    models = [model for model in study.runs if model + CONTROL in study.runs]
    pairs = {m: (accuracies(study, m), accuracies(study, m + CONTROL)) for m in models}
    return compared(pairs, study.n_images)


def resample(study: Study, model: str, seeds: list[int]) -> tuple[float, float] | None:
    """The bootstrap over seeds and test images; None where a run's predictions are not there."""
    runs = [[study.by_seed(name)[seed] for seed in seeds] for name in (model, "baseline")]
    if not same_labels(runs[0] + runs[1]):
        return None
    return verdicts.bootstrap(*(np.array([run.correct for run in side]) for side in runs))


def same_labels(runs: list[Run]) -> bool:
    """Whether the predictions of these runs are there, and of the same images."""
    first = runs[0].labels
    return all(run.labels is not None and np.array_equal(run.labels, first) for run in runs)


def compare_classes(study: Study, models: list[str]) -> ByClass | None:
    """None where there is nothing to compare or a run's predictions are not there."""
    runs = [run for model in ["baseline", *models] for run in study.runs.get(model, [])]
    if not models or not same_labels(runs):
        return None
    n_classes = max(int(run.labels.max()) for run in runs) + 1

    def of_class(model: str, label: int) -> dict[int, float]:
        by_seed = study.by_seed(model).items()
        return {seed: 100 * run.correct[run.labels == label].mean() for seed, run in by_seed}

    sizes = np.bincount(runs[0].labels, minlength=n_classes)
    labels = [label for label in range(n_classes) if sizes[label]]
    baseline = {label: of_class("baseline", label) for label in labels}
    found = compared(
        {(m, label): (of_class(m, label), baseline[label]) for m in models for label in labels},
        int(sizes[labels].min()),
    )
    names = study.any_run.result.get("classes")
    names = dict(enumerate(names if isinstance(names, list) else ()))
    return ByClass(
        classes=[str(names.get(label, label)) for label in labels],
        baseline=[mean(baseline[label].values()) for label in labels],
        against={model: [found[model, label] for label in labels] for model in models},
    )


def missing_runs(study: Study) -> dict[str, list[int]]:
    """What would complete the table: every model with every seed seen, every published one too."""
    models = in_table_order(study.published.keys() | study.runs.keys())
    missing = {m: [s for s in study.seeds if s not in study.by_seed(m)] for m in models}
    return {model: seeds for model, seeds in missing.items() if seeds}


# --- Cost -----------------------------------------------------------------------------------------


def relative_costs(study: Study, costs: dict, fastest: dict) -> dict[str, Cost]:
    """Of every model that was trained or timed, the baseline first if it is there."""
    models = in_table_order(study.runs.keys() | costs.keys())
    values = {model: costs_in_numbers(study, model, costs, fastest) for model in models}
    base = values.get("baseline", dict.fromkeys(COSTS))
    found = {}
    for model, own in values.items():
        ratios = {
            name: own[name] / base[name] if own[name] and base[name] else None for name in COSTS
        }
        by_seed = training_ratios(study, model)
        ratios["training"] = median(by_seed) if by_seed else None
        if {run.result["device"] for run in study.runs.get(model, [])} != {
            run.result["device"] for run in study.runs.get("baseline", [])
        }:
            ratios["memory"] = None
        found[model] = Cost(own, ratios, (min(by_seed), max(by_seed)) if by_seed else None)
    return found


def costs_in_numbers(study: Study, model: str, costs: dict, fastest: dict) -> dict:
    runs, row = study.runs.get(model, []), costs.get(model, {})
    memory = [run.result.get("peak_memory_mb") for run in runs]
    return {
        "params": runs[0].result["params"] if runs else row["params"],
        "flops": row.get("flops_aten"),
        "eager": row.get("ms_per_image"),
        "fast": fastest[model]["ms_per_image"] if model in fastest and fastest != costs else None,
        "training": median(map(seconds_per_epoch, runs)) if runs else None,
        "memory": median(memory) if memory and all(map(is_finite, memory)) else None,
    }


def seconds_per_epoch(run: Run) -> float:
    return run.result["train_seconds"] / run.result["epochs_run"]


def training_ratios(study: Study, model: str) -> list[float]:
    """Seconds an epoch over the baseline's of the same seed, on one device in one mode."""
    baseline = study.by_seed("baseline")
    return [
        seconds_per_epoch(run) / seconds_per_epoch(baseline[seed])
        for seed, run in study.by_seed(model).items()
        if seed in baseline
        and all(run.result[k] == baseline[seed].result[k] for k in ("device", "mode"))
    ]


def pareto_front(study: Study, against: dict[str, Comparison], costs: dict) -> list[str]:
    """The models that no other on the front beats: better in accuracy or time, worse in neither.

    Ties count as ties: accuracies whose verdict is "not distinguishable", and inference times
    whose ranges from p10 to p90 overlap. Beside the comparisons with the baseline, the other models
    are compared with each other, corrected over these pairs. Only models with a verdict and a time
    are judged. Ties may go round in a circle, so the front is built from the fastest on: a model
    has to hold its own against those that are on it.
    """
    timed = [model for model in study.runs if model in costs]
    timed = [model for model in timed if model in against or model == "baseline"]
    if len(timed) < 2 or "baseline" not in timed:
        return []
    verdict = {(model, "baseline"): comparison.verdict for model, comparison in against.items()}
    pairs = {
        (a, b): (accuracies(study, a), accuracies(study, b))
        for a, b in itertools.combinations(timed, 2)
        if "baseline" not in (a, b)
    }
    found = compared(pairs, study.n_images)
    verdict |= {pair: comparison.verdict for pair, comparison in found.items()}

    def more_accurate(a, b):
        return verdict.get((a, b)) == "better" or verdict.get((b, a)) == "worse"

    def faster(a, b):
        return costs[a]["ms_per_image_p90"] < costs[b]["ms_per_image_p10"]

    def beats(a, b):
        won = more_accurate(a, b) or faster(a, b)
        return won and not more_accurate(b, a) and not faster(b, a)

    front = []
    for model in sorted(timed, key=lambda model: costs[model]["ms_per_image"]):
        if not any(beats(other, model) for other in front):
            front = [other for other in front if not beats(model, other)] + [model]
    return in_table_order(front)
