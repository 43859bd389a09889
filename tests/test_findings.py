"""A study's numbers against slow, obvious ways to get them."""

import itertools
import json

from kit import verdicts, words
from kit.costs import measured
from kit.findings import Findings
from kit.results import read_studies

import numpy as np
import pytest
from conftest import copy_run
from scipy import stats

CLASSES = 10


@pytest.fixture
def make_study(finished_run, tmp_path):
    """{model: [accuracy of seed 0, ...]} -> its only study; results changed by `changes`."""

    def make(accuracies, **changes):
        for model, values in accuracies.items():
            for seed, value in enumerate(values):
                own = {key: value[model][seed] for key, value in changes.items()}
                copy_run(finished_run, tmp_path, model, seed, test_acc=value, **own)
        (study,), problems = read_studies(tmp_path)
        assert not problems
        return study

    return make


def row(model, ms, spread=0.01):
    """A row of benchmark.json whose p10 and p90 lie `spread` beside the median."""
    return {
        "model": model, "params": 700_000, "flops": 9e8, "flops_aten": 9e8, "batch_size": 64,
        "precision": "fp32", "mode": "eager", "width": 8, "ms_per_image": ms,
        "ms_per_image_p10": ms * (1 - spread), "ms_per_image_p90": ms * (1 + spread),
        "ms_per_image_p99": 2 * ms, "device": "a test", "torch": "2", "image": "1x28x28",
        "classes": 10, "sha256": {},
    }  # fmt: skip


BASE = [93.0, 93.1, 93.2, 93.3, 93.4]
MORE = [94.0, 94.12, 94.19, 94.3, 94.4]  # a point more, seed by seed
SAME = [93.1, 93.0, 93.2, 93.4, 93.3]
WIDE = [93.0, 95.0, 92.5, 95.5, 94.5]  # perhaps more, perhaps not
LESS = [92.0, 92.12, 92.19, 92.3, 92.4]


@pytest.mark.parametrize(
    ("accuracies", "ms", "front"),
    [
        ({"se": SAME}, {"se": 2.0}, ["baseline"]),  # slower, and equivalent
        ({"se": SAME}, {"se": 0.5}, ["se"]),
        ({"se": MORE}, {"se": 2.0}, ["baseline", "se"]),  # slower but better
        ({"se": MORE}, {"se": 0.5}, ["se"]),
        ({"se": SAME}, {"se": 1.01}, ["baseline", "se"]),  # slower, which may be chance
        ({"se": LESS}, {"se": 0.5}, ["baseline", "se"]),  # worse but faster
        ({"se": WIDE}, {"se": 2.0}, ["baseline", "se"]),  # undecided: it may be more accurate
        ({"se": MORE, "eca": MORE}, {"se": 2.0, "eca": 3.0}, ["baseline", "se"]),
    ],
)
def test_a_model_drops_out_on_shown_grounds_alone(make_study, accuracies, ms, front):
    study = make_study({"baseline": BASE} | accuracies)
    rows = [row("baseline", 1.0), *(row(model, time) for model, time in ms.items())]
    assert Findings(study, rows).front == front


def test_the_front_is_of_the_seeds_that_models_share(make_study):
    """se is better in every pair, though the baseline's mean over all its seeds is higher."""
    study = make_study({"baseline": [93.0, 93.1, 93.2, 95.3, 95.4], "se": [93.5, 93.61, 93.7]})
    found = Findings(study, [row("baseline", 1.0), row("se", 2.0)])
    assert found.against["se"].verdict == "better" and found.front == ["baseline", "se"]


def test_times_may_be_whole_numbers(make_study):
    times = {"ms_per_image": 2, "ms_per_image_p10": 1, "ms_per_image_p90": 3}
    rows = [row(model, 1.0) | times for model in ("baseline", "se")]
    study = make_study({"baseline": [93, 94, 93], "se": [92, 93, 92]})
    assert Findings(study, rows).front == ["baseline", "se"]


def test_no_front_without_verdicts_or_times(make_study):
    study = make_study({"baseline": BASE, "se": [93.0]})
    assert Findings(study, [row("baseline", 1.0), row("se", 2.0)]).front == []
    assert Findings(study, []).front == []


def test_two_pairs_that_happen_to_agree_are_no_proof(make_study):
    found = Findings(make_study({"baseline": [92.9, 93.1], "se": [92.93, 93.13]}), [])
    assert found.against["se"].sd == pytest.approx(0.01)  # one image of 10,000
    assert found.against["se"].verdict not in ("better", "worse")


def test_a_control_is_compared_with_its_own_module(make_study):
    found = Findings(make_study({"baseline": BASE, "se": MORE, "se_static": SAME}), [])
    c = found.controlled["se"]
    assert c.difference == pytest.approx(np.mean(MORE) - np.mean(SAME))
    assert c.p_holm == pytest.approx(stats.ttest_rel(MORE, SAME).pvalue)
    assert c.verdict == "better" and list(found.controlled) == ["se"]


def test_a_variant_is_compared_with_the_control_of_its_own(make_study):
    accuracies = {"baseline": BASE, "se_r8": MORE, "se_static": SAME, "se_static_r8": BASE}
    found = Findings(make_study(accuracies), [])
    assert list(found.controlled) == ["se_r8"] and found.controls["se_r8"] == "se_static_r8"
    assert found.controlled["se_r8"].difference == pytest.approx(np.mean(MORE) - np.mean(BASE))


def test_the_published_way_is_pytorchs_default_where_that_was_measured(make_study):
    study = make_study({"baseline": BASE})
    rows = [row("baseline", 2.0), row("se", 3.0)]
    assert measured(study, rows)["baseline"]["ms_per_image"] == 2.0
    rows.append(row("baseline", 1.0) | {"precision": "default"})
    found = measured(study, rows)  # never one model this way and another that
    assert {model: own["ms_per_image"] for model, own in found.items()} == {"baseline": 1.0}


def test_costs_are_relative_to_the_baseline(make_study):
    seconds = {"baseline": [100, 200, 100], "se": [150, 220, 130]}
    memory = {"baseline": [1000.0] * 3, "se": [1100.0, 1200.0, 1300.0]}
    accuracies = {model: BASE[:3] for model in seconds}
    study = make_study(accuracies, train_seconds=seconds, peak_memory_mb=memory)
    rows = [row("baseline", 1.0), row("se", 1.5) | {"flops_aten": 9.9e8}]
    rows += [row(m, ms) | {"mode": "compile"} for m, ms in (("baseline", 0.5), ("se", 0.6))]
    rows += [row(m, ms) | {"mode": "graph"} for m, ms in (("baseline", 0.7), ("se", 0.7))]
    for run in study.all_runs:
        run.env["shared_gpu"] = False
    ratios = Findings(study, rows).relative["se"].ratios
    expected = dict(training=1.5, memory=1.2, inference=1.5, flops=1.1, fastest=1.2)
    assert {key: ratios[key] for key in expected} == pytest.approx(expected)
    run = study.runs["se"][0]
    for shared in (True, None):  # None: not known, as on a CPU
        run.env["shared_gpu"] = shared
        ratios = Findings(study, rows).relative["se"].ratios
        assert (ratios["training"], ratios["memory"]) == (None, 1.2)
    run.result["device"], run.env["shared_gpu"] = "another", False
    ratios = Findings(study, rows).relative["se"].ratios
    assert ratios["training"] is None and ratios["memory"] is None


def test_the_seeds_count_that_both_should_have(make_study):
    study = make_study({"baseline": [93.0, 93.1, 93.2], "se": [93.9, 94.0, 94.11]})

    def verdict(*plans):
        study.plans = [dict(models=models.split(), seeds=seeds) for models, seeds in plans]
        return words.verdict(Findings(study, []).against["se"])

    both = ("baseline se", [0, 1, 2])
    assert verdict(both) == "better"
    assert verdict(both, ("baseline eca", [0, 1, 2, 3, 4, 5])) == "better"  # more of the baseline
    assert verdict(("baseline se", [0, 1, 3])) == "interim, 2 of 3"  # seed 2 is none of them
    assert verdict(("se", [0, 1, 2, 3])) == "interim, 3 of 4"


def test_seeds_beyond_the_plan_are_not_compared(make_study):
    """Or runs could be added by hand until a difference is significant."""
    study = make_study({"baseline": BASE, "se": MORE[:4]})
    study.plans = [dict(models=["baseline", "se"], seeds=[0, 1, 2])]
    found = Findings(study, [])
    assert found.against["se"].seeds == [0, 1, 2] and found.level == 0.05
    assert {(run.result["model"], run.seed) for run in found.unplanned} == {
        ("baseline", 3), ("baseline", 4), ("se", 3),
    }  # fmt: skip
    differences = np.subtract(MORE, BASE)[:3]
    assert found.spread.of_difference == pytest.approx(max(0.01, differences.std(ddof=1)))


def test_all_planned_models_count_and_every_change_of_a_pair_s_seeds(make_study):
    study = make_study({"baseline": BASE, "se": MORE})

    def found(*plans):
        study.plans = [dict(models=models.split(), seeds=seeds) for models, seeds in plans]
        found = Findings(study, [])
        c = found.against["se"]
        return round(c.p_holm / c.p), round(0.05 / found.level)

    five = [0, 1, 2, 3, 4]
    assert found() == (1, 1) == found(("baseline se", five))
    assert found(("baseline se eca", five)) == (2, 1)  # eca has not finished
    assert found(("baseline se", five), ("baseline se eca", five)) == (2, 1)  # no more seeds
    assert found(("baseline se", [0, 1]), ("baseline se", five)) == (1, 2)
    assert found(("baseline se", [0]), ("baseline se", five)) == (1, 1)  # one seed shows nothing
    assert found(("baseline se", five), ("baseline", [5, 6])) == (1, 1)
    assert found(("se", five), ("baseline", [0, 1]), ("baseline", five)) == (1, 2)
    control = ("se se_static", five)  # se against its control is a comparison too
    assert found(("baseline se se_static", [0, 1]), control) == (2, 2)


def test_models_with_disjoint_plans_have_no_verdict(make_study):
    study = make_study({"baseline": BASE, "se": MORE, "eca": [93.0]})
    study.plans = [dict(models=["baseline"], seeds=[0, 1]), dict(models=["se"], seeds=[2, 3])]
    assert Findings(study, []).against == {}
    study.plans = [dict(models=["baseline", "se"], seeds=[0, 1, 2, 3, 4])]
    found = Findings(study, [])  # of eca one run was made by hand
    assert found.family == ["se"] and found.against["se"].p_holm == found.against["se"].p


def test_the_spread_is_pooled_over_all_models(make_study):
    """With equal seeds: the mean variance of the differences of all pairs of models."""
    accuracies = {"baseline": BASE, "se": MORE, "eca": SAME, "gc": WIDE}
    spread = Findings(make_study(accuracies), []).spread
    pairs = [np.subtract(a, b) for a, b in itertools.combinations(accuracies.values(), 2)]
    variance = np.mean([np.var(differences, ddof=1) for differences in pairs])
    assert spread.of_difference == pytest.approx(variance**0.5)


def test_class_by_class_as_counted_one_by_one(make_study):
    study = make_study({"baseline": BASE * 2, "se": BASE * 2})
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(CLASSES), 10))
    for runs in study.runs.values():
        for run in runs:
            run.labels, right = labels, generator.random(100) < 0.8
            run.predictions = np.where(right, labels, labels + 1)
            run.result["test_images"] = 100
    found = Findings(study, []).by_class
    p_values = []
    for i, name in enumerate(found.classes):
        accuracy = {"baseline": [], "se": []}
        for model, runs in study.runs.items():
            for run in runs:
                right = [run.correct[k] for k in range(100) if labels[k] == i]
                accuracy[model].append(100 * sum(right) / len(right))
        assert name == study.result["classes"][i]
        assert found.baseline[i] == pytest.approx(np.mean(accuracy["baseline"]))
        c = found.against["se"][i]
        assert c.difference == pytest.approx(np.mean(accuracy["se"]) - found.baseline[i])
        p_values.append(c.p)
    assert [c.p_holm for c in found.against["se"]] == pytest.approx(verdicts.holm(p_values))
    study.plans = [dict(models=["baseline", "se"], seeds=list(range(20)))]
    assert Findings(study, []).by_class is None  # interim: nothing is significant yet


def test_a_class_of_few_images_hides_no_other(make_study):
    """Of one image, where an accuracy is 0 or 100%; the others have a thousand and more."""
    study = make_study({"baseline": BASE * 2, "se": MORE * 2})
    labels = np.repeat([0, 1, 2], [1, 4000, 5999])
    for model, runs in study.runs.items():
        for run in runs:
            wrong = 400 - 200 * (model == "se") + run.seed * (3 if model == "se" else 2)
            run.labels, run.predictions = labels, labels.copy()
            run.predictions[1 : 1 + wrong] = 0
            vars(run).pop("correct", None)
    _, second, _ = Findings(study, []).by_class.against["se"]
    assert second.verdict == "better" and second.sd < 1


def test_without_labels_there_are_no_classes(make_study):
    study = make_study({"baseline": BASE * 2, "se": SAME * 2})
    assert Findings(study, []).by_class
    study.runs["se"][0].labels = None
    found = Findings(study, [])
    assert found.by_class is None and found.spread.from_images is None
    assert json.dumps(found.models)  # plain numbers


def test_epochs_until_early_stopping_and_accuracy(make_study):
    study = make_study({"baseline": BASE, "se": LESS})
    assert Findings(study, []).stopping is None  # as many epochs in all runs
    for run, epochs in zip(study.all_runs, [9, 15, 12, 50, 33, 4, 7, 9, 7, 8], strict=True):
        run.result["epochs_run"] = epochs
    values = [[run.result[key] for run in study.all_runs] for key in ("epochs_run", "test_acc")]
    assert Findings(study, []).stopping == pytest.approx(stats.pearsonr(*values).statistic)
    del study.runs["se"][0]
    assert Findings(study, []).stopping is None  # nine runs are few


def test_where_the_spread_comes_from(make_study):
    """By hand: of each image the variance over seeds, and of accuracies."""
    study = make_study({"baseline": BASE, "se": MORE})
    spread = Findings(study, []).spread
    accuracies = [np.std(values, ddof=1) for values in (BASE, MORE)]
    assert spread.over_seeds == pytest.approx(np.mean(np.square(accuracies)) ** 0.5)
    own = [np.var([run.correct for run in runs], axis=0, ddof=1) for runs in study.runs.values()]
    assert spread.from_images == pytest.approx(100 * np.mean(own, 0).sum() ** 0.5 / 10_000)
    differences = np.subtract(MORE, BASE)
    assert spread.of_difference == pytest.approx(differences.std(ddof=1))
    floor = 0.0
    pairs = zip(study.runs["se"], study.runs["baseline"], strict=True)
    right = np.array([a.correct.astype(int) - b.correct for a, b in pairs])
    for image in right.T[:10_000]:
        floor += np.var(image, ddof=1)
    assert spread.difference_from_images == pytest.approx(100 * floor**0.5 / 10_000)
    low, high = spread.interval
    assert low < spread.of_difference < high
    power = verdicts.power(0.2, spread.of_difference, spread.seeds_needed[0.2][0])
    assert power >= 0.8


def test_an_unbalanced_test_set_has_its_balanced_accuracy_beside(make_study):
    study = make_study({"baseline": BASE[:2], "se": BASE[:2]})
    assert Findings(study, []).balance is None  # ten equal classes
    labels = np.repeat([0, 1, 2], [80, 10, 10])
    for run in study.all_runs:
        run.labels, run.predictions = labels, labels.copy()
        run.predictions[80:85] = 0  # half of the second class
        vars(run).pop("correct", None)
    share, balanced = Findings(study, []).balance
    assert share == 80 and balanced["se"] == pytest.approx((100 + 50 + 100) / 3)
