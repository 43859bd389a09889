"""From run folders to a report: the published table with our figures beside it, and pictures.

    python report.py                                  # runs/ and results/benchmark.json -> results/
    python report.py --runs DIR --out DIR             # benchmark.json may lie in either
    python report.py --power --sd 0.15 --difference 0.2    # how many seeds does that take?

Reads files alone and needs no torch: copy the small files of a run folder to a laptop and it works
there, in a few seconds. Every model is compared with the baseline, seed by seed, and gets a verdict
(verdicts.py). Writes report.md, results.csv, summary.json and five figures.

Runs are compared only within a study: one data set, one recipe, the same explicit settings. A study
that is shorter or narrower than its recipe is marked as a quick run wherever its figures stand.
"""

import argparse
import csv
import io
import json
import signal
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import numpy as np

import verdicts
from figures import FIGURES, draw_figures
from files import write_atomically
from studies import (
    PUBLISHED,
    RUN_COLUMNS,
    ReportError,
    Run,
    Study,
    costs_of,
    fastest_costs_of,
    in_table_order,
    read_costs,
    read_studies,
)
from verdicts import Comparison

# --- Statistics -----------------------------------------------------------------------------------


def summarize(runs: list[Run]) -> dict:
    """Over the seeds of one model. sd: the sample standard deviation (n - 1); None for one run."""
    results = [run.result for run in runs]
    accuracies = [result["test_acc"] for result in results]
    return {
        "n": len(results),
        "seeds": [result["seed"] for result in results],
        "test_acc_mean": mean(accuracies),
        "test_acc_sd": stdev(accuracies) if len(results) > 1 else None,
        "test_acc_min": min(accuracies),
        "test_acc_max": max(accuracies),
        "test_acc_last_mean": mean(result["test_acc_last"] for result in results),
        "val_acc_mean": mean(result["val_acc"] for result in results),
        "epochs_run_mean": mean(result["epochs_run"] for result in results),
        "train_seconds_mean": mean(result["train_seconds"] for result in results),
        "images_per_second_mean": mean(result["images_per_second"] for result in results),
        "params": results[0]["params"],
    }


def comparisons_of(study: Study) -> dict[str, Comparison]:
    """{model: against the baseline}, of all models that have two seeds in common with it."""
    accuracy = {
        model: {run.result["seed"]: run.result["test_acc"] for run in runs}
        for model, runs in study.runs.items()
    }
    baseline = accuracy.pop("baseline", {})
    found = {model: verdicts.compare(seeds, baseline) for model, seeds in accuracy.items()}
    found = {model: comparison for model, comparison in found.items() if comparison}
    verdicts.correct(list(found.values()))
    return found


def bootstrap_of(study: Study, model: str, seeds: list[int]) -> tuple[float, float] | None:
    """Over seeds and test images jointly; None where a run's labels are not there."""
    by_seed = [
        {run.result["seed"]: run.correct for run in study.runs[name]}
        for name in (model, "baseline")
    ]
    if any(correct[seed] is None for correct in by_seed for seed in seeds):
        return None
    return verdicts.bootstrap(*(np.array([correct[s] for s in seeds]) for correct in by_seed))


def missing_runs(study: Study) -> list[str]:
    """What would complete the table: every published model, and any other, with every seed seen."""
    seeds = study.seeds()
    models = in_table_order(study.published.keys() | study.runs.keys())
    have = {(model, run.result["seed"]) for model, runs in study.runs.items() for run in runs}
    return [
        f"{model} seed {seed}" for model in models for seed in seeds if (model, seed) not in have
    ]


# --- Words ----------------------------------------------------------------------------------------


def write_report(
    studies: list[Study], costs: list[dict], problems: list[str], figures: list[str]
) -> str:
    """report.md."""
    lines = ["# Attention in ResNet-18: accuracy and cost, measured and published", ""]
    for study in studies:
        lines += study_section(study, costs_of(study, costs))
    lines += cost_section(costs)
    if figures:
        lines += [f"## Figures: {studies[0].title}", ""]
        if studies[0].mark:
            lines += [f"**{studies[0].mark.capitalize()}.**", ""]
        for name in figures:
            caption = name.removesuffix(".png").replace("_", " ").replace(" vs ", " against ")
            lines += [f"![{caption}]({name})", ""]
    lines += ["## What is missing", ""]
    for study in studies:
        if missing := missing_runs(study):
            problems.append(f"{study.title}: no run of {', '.join(missing)}")
        if not costs_of(study, costs):
            width = study.any_run.result["width"]
            problems.append(
                f"{study.title}: no FLOPs and no inference time: run `python benchmark.py --width "
                f"{width} --out` with the folder of this report"
            )
    if all(study.quick for study in studies):
        problems.append("every full run: `./run_all.sh full`")
    lines += [
        f"- {problem}" for problem in problems or ["Nothing: every run of the table is there."]
    ]
    return "\n".join([*lines, "", *methods(studies, costs)]) + "\n"


def study_section(study: Study, costs: dict[str, dict]) -> list[str]:
    """The lines on one study: the published table with ours beside it, then the verdicts."""
    lines = [f"## {study.title}", ""]
    if study.mark:
        lines += [
            f"**{study.mark.capitalize()}.** It shows that everything works; its accuracies say "
            "nothing about the models at full size and length.",
            "",
        ]
    lines += [
        "| model | seeds | test accuracy % | published | parameters M | published "
        "| FLOPs G | published | ms/image | published |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in in_table_order(study.published.keys() | study.runs.keys()):
        runs, cost = study.runs.get(model), costs.get(model)
        published = study.published.get(model)
        cells = [f"{model} (quick)" if study.quick else model]
        if runs:
            summary = summarize(runs)
            spread = f" ± {summary['test_acc_sd']:.2f}" if summary["n"] > 1 else ""
            cells += [str(summary["n"]), f"{summary['test_acc_mean']:.2f}{spread}"]
        else:
            cells += ["0", "missing"]
        params = runs[0].result["params"] if runs else cost["params"] if cost else None
        cells += [
            f"{published['test_acc']:.2f}" if published else "-",
            f"{params / 1e6:.2f}" if params else "-",
            f"{published['params_m']:.2f}" if published else "-",
            f"{cost['flops'] / 1e9:.2f}" if cost else "-",
            f"{published['flops_g']:.2f}" if published else "-",
            f"{cost['ms_per_image']:#.3g}" if cost else "-",
            f"{published['ms_per_image']:.2f}" if published else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    several = any(len(runs) > 1 for runs in study.runs.values())
    single = [model for model, runs in study.runs.items() if len(runs) == 1]
    lines += [
        "",
        "Test accuracy: with the weights of the best validation epoch"
        + (", mean ± sample standard deviation (n - 1) over seeds" if several else "")
        + f", on {study.any_run.result['test_images']:,} test images. Published: one run per "
        "model, 50 epochs, 10,000 test images; inference on an NVIDIA RTX 4070.",
    ]
    if costs:
        row = next(iter(costs.values()))
        lines.append(
            f"ms/image: median inference time at batch {row['batch_size']}, {row['precision']}, "
            f"{row['mode']}, on {row['device']}. FLOPs: 2 x the MACs that thop counts."
        )
    if single:
        lines.append(
            f"One seed only of {', '.join(single)}: a difference to another model may be the "
            "seed's, so nothing follows about which is better."
        )
    lines += [
        "",
        "| model | accuracy %: lowest | highest | with the last weights | epochs run | "
        "training s | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, runs in study.runs.items():
        s = summarize(runs)
        lines.append(
            f"| {model + ' (quick)' * study.quick} | {s['test_acc_min']:.2f} | "
            f"{s['test_acc_max']:.2f} | {s['test_acc_last_mean']:.2f} | "
            f"{s['epochs_run_mean']:.1f} | {s['train_seconds_mean']:.0f} | "
            f"{s['images_per_second_mean']:,.0f} |"
        )
    return [*lines, "", *verdict_section(study, costs)]


def verdict_section(study: Study, costs: dict[str, dict]) -> list[str]:
    """Every model against the baseline: numbers, then a sentence to quote."""
    if "baseline" not in study.runs or len(study.runs) == 1:
        return ["No verdict: there is nothing to compare with the baseline.", ""]
    comparisons = comparisons_of(study)
    lines = [f"### Against the baseline: {study.title}", ""]
    unpaired = [model for model in study.runs if model not in comparisons and model != "baseline"]
    for model in unpaired:
        lines.append(f"- `{model}`: no verdict, it has fewer than two seeds in common with the "
                     "baseline, so nothing is known of how seeds vary.")  # fmt: skip
    if not comparisons:
        return [*lines, ""]
    lines += [
        *([""] if unpaired else []),
        "| model | pairs | difference | 95 % interval | corrected | p, Holm | p, Welch | P(better) "
        "| seeds and images | correlation | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, c in comparisons.items():
        resampled = bootstrap_of(study, model, c.seeds)
        cells = [
            f"{model} (quick)" if study.quick else model,
            str(len(c.seeds)),
            f"{c.difference:+.2f}",
            as_interval(c.interval),
            as_interval(c.corrected),
            f"{c.p_holm:.3f}",
            "-" if c.p_welch is None else f"{c.p_welch:.3f}",
            f"{c.prob_better:.2f}",
            as_interval(resampled) if resampled else "-",
            "-" if c.correlation is None else f"{c.correlation:+.2f}",
            c.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(sentence(study, model, c, costs) for model, c in comparisons.items())]
    return [
        *lines,
        "",
        "Differences in points of test accuracy, seed by seed. Verdict: the paired t test with "
        "Holm's correction over the comparisons of this table at 5 %, chosen before any result; "
        "the corrected interval excludes 0 exactly then. Beside it Welch's test, P(better) "
        "(Mann-Whitney's U / n², ties half) and a bootstrap over seeds and test images.",
        "",
    ]


def as_interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def sentence(study: Study, model: str, c: Comparison, costs: dict[str, dict]) -> str:
    """The verdict on one model in words that can be quoted; differences in points."""
    cost = ""
    if {model, "baseline"} <= costs.keys():
        ratio = costs[model]["ms_per_image"] / costs["baseline"]["ms_per_image"]
        cost = f", at {ratio:.2f} times its inference time"
    words = {
        "better": "is better than the baseline",
        "worse": "is worse than the baseline",
        "not distinguishable": "is not distinguishable from the baseline",
    }
    limit = ""
    if c.verdict == "not distinguishable":
        limit = f"; {c.detectable:.2f} points would have been found 8 times in 10"
    quick = " in this quick run" if study.quick else ""
    return (
        f"- `{model}` {words[c.verdict]}{quick}: {c.difference:+.2f} points over {len(c.seeds)} "
        f"seeds, {as_interval(c.corrected)} after correction{cost}{limit}."
    )


def cost_section(rows: list[dict]) -> list[str]:
    """Inference time of every model in every mode that was measured."""
    if not rows:
        return []
    models = in_table_order({row["model"] for row in rows})
    keys = ("width", "batch_size", "precision", "mode")
    table = {}  # (width, batch size, precision, mode) -> model -> row
    for row in rows:
        table.setdefault(tuple(row[key] for key in keys), {})[row["model"]] = row
    lines = [
        "## Inference time in every mode",
        "",
        f"| width | batch | precision | mode | {' | '.join(models)} | baseline's TFLOP/s |",
        "|---|---|---|---|" + "---|" * (len(models) + 1),
    ]
    for variant, by_model in table.items():
        base = by_model.get("baseline")
        cells = [*map(str, variant)]
        for model in models:
            row = by_model.get(model)
            if row is None:
                cells.append("-")
            elif row["batch_size"] == 1:
                times = (row[f"ms_per_image{p}"] for p in ("", "_p90", "_p99"))
                cells.append(" / ".join(f"{time:#.3g}" for time in times))
            else:
                cell = f"{row['ms_per_image']:#.3g}"
                if base and row is not base:
                    cell += f" ({row['ms_per_image'] / base['ms_per_image']:.2f}x)"
                cells.append(cell)
        share = f"{base['tflops']:#.3g} ({100 * base['share_of_ceiling']:.0f} %)" if base else "-"
        lines.append(f"| {' | '.join([*cells, share])} |")
    return [
        *lines,
        "",
        "ms/image, median over batches, and how many times that of the baseline; of single images "
        "the latency: p50 / p90 / p99. TFLOP/s beside what one large matrix product or convolution "
        "reaches on the same device. Modes: see modes.py; `eager` in fp32 is the published way.",
        "",
    ]


def methods(studies: list[Study], costs: list[dict]) -> list[str]:
    """Environment and commands, from env.json and config.json."""
    runs = [run for study in studies for runs in study.runs.values() for run in runs]
    lines = ["## How it was measured", ""]
    for words, count in Counter(
        f"{run.env['device']}, {run.result['precision']}, {run.result['mode']}; torch "
        f"{run.env['torch']}, CUDA {run.env['cuda']}, driver {run.env['driver'] or 'none'}, Python "
        f"{run.env['python']}; commit {(run.env['git_commit'] or 'unknown')[:12]}"
        + (" with uncommitted changes" if run.env["git_dirty"] else "")
        for run in runs
    ).items():
        lines.append(f"- {count} run{'s' * (count > 1)}: {words}")
    lines.append("- Training times include whatever else these machines were doing.")
    for run in runs:
        if run.result.get("fallback"):
            lines.append(f"- {run.folder}: {run.result['fallback']}")
    for device, torch in sorted({(row["device"], row["torch"]) for row in costs}):
        lines.append(f"- inference: {device}; torch {torch}")
    lines += [
        "- One seed fixes split, order and the backbone's first weights for all models alike.",
        "- At the start CBAM's two gates damp a residual branch about fourfold, SE's gate twofold.",
        "- cbam_classifier, as published, gates a 1x1 map: average and maximum coincide there.",
        "",
        "```sh",
        *(run.config["command"] for run in runs),
        "```",
    ]
    return lines


def results_csv(studies: list[Study]) -> str:
    """One line a run."""
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, [*RUN_COLUMNS, "fallback"], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for study in studies:
        for runs in study.runs.values():
            for run in runs:
                overrides = " ".join(f"{k}={v}" for k, v in study.overrides.items())
                writer.writerow(run.result | {"overrides": overrides})
    return buffer.getvalue()


def summary_json(studies: list[Study], costs: list[dict]) -> str:
    """Every figure of the report, for programs to read."""
    summaries = [
        {
            "dataset": study.dataset,
            "recipe": study.recipe,
            "overrides": study.overrides,
            "quick": study.quick,
            "models": {model: summarize(runs) for model, runs in study.runs.items()},
            "against_baseline": {
                model: asdict(comparison) | {"verdict": comparison.verdict}
                for model, comparison in comparisons_of(study).items()
            },
            "missing": missing_runs(study),
        }
        for study in studies
    ]
    content = {"studies": summaries, "benchmark": costs, "published": PUBLISHED}
    return json.dumps(content, indent=2) + "\n"


# --- Command line ---------------------------------------------------------------------------------


def make_report(runs_dir: Path, out: Path) -> None:
    """Writes all files of the report. Raises ReportError or OSError in one line."""
    studies, problems = read_studies(runs_dir)
    if not studies:
        reasons = "; ".join(problems) or "run `python train.py --model baseline` first"
        raise ReportError(f"no finished run below {runs_dir}: {reasons}")
    costs = read_costs([out / "benchmark.json", runs_dir / "benchmark.json"])
    main_study = studies[0]
    summaries = {model: summarize(runs) for model, runs in main_study.runs.items()}
    figures = draw_figures(
        main_study, summaries, costs_of(main_study, costs), fastest_costs_of(main_study, costs)
    )
    for name in FIGURES:
        if name in figures:
            write_atomically(out / name, figures[name])
        else:
            (out / name).unlink(missing_ok=True)  # one of an earlier report
    write_atomically(out / "results.csv", results_csv(studies))
    write_atomically(out / "summary.json", summary_json(studies, costs))
    write_atomically(out / "report.md", write_report(studies, costs, problems, list(figures)))


def print_power(sd: float, difference: float, comparisons: int) -> None:
    """Prints the seeds that `difference` takes; it and `sd` in points of test accuracy."""
    sd_of_differences = sd * 2**0.5  # if the accuracies of a pair do not correlate
    alone, corrected = (
        verdicts.seeds_needed(difference, sd_of_differences, verdicts.LEVEL / k)
        for k in (1, comparisons)
    )
    print(
        f"A difference of {difference:g} points is found 8 times in 10, at a level of 5 % and a "
        f"standard deviation of {sd:g} over seeds, with\n"
        f"{alone:6,} seeds a model in a single comparison with the baseline\n"
        f"{corrected:6,} seeds a model in the first of {comparisons} comparisons (Holm)\n"
        "(paired t test; fewer where seeds help or hurt all models alike)"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: %(default)s")
    add("--out", type=Path, default=Path("results"), help="where to write; default: %(default)s")
    add("--power", action="store_true", help="print the seeds that --difference takes, no report")
    add("--sd", type=float, help="of one model's test accuracy over seeds, in points")
    add("--difference", type=float, help="to be found, in points")
    add("--comparisons", type=int, default=3, help="with the baseline; default: %(default)s")
    args = parser.parse_args(argv)
    if args.power:
        if not (args.sd and args.difference and args.sd > 0 and args.difference > 0):
            parser.error("--power takes --sd and --difference, both greater than 0")
        if not (args.comparisons >= 1 and 1e-3 <= args.difference / args.sd <= 1e3):
            parser.error("--comparisons is at least 1, --difference from 0.001 to 1,000 times --sd")
        print_power(args.sd, args.difference, args.comparisons)
        return 0
    try:
        make_report(args.runs, args.out)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    sys.exit(main())
