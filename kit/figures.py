"""The report's figures, in a colour-blind-safe palette."""

import io
from statistics import mean

from kit.command_line import noted
from kit.findings import Findings
from kit.plots import plt
from kit.results import PUBLISHED
from kit.words import flag, one_line, verdict

# Okabe and Ito's palette (olive instead of yellow, which fades in print) and markers, assigned to
# models in table order.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#000000"]
FORMATS = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}  # metadata to omit: it varies
MARKS = "os^vPX<"  # seven, so that colours and markers do not repeat together


def draw_figures(found: Findings, there: dict | None, formats=("png",)) -> dict[str, bytes]:
    """{file name: figure} of one study, as PNG and other `formats`; figures without data or that
    fail are left out. there: what it is compared with, see report.compare_runs."""
    # Published models first, trained or not: a model has the same style in every report.
    models = dict.fromkeys([*PUBLISHED, *found.models, *found.costs])
    styles = {
        model: dict(color=COLORS[i % len(COLORS)], marker=MARKS[i % len(MARKS)], ls="", capsize=4)
        for i, model in enumerate(models)
    }
    made = {}
    for name, (draw, has_data) in FIGURES.items():
        if has_data(found) if name != "compared.png" else there and there["against"]:
            with noted(f"no {name}"):
                figure = draw(there if name == "compared.png" else found, styles)
                title = one_line(found.study.title)  # a figure may leave its report
                figure.suptitle(title, x=0.01, ha="left", fontsize=9, color="0.4", wrap=True)
                for kind in dict.fromkeys(["png", *formats]):
                    buffer, undated = io.BytesIO(), FORMATS[kind]
                    figure.savefig(buffer, format=kind, dpi=150, metadata={undated: None})
                    made[name.replace("png", kind)] = buffer.getvalue()
            plt.close("all")
    return made


def draw_differences(found: Findings, styles: dict) -> plt.Figure:
    """Differences from the reference: pairs as dots, corrected interval, margin as a band."""
    label = f"difference from {found.reference}"
    return differences(found.against, styles, label, found.margin)


def draw_compared(there: dict, styles: dict) -> plt.Figure:
    """Per model, the runs here against those there."""
    margin = there["here"].margin
    return differences(there["against"], styles, "difference, here - there", margin)


def differences(comparisons: dict, styles: dict, label: str, margin: float) -> plt.Figure:
    """comparisons: {model: Comparison}; the margin in points of test accuracy."""
    figure, axes = frame(7, 1.6 + 0.6 * len(comparisons))
    axes.axvspan(-margin, margin, color="0.93", zorder=0)
    axes.axvline(0, color="0.6", lw=1)
    for y, (model, c) in enumerate(comparisons.items()):
        axes.errorbar(c.difference, y, xerr=c.difference - c.corrected[0], **styles[model])
        axes.plot(c.differences, [y + 0.25] * len(c.seeds), ".", color="0.5")
        axes.annotate(verdict(c), (c.difference, y), (0, 7), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(comparisons)), comparisons)
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    axes.set_xlabel(
        f"{label} (points of test accuracy):\nmean, corrected interval, one dot per seed; "
        f"grey: within {margin:g} points"
    )
    return figure


def draw_accuracy(found: Findings, styles: dict) -> plt.Figure:
    """Mean and standard deviation; seeds as dots, published accuracy as a diamond."""
    explained, published = "test accuracy (%)", found.published
    figure, axes = bars(found.models)
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
    """Test accuracy against parameters relative to the baseline."""
    base = found.models["baseline"]["params"]
    extra = {model: 100 * (s["params"] / base - 1) for model, s in found.models.items()}
    return draw_against(found, styles, extra, "extra parameters (%)")


def draw_latency(found: Findings, styles: dict) -> plt.Figure:
    timed = {model: found.costs[model] for model in found.models if model in found.costs}
    times = {model: row["ms_per_image"] for model, row in timed.items()}
    xlabel = f"inference time (ms/image), p10 to p90, {one_line(found.timed['device'])}"
    spread = {model: spread_of(row) for model, row in timed.items()}
    rings = found.front if len(found.front) < len(timed) else ()
    return draw_against(found, styles, times, xlabel, spread=spread, rings=rings)


def draw_against(found, styles, x, xlabel, spread=None, rings=()) -> plt.Figure:
    """Test accuracy against `x`; rings: Pareto front."""
    figure, axes = frame(8, max(4.5, 1 + 0.25 * len(x)))
    for model in x:
        accuracy, sd = (found.models[model][f"test_acc_{key}"] for key in ("mean", "sd"))
        xerr, label = spread and spread[model], model + flag(spread and found.stale.get(model))
        style = styles[model] | {"mfc": "none", "mew": 1.8}  # so that no marker hides another
        axes.errorbar(x[model], accuracy, yerr=sd, xerr=xerr, label=label, **style)
        if model in rings:
            axes.plot(x[model], accuracy, "o", ms=14, mfc="none", mec="black")
    several = any(summary["n"] > 1 for summary in found.models.values())
    spread_over_seeds = "\nmean, standard deviation over seeds" * several
    axes.set(xlabel=xlabel, ylabel=f"test accuracy (%){spread_over_seeds}")
    axes.margins(0.15)
    add_legend(axes, title="rings: Pareto front" if rings else None, title_fontsize=9)
    return figure


def draw_epochs(found: Findings, styles: dict) -> plt.Figure:
    """Accuracy against epochs, one marker per run."""
    figure, axes = frame(8, 4.5)
    for model, runs in found.study.runs.items():
        epochs = [run.result["epochs_run"] for run in runs]
        style = {key: styles[model][key] for key in ("color", "marker", "ls")}
        axes.plot(epochs, found.study.accuracies(model).values(), label=model, **style)
    axes.set(xlabel="epochs trained", ylabel="test accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    add_legend(axes)
    return figure


def draw_time(found: Findings, styles: dict) -> plt.Figure:
    """One bar per model, timed as published."""
    rows, first = found.costs, found.timed
    models = [model for model in styles if model in rows]
    figure, axes = bars([m + flag(found.stale.get(m)) for m in models])
    for y, model in enumerate(models):
        axes.barh(
            y, rows[model]["ms_per_image"], xerr=spread_of(rows[model]), capsize=3,
            color=styles[model]["color"],
        )  # fmt: skip
    how = f"batch {first['batch_size']}, {first['precision']}, {first['mode']}"
    where = one_line(first["device"])
    axes.set_xlabel(f"inference time (ms/image): median, p10 to p90\n{how}, {where}")
    return figure


def spread_of(row: dict) -> list[list[float]]:
    """Error bars from p10 to p90 about the median."""
    middle = row["ms_per_image"]
    return [[middle - row["ms_per_image_p10"]], [row["ms_per_image_p90"] - middle]]


def draw_curves(found: Findings, styles: dict) -> plt.Figure:
    """Validation accuracy and training loss by epoch: mean and range over seeds."""
    study = found.study
    size = (11, max(4, 1 + 0.25 * len(study.runs)))
    figure, both = plt.subplots(1, 2, figsize=size, layout="constrained")
    keys = {"val_acc": "validation accuracy (%)", "train_loss": "training loss"}
    for axes, (key, name) in zip(both, keys.items(), strict=True):
        for model, runs in study.runs.items():
            curves = [[row[key] for row in run.metrics] for run in runs]
            values, color = list(zip(*curves, strict=False)), styles[model]["color"]
            epochs = range(1, len(values) + 1)  # common to all seeds; the rest: one line per seed
            axes.plot(epochs, list(map(mean, values)), color=color, label=model)
            for curve in curves:
                rest = range(len(values), len(curve) + 1)
                axes.plot(rest, curve[len(values) - 1 :], color=color, lw=0.7, ls="--")
            if len(runs) > 1:
                band = list(map(min, values)), list(map(max, values))
                axes.fill_between(epochs, *band, color=color, alpha=0.15, lw=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", ylabel=name, xlim=(1, max(found.epochs)))
    add_legend(both[1])
    if max(map(len, study.runs.values())) > 1:
        longer = "; dashed: seeds that trained longer" * (len(found.epochs) > 1)
        figure.supxlabel(f"mean over seeds, band from lowest to highest{longer}", fontsize=9)
    return figure


def frame(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    return plt.subplots(figsize=(width, height), layout="constrained")


def bars(models) -> tuple[plt.Figure, plt.Axes]:
    """A frame with a row per model, the first on top."""
    figure, axes = frame(7, max(3, 1.5 + 0.4 * len(models)))
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    return figure, axes


def add_legend(axes, **options) -> None:
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), **options)


FIGURES = {  # file name -> (drawing function, whether it has data)
    "test_accuracy.png": (draw_accuracy, lambda found: found.models),
    "inference_time.png": (draw_time, lambda found: found.costs),
    "accuracy_vs_params.png": (draw_params, lambda found: "baseline" in found.models),
    "accuracy_vs_epochs.png": (draw_epochs, lambda found: len(found.epochs) > 1),
    "accuracy_vs_latency.png": (draw_latency, lambda found: found.costs.keys() & found.models),
    "learning_curves.png": (draw_curves, lambda found: max(found.epochs) > 1),
    "differences.png": (draw_differences, lambda found: found.against),
    "compared.png": (draw_compared, None),
}
