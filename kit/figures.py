"""The figures of a report: PNG, in colours that colour-blind readers tell apart."""

import io
import textwrap
from statistics import mean

from kit.command_line import noted
from kit.findings import Findings
from kit.plots import plt
from kit.results import Study
from kit.words import flag, mark, one_line

# Okabe and Ito's palette (olive for its yellow, which is lost in print) and a mark each, by the
# order of the models in the table.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#000000"]
FORMATS = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}  # what would tell two apart
MARKS = "os^vPX<"  # seven, so that colour and mark do not come round together


def draw_figures(found: Findings, formats=("png",)) -> dict[str, bytes]:
    """{file name: figure} of one study's findings, PNG and other formats; without those that have
    no data or that fail."""
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
                figure = draw(found, styles)
                for kind in dict.fromkeys(["png", *formats]):
                    buffer, undated = io.BytesIO(), FORMATS[kind]
                    figure.savefig(buffer, format=kind, dpi=150, metadata={undated: None})
                    made[name.replace("png", kind)] = buffer.getvalue()
            plt.close("all")
    return made


def draw_differences(found: Findings, styles: dict) -> plt.Figure:
    """Differences from the baseline: pairs as dots, and the interval the verdict rests on."""
    what = "Difference from the baseline"
    figure, axes = frame(found.study, what, 7, 1.6 + 0.6 * len(found.against))
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
    figure, axes = bars(found.study, "Test accuracy", found.models)
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
    """Parameters on an axis from 0, on which a percent looks like one; written at each model."""
    first = "baseline" if "baseline" in found.models else next(iter(found.models))
    base = found.models[first]["params"]
    params = {model: 100 * s["params"] / base for model, s in found.models.items()}
    base = found.published.get(first, {}).get("params_m")
    diamonds = {
        model: (100 * row["params_m"] / base, row["test_acc"])
        for model, row in found.published.items()
        if base
    }
    figure = draw_against(found, styles, params, f"parameters ({first}: 100%)", diamonds)
    (axes,) = figure.axes
    axes.set_xlim(0, 1.45 * max(params.values()))
    labels = {model: f"{model} {x - 100:+.2f}%" for model, x in params.items()}
    write_beside(axes, {m: (params[m], found.models[m]["test_acc_mean"]) for m in params}, labels)
    return figure


def write_beside(axes, points: dict[str, tuple], labels: dict[str, str]) -> None:
    """At the right of all points, in their order from below, so that no label hides another."""
    order, (low, high) = sorted(points, key=lambda model: points[model][1]), axes.get_ylim()
    right = 1.05 * max(x for x, _ in points.values())
    for i, model in enumerate(order):
        y = low + (high - low) * (i + 0.5) / len(order)
        axes.annotate(labels[model], points[model], (right, y), va="center", fontsize=9,
                      arrowprops=dict(arrowstyle="-", color="0.7", lw=0.7))  # fmt: skip


def draw_latency(found: Findings, styles: dict) -> plt.Figure:
    timed = {model: found.costs[model] for model in found.models if model in found.costs}
    times = {model: row["ms_per_image"] for model, row in timed.items()}
    xlabel = f"inference time (ms/image), p10 to p90, {one_line(found.timed['device'])}"
    spread = {model: spread_of(row) for model, row in timed.items()}
    return draw_against(found, styles, times, xlabel, spread=spread, rings=found.front)


def draw_against(found, styles, x, xlabel, diamonds=(), spread=None, rings=()) -> plt.Figure:
    """Test accuracy over `x`; diamonds are the published figures, rings the Pareto front."""
    several = any(summary["n"] > 1 for summary in found.models.values())
    spread_over_seeds = " (mean, standard deviation over seeds)" * several
    title = f"Test accuracy{spread_over_seeds} against {xlabel.partition(' (')[0]}"
    figure, axes = frame(found.study, title, 8, max(4.5, 1 + 0.25 * len(x)))
    for model in x:
        accuracy, sd = (found.models[model][f"test_acc_{key}"] for key in ("mean", "sd"))
        xerr, label = spread and spread[model], model + flag(spread and found.stale.get(model))
        style = styles[model] | {"mfc": "none", "mew": 1.8}  # so that no mark hides another
        axes.errorbar(x[model], accuracy, yerr=sd, xerr=xerr, label=label, **style)
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
    what = f"Inference time, {how}, {one_line(first['device'])}"
    figure, axes = bars(found.study, what, [m + flag(found.stale.get(m)) for m in models])
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
    """Validation accuracy and training loss by epoch: the mean over seeds, and their range."""
    study = found.study
    size = (11, max(4, 1 + 0.25 * len(study.runs)))
    figure, both = plt.subplots(1, 2, figsize=size, layout="constrained")
    keys = {"val_acc": "validation accuracy (%)", "train_loss": "training loss"}
    longest = max(len(run.metrics) for run in study.all_runs)
    for axes, (key, name) in zip(both, keys.items(), strict=True):
        for model, runs in study.runs.items():
            curves = [[row[key] for row in run.metrics] for run in runs]
            values, color = list(zip(*curves, strict=False)), styles[model]["color"]
            epochs = range(1, len(values) + 1)  # that all seeds have; what is left, each alone
            axes.plot(epochs, list(map(mean, values)), color=color, label=model)
            for curve in curves:
                rest = range(len(values), len(curve) + 1)
                axes.plot(rest, curve[len(values) - 1 :], color=color, lw=0.7, ls="--")
            if len(runs) > 1:
                band = list(map(min, values)), list(map(max, values))
                axes.fill_between(epochs, *band, color=color, alpha=0.15, lw=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", ylabel=name, xlim=(1, longest))
    add_legend(both[1])
    several = max(map(len, study.runs.values())) > 1
    bands = ": mean over seeds, band from lowest to highest; dashed: seeds that trained longer"
    what = "Learning curves" + bands * several
    figure.suptitle(f"{what}\n{title_of(study)}", fontsize=10)
    return figure


def frame(study: Study, what: str, width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    """With what is shown, and of which study, in the title."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(f"{what}\n{title_of(study)}", fontsize=10)
    return figure, axes


def bars(study: Study, what: str, models) -> tuple[plt.Figure, plt.Axes]:
    """A frame with a line a model, the first on top."""
    figure, axes = frame(study, what, 7, max(4, 1.5 + 0.4 * len(models)))
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
    "learning_curves.png": (
        draw_curves,
        lambda found: max(len(run.metrics) for run in found.study.all_runs) > 1,
    ),
    "differences.png": (draw_differences, lambda found: found.against),
}
