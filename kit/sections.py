"""The report's sections: findings.py's numbers in words and tables, as lines of Markdown."""

import re
from collections import Counter

from kit.cost_tables import cost_table, how, mode_section, training_ratio
from kit.explained import explained_section
from kit.findings import CONTROL, Cost, Findings
from kit.results import Run, Study, image_of, in_table_order, n_classes_of
from kit.tables import Lines, image, interval, label, number, p_value, table
from kit.verdicts import Comparison


def write_report(
    found: list[Findings], cost_rows: list[dict], problems: Lines, figures: Lines, beside: Lines
) -> str:
    """report.md. figures: of the first study, file names; beside: the section of --compare."""
    lines = ["# Does attention earn its keep in ResNet-18?", ""]
    for i, f in enumerate(found):
        lines += study_section(f, figures if i == 0 else [])
    lines += beside
    lines += mode_section(cost_rows)
    lines += missing_section(found, problems)
    lines += method_section([f.study for f in found], cost_rows)
    return "\n".join(lines) + "\n"


def study_section(f: Findings, figures: Lines) -> Lines:
    """One study: what was found, then what it rests on."""
    study = f.study
    lines = [f"## {study.title}", ""]
    if study.mark:
        lines += [
            f"**{study.mark.capitalize()}.** What is found here holds for runs this short or this "
            "narrow, and says nothing about the models at full size and length.",
            "",
        ]
    seen = [name for name in figures if name.startswith("explain_")]
    seen = explained_section(study, f.explained, seen) if f.explained else []
    sections = [
        ("What was found", finding(f), []),
        ("The published table, with ours beside it" if len(study.published) > 1 else "Every model",
         published_table(f), ["test_accuracy.png"]),
        ("Over seeds", seeds_table(f), []),
        ("Against the baseline", baseline_table(f), ["differences.png"]),
        ("What it costs", cost_table(f), ["accuracy_vs_latency.png", "inference_time.png",
                                          "accuracy_vs_params.png"]),
        ("Class by class", class_table(f), []),
        ("Learning", [], ["learning_curves.png"]),
        ("What attention attends to", seen, []),
    ]  # fmt: skip
    for heading, content, pictures in sections:
        shown = [picture for name in pictures if name in figures for picture in [image(name), ""]]
        if content or shown:
            lines += [f"### {heading}", "", *content, *([""] if content else []), *shown]
    return lines


# --- What was found -------------------------------------------------------------------------------


def finding(f: Findings) -> Lines:
    """The verdicts in sentences that can be quoted."""
    lines = [f"- {sentence(f, model, c)}" for model, c in f.against.items()]
    unjudged = [model for model in f.models if model not in f.against and model != "baseline"]
    if unjudged and "baseline" in f.models:
        lines.append(
            f"- {names(unjudged)}: no verdict, fewer than two seeds in common with the baseline. "
            "One pair of runs cannot tell the model's doing from the seed's."
        )
    lines += control_sentences(f) + front_sentence(f)
    return [headline(f), *(["", *lines] if lines else [])]


def control_sentences(f: Findings) -> Lines:
    return [f"- {control_sentence(f, model, c)}" for model, c in f.controlled.items()]


def front_sentence(f: Findings) -> Lines:
    if not f.front:
        return []
    row, judged = f.costs[f.front[0]], sum(model in f.costs for model in f.against) + 1
    return [
        f"- Accuracy against inference time ({row['mode']}, {row['precision']}), ties counted as "
        f"ties: the Pareto front of {judged} models is {names(f.front)}."
    ]


def headline(f: Findings) -> str:
    """All verdicts in one sentence."""
    if "baseline" not in f.models:
        return "**No verdict:** there is no finished run of the baseline to compare with."
    if len(f.models) == 1:
        return "**No verdict:** only the baseline was trained."
    if not f.against:
        return "**No verdict:** no model has two seeds in common with the baseline."
    n = [len(c.seeds) for c in f.against.values()]
    seeds = f"{n[0]}" if min(n) == max(n) else f"{min(n)} to {max(n)}"
    groups = {}
    for model, c in f.against.items():
        groups.setdefault(c.verdict, []).append(model)
    words = [f"{w} {names(groups[w])}" for w in ("better", "worse", "not distinguishable")
             if w in groups]  # fmt: skip
    against = "In this quick run, against" if f.study.quick else "Against"
    return f"**{against} the baseline, over {seeds} seeds: {'; '.join(words)}.**"


def names(models: Lines) -> str:
    return ", ".join(f"`{model}`" for model in models)


def sentence(f: Findings, model: str, c: Comparison) -> str:
    """The verdict on one model; differences in points of test accuracy."""
    words = {
        "better": "is better than the baseline",
        "worse": "is worse than the baseline",
        "not distinguishable": "is not distinguishable from the baseline",
    }
    quick = " in this quick run" if f.study.quick else ""
    limit = ""
    if c.verdict == "not distinguishable":
        limit = f"; a true difference of {c.detectable:.2f} points is found with a power of 80 %"
    return (
        f"`{model}` {words[c.verdict]}{quick}: {c.accuracy:.2f} % against {c.reference:.2f} %, "
        f"{c.difference:+.2f} points over {len(c.seeds)} seeds ({interval(c.corrected)} after "
        f"correction){price(f.relative[model])}{limit}."
    )


def price(cost: Cost) -> str:
    """What a model costs beside the baseline, as the end of a sentence."""
    words = {"eager": "inference time"}
    if cost.training_spread and not cost.training_spread[0] <= 1 <= cost.training_spread[1]:
        words["training"] = "training time"  # otherwise the seeds do not even agree on the sign
    parts = [f"{cost.ratios[name]:.2f} times its {what}" for name, what in words.items()
             if cost.ratios[name]]  # fmt: skip
    return f", at {' and '.join(parts)}" if parts else ""


def control_sentence(f: Findings, model: str, c: Comparison) -> str:
    """Whether what a module does comes from seeing the image."""
    so = {
        "better": "seeing the image helps",
        "worse": "seeing the image does harm",
        "not distinguishable": "nothing here is shown to come from seeing the image",
    }
    quick = " in this quick run" if f.study.quick else ""
    return (
        f"`{model}` against its control `{model}{CONTROL}` (the same parameters and operations, "
        f"gates that cannot see the image){quick}: {c.accuracy:.2f} % against {c.reference:.2f} %, "
        f"{c.difference:+.2f} points over {len(c.seeds)} seeds ({interval(c.corrected)}): "
        f"{so[c.verdict]}."
    )


# --- Tables of accuracy ---------------------------------------------------------------------------


def published_table(f: Findings) -> Lines:
    """Accuracy, parameters, FLOPs and inference time, the published figure beside each of ours."""
    study = f.study
    header = ["model", "seeds", "test accuracy %", "published", "parameters M", "published"]
    header += ["FLOPs G", "published", "ms/image", "published"]
    rows = []
    for model in in_table_order(study.published.keys() | f.models.keys()):
        summary, cost, published = (x.get(model) for x in (f.models, f.costs, study.published))
        accuracy = "missing"
        if summary:
            spread = f" ± {summary['test_acc_sd']:.2f}" if summary["n"] > 1 else ""
            accuracy = f"{summary['test_acc_mean']:.2f}{spread}"
        params = summary["params"] if summary else cost["params"] if cost else None
        rows.append([
            label(study, model),
            str(summary["n"]) if summary else "0",
            accuracy,
            f"{published['test_acc']:.2f}" if published else "-",
            f"{params / 1e6:.2f}" if params else "-",
            f"{published['params_m']:.2f}" if published else "-",
            f"{cost['flops'] / 1e9:.2f}" if cost else "-",
            f"{published['flops_g']:.2f}" if published else "-",
            f"{cost['ms_per_image']:#.3g}" if cost else "-",
            f"{published['ms_per_image']:.2f}" if published else "-",
        ])  # fmt: skip
    several = any(summary["n"] > 1 for summary in f.models.values())
    n_images = study.n_images
    lines = [
        *table(header, rows),
        "",
        "Test accuracy: with the weights of the best validation epoch"
        + (", mean ± sample standard deviation (n - 1) over seeds" if several else "")
        + (f", on {n_images:,} test images." if n_images else "."),
    ]
    if study.published:
        lines.append(
            "Published: one run per model, 50 epochs, 10,000 test images; inference on an NVIDIA "
            "RTX 4070."
        )
    if f.costs:
        row = next(iter(f.costs.values()))
        lines.append(
            f"ms/image: median inference time at batch {row['batch_size']}, {row['precision']}, "
            f"{row['mode']}, on {row['device']}. FLOPs: 2 x the MACs that thop counts."
        )
    return lines


def seeds_table(f: Findings) -> Lines:
    """Every model's spread over seeds."""
    header = ["model", "n", "mean %", "SD", "95 % interval", "lowest", "highest"]
    header += ["with the last weights", "epochs run", "training s", "images/s"]
    rows = []
    for model, s in f.models.items():
        bounds = s["test_acc_interval"]
        rows.append([
            label(f.study, model),
            str(s["n"]),
            f"{s['test_acc_mean']:.2f}",
            number(s["test_acc_sd"], ".3f"),
            f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else "-",
            f"{s['test_acc_min']:.2f}",
            f"{s['test_acc_max']:.2f}",
            f"{s['test_acc_last_mean']:.2f}",
            f"{s['epochs_run_mean']:.1f}",
            f"{s['train_seconds_mean']:.0f}",
            f"{s['images_per_second_mean']:,.0f}",
        ])  # fmt: skip
    return [
        *table(header, rows),
        "",
        "SD: sample standard deviation (n - 1). Interval: Student's t, for the mean over seeds.",
    ]


def baseline_table(f: Findings) -> Lines:
    """Every comparison with the baseline, and the tests that others would have chosen."""
    if not f.against:
        return []
    header = ["model", "pairs", "difference", "corrected interval", "verdict", "p, Holm"]
    header += ["detectable", "95 % interval", "seeds and images", "p, paired", "p, Welch"]
    header += ["P(better)", "correlation"]
    rows = [
        [
            label(f.study, model),
            str(len(c.seeds)),
            f"{c.difference:+.2f}",
            interval(c.corrected),
            c.verdict,
            p_value(c.p_holm),
            f"{c.detectable:.2f}",
            interval(c.interval),
            interval(f.resampled[model]),
            p_value(c.p),
            p_value(c.p_welch),
            f"{c.prob_better:.2f}",
            number(c.correlation, "+.2f"),
        ]
        for model, c in f.against.items()
    ]
    return [
        *table(header, rows),
        "",
        "Differences in points of test accuracy, seed by seed. Verdict: the paired t test with "
        "Holm's correction over the comparisons of this table at 5 %, chosen before any result; "
        "the corrected interval excludes 0 exactly then. Detectable: the smallest true difference "
        "that a study with this many seeds and this spread finds with a power of 80 %. Beside it, "
        "uncorrected: a bootstrap over seeds and test images (4,000 draws, 95 %), the paired test, "
        "Welch's, P(better) (Mann-Whitney's U / n², ties half), and the correlation of the pairs: "
        "where it is positive, the paired test gains by it.",
    ]


def class_table(f: Findings) -> Lines:
    """The baseline's accuracy of every class, and every model's difference from it."""
    if not f.against:
        return []
    if f.by_class is None:
        return ["Not made: a run lacks usable `test_predictions.npy` and `test_labels.npy`."]
    models = list(f.by_class.against)
    rows, held = [], []
    for i, name in enumerate(f.by_class.classes):
        name = re.sub(r"([*_`|\\<])", r"\\\1", name)
        cells = [name, f"{f.by_class.baseline[i]:.2f}"]
        for model in models:
            c = f.by_class.against[model][i]
            text = f"{c.difference:+.2f}"
            cells.append(text if c.verdict == "not distinguishable" else f"**{text}**")
        rows.append(cells)
        verdicts = {f.by_class.against[model][i].verdict for model in models}
        held.append(verdicts != {"not distinguishable"})
    n_compared, shown = len(rows) * len(models), ""
    if len(rows) > 40:
        shown = f"Of {len(rows)} classes those with a difference that holds. "
        rows = [row for row, holds in zip(rows, held, strict=True) if holds]
    return [
        *table(["class", "baseline %", *(label(f.study, model) for model in models)], rows),
        "",
        f"{shown}Mean paired difference from the baseline, in points of the accuracy on the test "
        f"images of one class. Bold: holds after Holm's correction over all {n_compared} of "
        "this table at 5 %.",
    ]


# --- Beside other runs ----------------------------------------------------------------------------


def beside_section(
    here: Findings, there: Findings, folder: str, comparisons: dict[str, Comparison]
) -> Lines:
    """The same models in two sets of runs. comparisons: here against there, by model."""
    header = ["model", "n here", "here %", "n there", "there %", "common seeds", "difference"]
    header += ["corrected", "verdict", "s an epoch here", "there"]
    rows = []
    for model in in_table_order(here.models.keys() & there.models.keys()):
        a, b, c = here.models[model], there.models[model], comparisons.get(model)
        rows.append([
            label(here.study, model),
            str(a["n"]),
            f"{a['test_acc_mean']:.2f}",
            str(b["n"]),
            f"{b['test_acc_mean']:.2f}",
            str(len(set(a["seeds"]) & set(b["seeds"]))),
            f"{c.difference:+.2f}" if c else "-",
            interval(c.corrected) if c else "-",
            c.verdict if c else "none: fewer than two common seeds",
            f"{here.relative[model].values['training']:.1f}",
            f"{there.relative[model].values['training']:.1f}",
        ])  # fmt: skip
    lines = [f"## Beside {folder}: {there.study.title}", ""]
    if there.study.mark:
        lines += [f"**There: {there.study.mark}.**", ""]
    if not rows:
        return [*lines, "No model has finished runs in both.", ""]
    devices = [
        sorted({f"{r.result['device']}, {r.result['precision']}, {r.result['mode']}"
                for runs in f.study.runs.values() for r in runs})
        for f in (here, there)
    ]  # fmt: skip
    lines += [
        *table(header, rows),
        "",
        "Here against there, paired by seed, which fixes split and order"
        + (" and the backbone's first weights" if here.study.width == there.study.width else "")
        + "; Holm's correction over the models of this table. Here: "
        f"{here.study.title}; {'; '.join(devices[0])}. There: {there.study.title}; "
        f"{'; '.join(devices[1])}.",
        "",
    ]
    return lines


# --- In the README --------------------------------------------------------------------------------


def readme_block(f: Findings, folder: str) -> Lines:
    """The first study in brief, as it stands in the README between its markers."""
    published = {} if f.study.quick else f.study.published
    header = ["model", "seeds", "test accuracy %", *(["published"] if published else [])]
    header += ["against the baseline", "verdict", "detectable", "parameters", "inference"]
    header += ["training"]
    rows = []
    for model, s in f.models.items():
        c, cost = f.against.get(model), f.relative[model]
        beside = [f"{published[model]['test_acc']:.2f}" if model in published else "-"]
        rows.append([
            label(f.study, f"`{model}`"),
            str(s["n"]),
            f"{s['test_acc_mean']:.2f}" + (f" ± {s['test_acc_sd']:.2f}" if s["n"] > 1 else ""),
            *(beside if published else []),
            f"{c.difference:+.2f} ({interval(c.corrected)})" if c else "-",
            c.verdict if c else "-",
            f"{c.detectable:.2f}" if c else "-",
            f"{s['params']:,}",
            "-" if cost.ratios["eager"] is None else f"{cost.ratios['eager']:.2f}x",
            training_ratio(cost),
        ])  # fmt: skip
    timed = next(iter(f.costs.values()), None)
    mark = f"{f.study.mark.capitalize()}. " if f.study.mark else ""
    return [
        f"{mark}{f.study.title}. {'; '.join(environments([f.study]))}.",
        "",
        headline(f),
        "",
        *table(header, rows),
        "",
        *control_sentences(f),
        *front_sentence(f),
        "",
        "Accuracy: mean ± sample standard deviation over seeds. Against the baseline: points, with "
        "the interval after Holm's correction. Detectable: the true difference that these seeds "
        "find with a power of 80 %. "
        + (
            f"Inference ({how(timed)}, batch {timed['batch_size']}) and training"
            if timed
            else "Training"
        )
        + " time beside the baseline's (lowest to highest over seeds). "
        + ("Published: one run a model. " if published else "")
        + f"All of it: [{folder}/report.md]({folder}/report.md).",
    ]


# --- What is missing, and how it was measured -----------------------------------------------------


def missing_section(found: list[Findings], problems: Lines) -> Lines:
    """Runs that would complete a table, and all that was found damaged on the way."""
    lines = list(problems)
    for f in found:
        if f.missing:
            runs = [
                f"{model} seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
                for model, seeds in f.missing.items()
            ]
            lines.append(f"{f.study.title}: no run of {', '.join(runs)}")
        if not f.costs:
            lines.append(
                f"{f.study.title}: no FLOPs and no inference time: run `python benchmark.py "
                f"--width {f.study.width} --image {image_of(f.study)} --classes "
                f"{n_classes_of(f.study)} --out` with the folder of this report"
            )
    if all(f.study.quick for f in found):
        lines.append("every full run: `./run_all.sh full`")
    lines = [" ".join(line.split()) for line in lines]  # names of folders may hold anything
    lines = lines or ["Nothing: every run of the table is there."]
    return ["## What is missing", "", *(f"- {line}" for line in lines), ""]


def method_section(studies: list[Study], cost_rows: list[dict]) -> Lines:
    """Environment and commands, from env.json and config.json."""
    runs = [run for study in studies for runs in study.runs.values() for run in runs]
    lines = ["## How it was measured", ""]
    lines += [f"- {words}" for words in environments(studies)]
    for run in runs:
        if run.result.get("fallback"):
            lines.append(f"- {run.folder}: {run.result['fallback']}")
    for device, torch in sorted({(row["device"], row["torch"]) for row in cost_rows}):
        lines.append(f"- inference: {device}; torch {torch}")
    lines += [
        "- One seed fixes split, order and the backbone's first weights for all models alike, so "
        "models are compared seed by seed.",
        "- The epoch is chosen on validation images; the test images are used once, at the end.",
        "",
        "### Limits",
        "",
        "- Seeds stand for training again on the same images with the same recipe. Other data, "
        "recipes or sizes may give other answers.",
        "- Not distinguishable does not mean equal: it means that this many seeds could not tell.",
        "- At the start CBAM's two gates damp a residual branch about fourfold, SE's gate twofold.",
        "- cbam_classifier, as published, gates a 1x1 map: average and maximum coincide there.",
        "",
        "### Commands",
        "",
        "```sh",
        *(str(run.config["command"]) for run in runs if "command" in run.config),
        "```",
    ]
    return lines


def environments(studies: list[Study]) -> Lines:
    """What the runs were made with, each kind with their number, and when."""
    runs = [run for study in studies for runs in study.runs.values() for run in runs]
    counted = Counter(environment(run) for run in runs)
    lines = [f"{n} run{'s' * (n > 1)}: {words}" for words, n in counted.items()]
    if dates := sorted({str(run.env["date"]) for run in runs if "date" in run.env}):
        lines.append(f"trained on {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}")
    return lines


def environment(run: Run) -> str:
    """What a run was made with, in words, from env.json and result.json."""

    def known(key, otherwise="unknown"):
        return run.env.get(key) or otherwise

    image = run.env.get("image")
    of_image = image.get("revision") if isinstance(image, dict) else None
    commit = run.env.get("git_commit") or of_image or "unknown"
    return (
        f"{run.result['device']}, {run.result['precision']}, {run.result['mode']}; torch "
        f"{known('torch')}, CUDA {known('cuda')}, driver {known('driver', 'none')}, Python "
        f"{known('python')}; commit {str(commit)[:12]}"
        + (" with uncommitted changes" if run.env.get("git_dirty") else "")
    )
