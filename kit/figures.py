"""The figures of a report: PNG, in colours that colour-blind readers tell apart."""

import io
import textwrap

from kit.command_line import noted
from kit.findings import Findings
from kit.plots import plt
from kit.results import Study
from kit.words import flag, mark, one_line

# Okabe and Ito's palette (olive for its yellow, which is lost in print) and a mark each, by the
# order of the models in the table.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#000000"]
MARKS = "os^vPX<"  # seven, so that colour and mark do not come round together


def draw_figures(found: Findings) -> dict[str, bytes]:
    """{file name: PNG} of one study's findings; without those that have no data or that fail."""
    # The published models first, run or not: a model keeps its style from report to report.
    models = dict.fromkeys([*found.study.published, *found.models, *found.costs])
    styles = {
        model: dict(color=COLORS[i % len(COLORS)], marker=MARKS[i % len(MARKS)], ls="", capsize=4)
        for i, model in enumerate(models)
    }
    made = {}
    for name, (draw, has_data) in FIGURES.items():
        if has_data(found):
            with noted(f"no {name}"):
                figure, buffer = draw(found, styles), io.BytesIO()
                figure.savefig(buffer, dpi=150, metadata={"Software": None})
                made[name] = buffer.getvalue()
            plt.close("all")
    return made


def draw_differences(found: Findings, styles: dict) -> plt.Figure:
    """Differences from the baseline: pairs as dots, and the interval the verdict rests on."""
    figure, axes = frame(title_of(found.study), 7, 1.6 + 0.6 * len(found.against))
    axes.axvline(0, color="0.6", lw=1)
    baseline = found.study.accuracies("baseline")
    for y, (model, c) in enumerate(found.against.items()):
        half = c.difference - c.corrected[0]
        axes.errorbar(c.difference, y, xerr=half, **styles[model])
        own = found.study.accuracies(model)
        pairs = [own[seed] - baseline[seed] for seed in c.seeds]
        axes.plot(pairs, [y + 0.25] * len(pairs), ".", color="0.5")
        axes.annotate(c.verdict + flag(c.unlike), (c.difference, y), (0, 7),
                      textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(found.against)), found.against)
    axes.set_ylim(len(found.against) - 0.4, -0.6)
    axes.set_xlabel(
        "difference from the baseline (points of test accuracy):\n"
        "mean, interval after Holm's correction, pairs of seeds as dots"
    )
    return figure


def draw_accuracy(found: Findings, styles: dict) -> plt.Figure:
    """Mean with standard deviation, every seed a dot, the published figure a diamond."""
    explained, published = "test accuracy (%)", found.published
    figure, axes = bars(title_of(found.study), found.models)
    if any(summary["n"] > 1 for summary in found.models.values()):
        explained += "\nmean, standard deviation, seeds as dots"
    for y, (model, summary) in enumerate(found.models.items()):
        if summary["n"] > 1:
            seeds = found.study.accuracies(model).values()
            axes.plot(seeds, [y + 0.25] * len(seeds), ".", color="0.5")
        mean, sd = summary["test_acc_mean"], summary["test_acc_sd"]
        axes.errorbar(mean, y, xerr=sd, **styles[model])
        if model in published:
            axes.plot(published[model]["test_acc"], y, "D", mfc="none", color="black")
    axes.margins(y=0.15)
    axes.set_xlabel(explained + ("\npublished: diamond" if published else ""))
    return figure


def draw_params(found: Findings, styles: dict) -> plt.Figure:
    params = {model: summary["params"] / 1e6 for model, summary in found.models.items()}
    published = found.published.items()
    diamonds = {model: (row["params_m"], row["test_acc"]) for model, row in published}
    return draw_against(found, styles, params, "parameters (millions)", diamonds)


def draw_latency(found: Findings, styles: dict) -> plt.Figure:
    timed = {model: found.costs[model] for model in found.models if model in found.costs}
    times = {model: row["ms_per_image"] for model, row in timed.items()}
    xlabel = f"inference time (ms/image), p10 to p90, {one_line(found.timed['device'])}"
    spread = {model: spread_of(row) for model, row in timed.items()}
    return draw_against(found, styles, times, xlabel, spread=spread, rings=found.front)


def draw_against(found, styles, x, xlabel, diamonds=(), spread=None, rings=()) -> plt.Figure:
    """Test accuracy over `x`; diamonds are the published figures, rings the Pareto front."""
    figure, axes = frame(title_of(found.study), 8, max(4.5, 1 + 0.25 * len(x)))
    for model in x:
        accuracy, sd = (found.models[model][f"test_acc_{key}"] for key in ("mean", "sd"))
        xerr = spread and spread[model]
        label = model + flag(xerr and found.stale.get(model))
        axes.errorbar(x[model], accuracy, yerr=sd, xerr=xerr, label=label, **styles[model])
        if model in rings:
            axes.plot(x[model], accuracy, "o", ms=14, mfc="none", mec="black")
    for model in (model for model in diamonds if model in x):
        axes.plot(*diamonds[model], "D", mfc="none", color=styles[model]["color"])
    axes.set(xlabel=xlabel, ylabel="test accuracy (%)")
    axes.margins(0.15)
    explained = "diamonds: published" if diamonds else "rings: Pareto front" if rings else None
    add_legend(axes, title=explained, title_fontsize=9)
    return figure


def draw_time(found: Findings, styles: dict) -> plt.Figure:
    """A bar a model, measured the published way."""
    rows, first = found.costs, found.timed
    models = [model for model in styles if model in rows]
    how = f"batch {first['batch_size']}, {first['precision']}, {first['mode']}"
    figure, axes = bars(f"{how}\n{one_line(first['device'])}", models)
    for y, model in enumerate(models):
        axes.barh(
            y, rows[model]["ms_per_image"], xerr=spread_of(rows[model]), capsize=3,
            color=styles[model]["color"],
        )  # fmt: skip
    axes.set_xlabel("inference time (ms/image): median, p10 to p90")
    return figure


def spread_of(row: dict) -> list[list[float]]:
    """Error bars from p10 to p90 about the median."""
    middle = row["ms_per_image"]
    return [[middle - row["ms_per_image_p10"]], [row["ms_per_image_p90"] - middle]]


def draw_curves(found: Findings, styles: dict) -> plt.Figure:
    """Validation accuracy and training loss by epoch; a thin line a seed."""
    runs = found.study.runs
    size = (11, max(4, 1 + 0.25 * len(runs)))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    for model, run in ((name, run) for name in runs for run in runs[name]):
        epochs = [row["epoch"] for row in run.metrics]
        style = dict(color=styles[model]["color"], lw=1, marker="o" if len(epochs) == 1 else None)
        left.plot(epochs, [row["val_acc"] for row in run.metrics], **style)
        style["label"] = model if run is runs[model][0] else None
        right.plot(epochs, [row["train_loss"] for row in run.metrics], **style)
    left.set_ylabel("validation accuracy (%)")
    right.set_ylabel("training loss")
    longest = max(len(run.metrics) for run in found.study.all_runs)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", xlim=(0, longest + 1))
    add_legend(right)
    figure.suptitle(title_of(found.study), fontsize=10)
    return figure


def frame(title: str, width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title, fontsize=10)
    return figure, axes


def bars(title: str, models) -> tuple[plt.Figure, plt.Axes]:
    """A frame with a line a model, the first on top."""
    figure, axes = frame(title, 7, max(4, 1.5 + 0.4 * len(models)))
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    return figure, axes


def add_legend(axes, **options) -> None:
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), **options)


def title_of(study: Study) -> str:
    lines = [one_line(study.title), mark(study)]
    return "\n".join(textwrap.fill(line, 75) for line in lines if line)


FIGURES = {  # file name -> (what draws it, whether there is data for it)
    "test_accuracy.png": (draw_accuracy, lambda found: found.models),
    "inference_time.png": (draw_time, lambda found: found.costs),
    "accuracy_vs_params.png": (draw_params, lambda found: found.models),
    "accuracy_vs_latency.png": (draw_latency, lambda found: found.costs.keys() & found.models),
    "learning_curves.png": (draw_curves, lambda found: found.models),
    "differences.png": (draw_differences, lambda found: found.against),
}
