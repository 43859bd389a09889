"""From run folders to a report: the published table with our figures beside it, and pictures.

    python report.py                                  # runs/ and results/benchmark.json -> results/
    python report.py --runs DIR --out DIR             # benchmark.json may lie in either

Reads files alone and needs no torch: copy the small files of a run folder to a laptop and it works
there, in a few seconds. Writes report.md, results.csv, summary.json and five figures.

Runs are compared only within a study: one data set, one recipe, the same explicit settings. A study
that is shorter or narrower than its recipe is marked as a quick run wherever its figures stand.
"""

import argparse
import csv
import io
import json
import math
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from figures import FIGURES, draw_figures
from files import write_atomically

# The published report: one run a model, 50 epochs, Fashion-MNIST; time a NVIDIA RTX 4070, batch 64.
PUBLISHED = {
    "baseline": dict(test_acc=93.27, params_m=11.17, flops_g=0.92, ms_per_image=0.06),
    "se": dict(test_acc=92.70, params_m=11.26, flops_g=0.92, ms_per_image=0.07),
    "cbam_blocks": dict(test_acc=92.59, params_m=11.26, flops_g=0.92, ms_per_image=0.09),
    "cbam_classifier": dict(test_acc=93.18, params_m=11.21, flops_g=0.92, ms_per_image=0.07),
}
RUN_COLUMNS = (
    "dataset", "recipe", "overrides", "quick", "model", "seed", "width", "test_acc",
    "test_acc_last", "val_acc", "best_epoch", "epochs_run", "stopped_early", "test_images",
    "params", "train_seconds", "images_per_second", "precision", "mode", "device",
)  # fmt: skip


NUMBERS = (
    "test_acc", "test_acc_last", "val_acc", "epochs_run", "params", "train_seconds",
    "images_per_second", "test_images", "width",
)  # fmt: skip
CONFIG_COLUMNS = ("epochs", "limit_train", "limit_test", "width", "command")
ENV_COLUMNS = ("device", "torch", "cuda", "driver", "python", "git_commit", "git_dirty")
METRIC_COLUMNS = ("epoch", "val_acc", "train_loss")
COST_WORDS = ("model", "precision", "mode", "device", "torch")
COST_NUMBERS = (
    "params", "flops", "batch_size", "width", "ms_per_image", "ms_per_image_p10",
    "ms_per_image_p90", "ms_per_image_p99", "tflops", "share_of_ceiling",
)  # fmt: skip


# --- Reading --------------------------------------------------------------------------------------


@dataclass
class Run:
    folder: Path
    result: dict  # result.json
    config: dict  # config.json
    env: dict  # env.json
    metrics: list[dict]  # metrics.jsonl


@dataclass
class Study:
    """Runs that may be compared: one data set, one recipe, the same explicit settings."""

    dataset: str
    recipe: str
    overrides: dict
    runs: dict[str, list[Run]]  # model -> its runs by seed

    @property
    def any_run(self) -> Run:
        return next(run for runs in self.runs.values() for run in runs)

    @property
    def published(self) -> dict[str, dict]:
        """The published rows, for the data set they are of."""
        return PUBLISHED if self.dataset == "fashion_mnist" else {}

    @property
    def quick(self) -> bool:
        return self.any_run.result["quick"]

    @property
    def title(self) -> str:
        changed = "".join(f", {key} = {value}" for key, value in self.overrides.items())
        return f"{self.dataset}, recipe {self.recipe}{changed}"

    @property
    def mark(self) -> str:
        """How much less than the published recipe this is, in words; empty for a full study."""
        if not self.quick:
            return ""
        config = self.any_run.config
        parts = [f"{config['epochs']} epoch" + "s" * (config["epochs"] != 1)]
        for key, what in (("limit_train", "training images"), ("limit_test", "test images")):
            if config[key]:
                parts.append(f"{config[key]:,} {what}")
        if config["width"] != 64:
            parts.append(f"width {config['width']} instead of 64")
        return f"quick run: {', '.join(parts)}"

    def seeds(self) -> list[int]:
        return sorted({run.result["seed"] for runs in self.runs.values() for run in runs})


class ReportError(RuntimeError):
    """There is nothing to report. The message says in one line why and what to do."""


def read_studies(runs_dir: Path) -> tuple[list[Study], list[str]]:
    """All studies below `runs_dir`, full ones first, and the problems met on the way, in words."""
    studies, problems = {}, []
    for folder in sorted(runs_dir.glob("*/*/*/seed*"), key=by_seed):
        try:
            if not (folder / "result.json").exists():
                metrics = folder / "metrics.jsonl"
                epochs = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                problems.append(f"begun, not finished: {folder}, {epochs} epochs done")
                continue
            run = read_run(folder)
            key = (run.result["dataset"], run.result["recipe"], json.dumps(run.result["overrides"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            problems.append(f"{folder} left out, its files are damaged or not readable ({reason})")
            continue
        study = studies.setdefault(key, Study(*key[:2], run.result["overrides"], {}))
        study.runs.setdefault(run.result["model"], []).append(run)
    for study in studies.values():
        study.runs = {model: study.runs[model] for model in in_table_order(study.runs)}
    ordered = sorted(studies.values(), key=lambda s: (s.quick, len(s.overrides), s.title))
    return ordered, problems


def read_run(folder: Path) -> Run:
    """Raises OSError, ValueError, KeyError or TypeError if a file is missing or damaged."""
    result, config, env = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config", "env")
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    run = Run(folder, result, config, env, [json.loads(line) for line in lines])
    needed = [(result, RUN_COLUMNS), (config, CONFIG_COLUMNS), (env, ENV_COLUMNS)]
    for content, columns in needed + [(row, METRIC_COLUMNS) for row in run.metrics]:
        for column in columns:
            content[column]  # a KeyError names what is not there
    numbers = [result[column] for column in NUMBERS]
    numbers += [row[column] for row in run.metrics for column in METRIC_COLUMNS]
    if not (run.metrics and isinstance(result["overrides"], dict) and all(map(is_finite, numbers))):
        raise ValueError("no epochs, or something else where a number should be")
    named = [str(result[key]) for key in ("dataset", "recipe", "model")] + [f"seed{result['seed']}"]
    if list(folder.parts[-4:]) != named:  # a copied folder would count as one more run
        raise ValueError(f"result.json is that of {result['model']} seed {result['seed']}")
    return run


def is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def by_seed(folder: Path) -> tuple:
    number = folder.name.removeprefix("seed")
    return (*folder.parts[:-1], int(number) if number.isdecimal() else -1)


def in_table_order(models) -> list[str]:
    return [m for m in PUBLISHED if m in models] + sorted(set(models) - PUBLISHED.keys())


def read_costs(paths: list[Path]) -> list[dict]:
    """The rows of the first benchmark.json that exists; an empty list if there is none."""
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return []
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            numbers = [row[column] for column in COST_NUMBERS]  # a KeyError names what is missing
            words = [row[column] for column in COST_WORDS]
            if not all(is_finite(number) and number > 0 for number in numbers):
                raise ValueError("something else where a positive number should be")
            if not all(isinstance(word, str) for word in words):
                raise ValueError("something else where a word should be")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is damaged ({type(error).__name__}: {error}): run python benchmark.py again"
        ) from error
    return rows


def costs_of(study: Study, rows: list[dict], mode="eager", precision="fp32") -> dict[str, dict]:
    """{model: its row} at this study's width and batch 64, or else the largest measured."""
    wanted = {"mode": mode, "precision": precision, "width": study.any_run.result["width"]}
    rows = [row for row in rows if wanted.items() <= row.items()]
    sizes = {row["batch_size"] for row in rows}
    size = 64 if 64 in sizes else max(sizes, default=64)
    return {row["model"]: row for row in rows if row["batch_size"] == size}


def fastest_costs_of(study: Study, rows: list[dict]) -> dict[str, dict]:
    """As costs_of, in the mode and precision in which the models took the least time together."""
    variants = {(row["mode"], row["precision"]) for row in rows}
    measured = [costs_of(study, rows, *variant) for variant in sorted(variants)]
    models = max((len(costs) for costs in measured), default=0)
    complete = [costs for costs in measured if len(costs) == models]
    total = [sum(row["ms_per_image"] for row in costs.values()) for costs in complete]
    return complete[total.index(min(total))] if models else {}


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
    lines = [f"## {study.title}", ""]
    if study.mark:
        lines += [
            f"**{study.mark.capitalize()}.** It shows that everything works; its accuracies say "
            "nothing about the models.",
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
    return [*lines, ""]


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
    summaries = [
        {
            "dataset": study.dataset,
            "recipe": study.recipe,
            "overrides": study.overrides,
            "quick": study.quick,
            "models": {model: summarize(runs) for model, runs in study.runs.items()},
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: %(default)s")
    add("--out", type=Path, default=Path("results"), help="where to write; default: %(default)s")
    args = parser.parse_args(argv)
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
