"""What a study shows, in numbers: each model's spread, its difference from the baseline, its cost.

Everything is worked out here once; report.md puts it into words, figures.py draws it.
"""

import itertools
from dataclasses import dataclass
from statistics import mean, median, stdev

import numpy as np

from kit import verdicts
from kit.results import Run, Study, in_table_order
from kit.verdicts import Comparison

CONTROL = "_static"  # se_static is the control of se: as many parameters, but blind gates


@dataclass
class ByClass:
    """Test accuracy of every class; the comparisons are corrected over models and classes."""

    classes: list[str]
    baseline: list[float]  # percent, mean over the seeds
    against_baseline: dict[str, list[Comparison]]  # model -> a comparison for each class


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

    @property
    def timed(self) -> dict | None:
        """A row of costs: batch size, mode, precision and device are those of all of them."""
        return next(iter(self.costs.values()), None)

    @property
    def unjudged(self) -> list[str]:
        """Models that were trained, as the baseline was, but have no verdict."""
        others = [m for m in self.models if m != "baseline" and m not in self.against]
        return others if "baseline" in self.models else []


def find(study: Study, cost_rows: list[dict], explained: list[dict] = ()) -> Findings:
    """Everything about one study. cost_rows: benchmark.json's; explained: explained_of()'s."""
    costs, fastest = costs_of(study, cost_rows), fastest_costs_of(study, cost_rows)
    against = compare(study, {m: (m, "baseline") for m in study.runs if m != "baseline"})
    with_control = [model for model in study.runs if model + CONTROL in study.runs]
    wanted = in_table_order(study.published.keys() | study.runs.keys())
    missing = {m: [s for s in study.seeds if s not in study.by_seed(m)] for m in wanted}
    return Findings(
        study=study,
        models={model: summarize(runs) for model, runs in study.runs.items()},
        against=against,
        resampled={model: resample(study, model, c.seeds) for model, c in against.items()},
        controlled=compare(study, {model: (model, model + CONTROL) for model in with_control}),
        by_class=compare_classes(study, list(against)),
        costs=costs,
        fastest=fastest,
        relative=relative_costs(study, costs, fastest),
        front=pareto_front(study, against, costs),
        missing={model: seeds for model, seeds in missing.items() if seeds},
        explained=list(explained),
    )


# --- Accuracy -------------------------------------------------------------------------------------


def summarize(runs: list[Run]) -> dict:
    """Over the seeds of one model. sd: the sample standard deviation (n - 1); None for one run."""
    results = [run.result for run in runs]
    accuracies = [result["test_acc"] for result in results]
    n, middle = len(results), mean(accuracies)
    sd = stdev(accuracies) if n > 1 else None
    means = ("test_acc_last", "val_acc", "epochs_run", "train_seconds", "images_per_second")
    return {
        "n": n,
        "seeds": [run.seed for run in runs],
        "test_acc_mean": middle,
        "test_acc_sd": sd,
        "test_acc_interval": verdicts.t_interval(middle, sd, n, verdicts.LEVEL) if n > 1 else None,
        "test_acc_min": min(accuracies),
        "test_acc_max": max(accuracies),
        **{f"{key}_mean": mean(result[key] for result in results) for key in means},
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


def compare(study: Study, pairs: dict[str, tuple[str, str]]) -> dict[str, Comparison]:
    """{name: (model, reference)} to comparisons."""
    of_models = {k: tuple(accuracies(study, model) for model in pair) for k, pair in pairs.items()}
    return compared(of_models, study.result["test_images"])


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
    labels, sizes = np.unique(runs[0].labels, return_counts=True)

    def of_class(model: str, label: int) -> dict[int, float]:
        by_seed = study.by_seed(model).items()
        return {seed: 100 * run.correct[run.labels == label].mean() for seed, run in by_seed}

    baseline = {label: of_class("baseline", label) for label in labels}
    found = compared(
        {(m, label): (of_class(m, label), baseline[label]) for m in models for label in labels},
        int(sizes.min()),
    )
    names = dict(enumerate(study.result["classes"]))
    return ByClass(
        classes=[str(names.get(label, label)) for label in labels],
        baseline=[mean(baseline[label].values()) for label in labels],
        against_baseline={model: [found[model, label] for label in labels] for model in models},
    )


# --- Cost -----------------------------------------------------------------------------------------


def costs_of(study: Study, rows: list[dict], mode="eager", precision="fp32") -> dict[str, dict]:
    """{model: its row} at this study's width and images, and batch 64, or else the largest."""
    result = study.result
    own = (result["width"], "x".join(map(str, result["image"])), len(result["classes"]))
    rows = [
        row for row in rows
        if (row["mode"], row["precision"]) == (mode, precision)
        and (row.get("width", 64), row.get("image", "1x28x28"), row.get("classes", 10)) == own
    ]  # fmt: skip
    first = next((row for row in rows if row["model"] == "baseline"), rows[0] if rows else {})
    for key in ("device", "torch"):  # times are compared on one machine
        rows = [row for row in rows if row.get(key) == first.get(key)]
    sizes = {row["batch_size"] for row in rows}
    size = 64 if 64 in sizes else max(sizes, default=64)
    return {row["model"]: row for row in rows if row["batch_size"] == size}


def fastest_costs_of(study: Study, rows: list[dict]) -> dict[str, dict]:
    """As costs_of, in the mode and precision in which the models took the least time together."""
    variants = sorted({(row["mode"], row["precision"]) for row in rows})
    measured = [costs_of(study, rows, *variant) for variant in variants]
    most = max(map(len, measured), default=0)
    return min(
        (costs for costs in measured if len(costs) == most),
        key=lambda costs: sum(row["ms_per_image"] for row in costs.values()),
        default={},
    )


def relative_costs(study: Study, costs: dict, fastest: dict) -> dict[str, Cost]:
    """Of every model that was trained or timed, the baseline first if it is there."""
    values, found = {}, {}
    for model in in_table_order(study.runs.keys() | costs.keys()):
        runs, row = study.runs.get(model, []), costs.get(model, {})
        memory = [run.result.get("peak_memory_mb") for run in runs]
        values[model] = {
            "params": runs[0].result["params"] if runs else row["params"],
            "flops": row.get("flops_aten"),
            "eager": row.get("ms_per_image"),
            "fast": fastest.get(model, {}).get("ms_per_image") if fastest != costs else None,
            "training": median(map(seconds_per_epoch, runs)) if runs else None,
            "memory": median(memory) if memory and all(memory) else None,
        }
    base, base_runs = values.get("baseline", dict.fromkeys(COSTS)), study.by_seed("baseline")
    for model, own in values.items():
        ratios = {k: own[k] / base[k] if own[k] and base[k] else None for k in COSTS}
        runs = study.by_seed(model)
        by_seed = [  # on one device in one mode
            seconds_per_epoch(runs[seed]) / seconds_per_epoch(base_runs[seed])
            for seed in runs.keys() & base_runs.keys()
            if all(runs[seed].result[k] == base_runs[seed].result[k] for k in ("device", "mode"))
        ]
        ratios["training"] = median(by_seed) if by_seed else None
        devices = [{run.result["device"] for run in side.values()} for side in (runs, base_runs)]
        ratios["memory"] = ratios["memory"] if devices[0] == devices[1] else None
        found[model] = Cost(own, ratios, (min(by_seed), max(by_seed)) if by_seed else None)
    return found


def seconds_per_epoch(run: Run) -> float:
    return run.result["train_seconds"] / run.result["epochs_run"]


def pareto_front(study: Study, against: dict[str, Comparison], costs: dict) -> list[str]:
    """The models that no other on the front beats: better in accuracy or time, worse in neither.

    Ties count as ties: accuracies whose verdict is "not distinguishable", and inference times
    whose ranges from p10 to p90 overlap. Beside the comparisons with the baseline, the other models
    are compared with each other, corrected over these pairs. Only models with a verdict and a time
    are judged. Ties may go round in a circle, so the front is built from the fastest on: a model
    has to hold its own against those that are on it.
    """
    timed = [m for m in study.runs if m in costs and (m in against or m == "baseline")]
    if len(timed) < 2 or "baseline" not in timed:
        return []
    pairs = [pair for pair in itertools.combinations(timed, 2) if "baseline" not in pair]
    found = {(model, "baseline"): c for model, c in against.items()}
    found |= compare(study, {pair: pair for pair in pairs})
    verdict = {pair: comparison.verdict for pair, comparison in found.items()}

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


# --- What attention attends to --------------------------------------------------------------------


def explained_of(study: Study, rows: list[dict]) -> tuple[list[dict], list[str]]:
    """The rows that are of this study's runs, and those that are of other weights, in words."""
    found, problems = {}, []
    wanted = {"dataset": study.dataset, "recipe": study.recipe, "overrides": study.overrides}
    for row in rows:
        run, n = study.by_seed(row["model"]).get(row["seed"]), row["test_images"]
        if run is None or not wanted.items() <= row.items():
            continue
        accuracy = run.result["test_acc"] if n == run.result["test_images"] else row["test_acc"]
        if run.correct is not None:
            accuracy = 100 * run.correct[:n].mean()
        if abs(accuracy - row["test_acc"]) <= 0.5:  # precisions may differ by so much, not by more
            found.setdefault(row["model"], []).append(row)
        else:
            problems.append(
                f"explain.json: {row['model']} seed {row['seed']} left out, it has "
                f"{row['test_acc']:.2f} % where the run has {accuracy:.2f} %: run python "
                "explain.py again"
            )
    return [row for model in in_table_order(found) for row in found[model]], problems


def ablation(row: dict) -> tuple[float, tuple[float, float]] | None:
    """(points that fixing the gates adds, its 95 % interval over test images); None: no gates.

    Of n images `won` are right only with gates fixed, `lost` only with gates as they are. The
    interval is Wald's for paired proportions with 1/2 added to each cell (Agresti and Min,
    Statistics in Medicine 24, 2005), which says something even where no image changes.
    """
    if row.get("test_acc_gates_fixed") is None:
        return None
    n, won, lost = row["test_images"], row["won"], row["lost"]
    middle = (won - lost) / (n + 2)
    error = 1.96 * (won + lost + 1 - (won - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return 100 * (won - lost) / n, (100 * (middle - error), 100 * (middle + error))
