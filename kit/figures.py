"""The figures of a report: PNG, in colours that colour-blind readers tell apart."""

import io
import textwrap

import matplotlib

matplotlib.use("Agg")  # the figures go to files, never to a window
import matplotlib.pyplot as plt

FIGURES = (
    "test_accuracy.png",
    "inference_time.png",
    "accuracy_vs_params.png",
    "accuracy_vs_latency.png",
    "learning_curves.png",
    "differences.png",
)
# Okabe and Ito's palette (olive for its yellow, which is lost in print) and a mark each, by the
# order of the models in the table.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#000000"]
MARKS = "os^vPX<"  # seven, so that colour and mark do not come round together


def draw_figures(found) -> dict[str, bytes]:
    """{file name: PNG} of one study's findings; a figure without data is not among them."""
    study, summaries, costs = found.study, found.models, found.costs
    # The published models first, run or not: a model keeps its style from report to report.
    models = list(dict.fromkeys([*study.published, *summaries, *costs]))
    styles = {
        model: {"color": COLORS[i % len(COLORS)], "marker": MARKS[i % len(MARKS)]}
        for i, model in enumerate(models)
    }
    # Beside a quick run, on one axis with it, the published figures would only mislead.
    published = {} if study.quick else study.published
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})

    params = {model: summary["params"] / 1e6 for model, summary in summaries.items()}
    published_points = {m: (row["params_m"], row["test_acc"]) for m, row in published.items()}
    timed = {m: costs[m] for m in summaries if m in costs}
    figures = {"test_accuracy.png": draw_accuracy(study, summaries, styles, published)}
    if found.against:
        figures["differences.png"] = draw_differences(found, styles)
    if costs:
        figures["inference_time.png"] = draw_time(costs, found.fastest, styles)
    figures["accuracy_vs_params.png"] = draw_against(
        study, summaries, styles, params, "parameters (millions)", published_points
    )
    if timed:
        label = f"inference time (ms/image), p10 to p90, {next(iter(timed.values()))['device']}"
        times = {model: row["ms_per_image"] for model, row in timed.items()}
        spread = {model: spread_of(row) for model, row in timed.items()}
        figures["accuracy_vs_latency.png"] = draw_against(
            study, summaries, styles, times, label, {}, spread, found.front
        )
    figures["learning_curves.png"] = draw_curves(study, styles)
    return {name: as_png(figure) for name, figure in figures.items()}


def draw_differences(found, styles) -> plt.Figure:
    """Differences from the baseline: pairs as dots, and the interval the verdict rests on."""
    figure, axes = plt.subplots(figsize=(7, 1.6 + 0.6 * len(found.against)), layout="constrained")
    axes.axvline(0, color="0.6", lw=1)
    for y, (model, c) in enumerate(found.against.items()):
        low, high = c.corrected
        axes.errorbar(
            c.difference, y, xerr=[[c.difference - low], [high - c.difference]], ls="none",
            capsize=4, **styles[model],
        )  # fmt: skip
        mine, base = (found.study.by_seed(name) for name in (model, "baseline"))
        pairs = [mine[s].result["test_acc"] - base[s].result["test_acc"] for s in c.seeds]
        axes.plot(pairs, [y + 0.25] * len(pairs), ".", color="0.5")
        axes.annotate(c.verdict, (c.difference, y), (0, 7), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(found.against)), found.against)
    axes.set_ylim(len(found.against) - 0.4, -0.6)
    axes.set_xlabel(
        "difference from the baseline (points of test accuracy):\n"
        "mean, interval after Holm's correction, pairs of seeds as dots"
    )
    axes.set_title(title_of(found.study), fontsize=10)
    return figure


def draw_accuracy(study, summaries, styles, published) -> plt.Figure:
    """Mean with standard deviation, every seed a dot, the published figure a diamond."""
    height = max(4, 1.5 + 0.4 * len(summaries))
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    for y, (model, summary) in enumerate(summaries.items()):
        seeds = [run.result["test_acc"] for run in study.runs[model]]
        if len(seeds) > 1:
            axes.plot(seeds, [y + 0.25] * len(seeds), ".", color="0.5")
        axes.errorbar(
            summary["test_acc_mean"], y, xerr=summary["test_acc_sd"], ls="none", capsize=4,
            **styles[model],
        )  # fmt: skip
        if model in published:
            axes.plot(published[model]["test_acc"], y, "D", mfc="none", color="black")
    explained = "test accuracy (%)"
    if any(summary["n"] > 1 for summary in summaries.values()):
        explained += "\nmean, standard deviation, seeds as dots"
    explained += "\npublished: diamond" if published else ""
    axes.set_yticks(range(len(summaries)), summaries)
    axes.invert_yaxis()
    axes.margins(y=0.15)
    axes.set_xlabel(explained)
    axes.set_title(title_of(study), fontsize=10)
    return figure


def draw_against(study, summaries, styles, x, xlabel, published, xerr=None, front=()) -> plt.Figure:
    """Test accuracy over `x`; diamonds are the published figures, rings the Pareto front."""
    figure, axes = plt.subplots(figsize=(8, max(4.5, 1 + 0.25 * len(x))), layout="constrained")
    for model in x:
        summary = summaries[model]
        axes.errorbar(
            x[model], summary["test_acc_mean"], yerr=summary["test_acc_sd"],
            xerr=xerr[model] if xerr else None, ls="none", capsize=4, label=model,
            **styles[model],
        )  # fmt: skip
        if model in front:
            axes.plot(x[model], summary["test_acc_mean"], "o", ms=14, mfc="none", mec="black")
    for model in published.keys() & x.keys():
        axes.plot(*published[model], "D", mfc="none", color=styles[model]["color"])
    axes.set(xlabel=xlabel, ylabel="test accuracy (%)")
    axes.set_title(title_of(study), fontsize=10)
    axes.margins(0.15)
    explained = "diamonds: published" if published else "rings: Pareto front" if front else None
    axes.legend(
        fontsize=9, title=explained, title_fontsize=9, loc="upper left", bbox_to_anchor=(1, 1)
    )
    return figure


def draw_time(costs, fastest, styles) -> plt.Figure:
    """A bar a model, measured the published way, and a paler one in the fastest mode."""
    height = max(4, 1.5 + 0.4 * len(costs))
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    models = [model for model in styles if model in costs]
    first = costs[models[0]]
    kinds = [costs, fastest] if fastest and fastest != costs else [costs]
    height = 0.8 / len(kinds)
    for i, rows in enumerate(kinds):
        for y, model in enumerate(models):
            if model in rows:
                row = rows[model]
                axes.barh(
                    y + (i - (len(kinds) - 1) / 2) * height, row["ms_per_image"], height=height,
                    xerr=spread_of(row), capsize=3, color=styles[model]["color"], alpha=1 - 0.5 * i,
                    label=f"{row['mode']}, {row['precision']}" if y == 0 else None,
                )  # fmt: skip
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("inference time (ms/image): median, p10 to p90")
    if len(kinds) > 1:
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    how = "" if len(kinds) > 1 else f", {first['precision']}, {first['mode']}"
    axes.set_title(f"batch {first['batch_size']}{how}\n{first['device']}", fontsize=10)
    return figure


def spread_of(row: dict) -> list[list[float]]:
    """Error bars from p10 to p90 about the median."""
    middle = row["ms_per_image"]
    return [[middle - row["ms_per_image_p10"]], [row["ms_per_image_p90"] - middle]]


def draw_curves(study, styles) -> plt.Figure:
    """Validation accuracy and training loss by epoch; a thin line a seed."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, max(4, 1 + 0.25 * len(study.runs))), layout="constrained"
    )
    for model, runs in study.runs.items():
        for i, run in enumerate(runs):
            epochs = [row["epoch"] for row in run.metrics]
            style = dict(color=styles[model]["color"], lw=1, label=model if i == 0 else None)
            style["marker"] = "o" if len(epochs) == 1 else None
            left.plot(epochs, [row["val_acc"] for row in run.metrics], **style)
            right.plot(epochs, [row["train_loss"] for row in run.metrics], **style)
    left.set(xlabel="epoch", ylabel="validation accuracy (%)")
    right.set(xlabel="epoch", ylabel="training loss")
    longest = max(len(run.metrics) for runs in study.runs.values() for run in runs)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0, longest + 1)
    right.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title_of(study), fontsize=10)
    return figure


def title_of(study) -> str:
    lines = [study.title, study.mark] if study.mark else [study.title]
    return "\n".join(textwrap.fill(line, 75) for line in lines)


def as_png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
