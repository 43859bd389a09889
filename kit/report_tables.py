"""The tables of a report, in Markdown and for the terminal."""

from kit.findings import Findings, ablation
from kit.results import in_table_order
from kit.runs import who
from kit.tables import table
from kit.verdicts import Comparison
from kit.words import (
    TEMPLATES,
    answer,
    flag,
    fmt,
    how,
    inference,
    interval,
    mean_and_sd,
    notes,
    one_line,
    p_value,
    text,
    verdict,
)


def columns(found: dict[str, list[str | None]]) -> str:
    """A table of the columns that hold something."""
    kept = {name: cells for name, cells in found.items() if any(cells)}
    rows = zip(*kept.values(), strict=True)
    return table([list(kept), *([cell or "-" for cell in row] for row in rows)])


def accuracy(f: Findings, model: str) -> str:
    middle, sd = mean_and_sd(f, model)
    return f"{middle:.2f} ± {sd:.2f}" if sd is not None else f"{middle:.2f}"


def difference(f: Findings, model: str) -> str | None:
    c = f.against.get(model)
    if not c:
        return "no verdict: fewer than two common seeds" * (model in f.unjudged) or None
    other = abs(c.reference - f.models[f.reference]["test_acc_mean"]) > 0.005
    where = f"; `{f.reference}` {c.reference:.2f} on these seeds" * other
    return f"{c.difference:+.2f} ({interval(c.corrected)}){where}"


def main_table(f: Findings, seeds: bool = True) -> str:
    """Answer and price in at most six columns; five in a README."""
    models = list(f.models)
    verdicts = [f.against.get(model) for model in models]
    return columns({
        "model": [f"`{model}`{f.study.mark}" for model in models],
        "seeds": [seeds and str(len(c.seeds) if (c := f.against.get(m)) else f.models[m]["n"])
                  for m in models],
        "test accuracy %": [accuracy(f, model) for model in models],
        f"against `{f.reference}`, points": [difference(f, model) for model in models],
        "verdict": [c and verdict(c) for c in verdicts],
        "inference time": [inference(f, m) if f.relative[m].ratios["inference"] else None
                           for m in models],
    })  # fmt: skip


def published_table(f: Findings) -> str:
    """The four published quantities beside ours."""

    def both(model, key, ours, form=".2f"):
        return f"{fmt(f.published.get(model, {}).get(key))} / {fmt(ours, form)}"

    rows = [["model", "test accuracy %", "parameters, M", "GFLOPs", "ms/image"]]
    for model in in_table_order(f.published.keys() | f.models.keys()):
        s, row = f.models.get(model), f.costs.get(model)
        params = (s or row or {}).get("params")
        rows.append([
            f"`{model}`", both(model, "test_acc", s and s["test_acc_mean"]),
            both(model, "params_m", params and params / 1e6),
            both(model, "flops_g", row and row["flops"] / 1e9),
            both(model, "ms_per_image", row and row["ms_per_image"], "#.3g"),
        ])  # fmt: skip
    return table(rows)


def test_table(f: Findings) -> str:
    head = ["model", "difference", "corrected interval", "verdict", "p (Holm)", "pairs"]
    rows = [
        [f"`{m}`{f.study.mark}", f"{c.difference:+.2f}", interval(c.corrected), verdict(c),
         p_value(c.p_holm), str(len(c.seeds))]
        for m, c in f.against.items()
    ]  # fmt: skip
    return table([head, *rows])


def seed_table(f: Findings) -> str:
    epochs = any(set(s["epochs_run"]) != {f.study.result["epochs_run"]} for s in f.models.values())
    return columns({
        "model": [f"`{model}`{f.study.mark}" for model in f.models],
        "seeds": [str(s["n"]) for s in f.models.values()],
        "mean %": [fmt(s["test_acc_mean"]) for s in f.models.values()],
        "SD": [s["test_acc_sd"] and fmt(s["test_acc_sd"], ".3f") for s in f.models.values()],
        "lowest to highest": [interval((s["test_acc_min"], s["test_acc_max"]), ".2f")
                              for s in f.models.values()],
        "epochs trained, seed by seed": [epochs and ", ".join(map(str, s["epochs_run"]))
                                         for s in f.models.values()],
    })  # fmt: skip


def cost_table(f: Findings) -> str:
    """The baseline as measured, every other model relative to it."""
    fastest = next(iter(f.fastest.values()), None)
    heads = {
        "params": ("parameters", ",.0f", ""),
        "flops": ("FLOPs", ",.0f", ""),
        "inference": (f"inference, {how(f.timed)}", "#.3g", " ms/image"),
        "fastest": (f"inference, {how(fastest)}", "#.3g", " ms/image"),
        "training": ("training", ".1f", " s/epoch"),
        "memory": ("memory", ",.0f", " MB"),
    }

    def cell(model: str, key: str) -> str | None:
        value, ratio = (of[key] for of in (f.relative[model].values, f.relative[model].ratios))
        if value is None:
            return None
        if ratio is None or model == "baseline":
            return fmt(value, *heads[key][1:])
        return f"{100 * (ratio - 1):+.2f}%" if key in ("params", "flops") else f"{ratio:.2f}x"

    models = [f"`{model}`{f.study.mark}{flag(f.stale.get(model))}" for model in f.relative]
    cells = {heads[key][0]: [cell(model, key) for model in f.relative] for key in heads}
    return columns({"model": models} | cells)


def class_table(f: Findings) -> str:
    """Points per class; bold where significant. Of many classes those with a significant one."""
    found, models = f.by_class, list(f.by_class.against)
    rows = [["class", f"`{f.reference}` %", *(f"`{model}`{f.study.mark}" for model in models)]]
    for i, name in enumerate(found.classes):
        cs = [found.against[model][i] for model in models]
        bold = ["**" * (c.verdict in ("better", "worse")) for c in cs]
        if len(found.classes) <= 40 or any(bold):
            cells = (f"{b}{c.difference:+.2f}{b}" for b, c in zip(bold, cs, strict=True))
            rows.append([text(name), fmt(found.baseline[i]), *cells])
    return table(rows)


def gate_table(f: Findings) -> str:
    """Accuracy with every gate replaced by its mean."""
    rows = [["model", "seed", "images", "accuracy %", "gates replaced by their mean", "difference"]]
    for e in f.explained:
        found = ablation(e)
        gained = f"{found[0]:+.2f} ({interval(found[1])})" if found else "-"
        rows.append([
            f"`{e['model']}`{f.study.mark}", str(e["seed"]), f"{e['test_images']:,}",
            fmt(e["test_acc"]), fmt(e["test_acc_gates_fixed"]), gained,
        ])  # fmt: skip
    return table(rows)


def stage_table(f: Findings) -> str:
    rows = [["model", "stage", "mean gate", "spread over channels", "over images", "saturated",
             "near-constant"]]  # fmt: skip
    keys = dict(mean=".3f", spread_over_channels=".3f", spread_over_images=".3f", saturated=".0%")
    for e in f.explained:
        for stage, gate in e["gates"].items():
            cells = [fmt(gate[k], form) for k, form in (keys | dict(hardly_vary=".0%")).items()]
            rows.append([f"`{e['model']}`{f.study.mark}", text(stage), *cells])
    return table(rows)


def compared_table(here: Findings, there: Findings, against: dict[str, Comparison]) -> str:
    """Two sets of runs of the same models, paired by seed."""
    rows = [["model", "here %", "there %", "difference", "verdict", "pairs"]]
    for model in (model for model in here.models if model in there.models):
        c = against.get(model)
        means = [f.models[model]["test_acc_mean"] for f in (here, there)]
        a, b = (c.accuracy, c.reference) if c else means
        rest = ("-", "none: fewer than two common seeds", "-")
        if c:
            points = f"{c.difference:+.2f} ({interval(c.corrected)})"
            rest = (points, verdict(c), str(len(c.seeds)))
        rows.append([f"`{model}`{here.study.mark}", fmt(a), fmt(b), *rest])
    return table(rows)


def for_terminal(f: Findings) -> str:
    """A study in columns, with its first sentence."""
    rows = [["model", "seeds", "test accuracy %", f"against {f.reference}", "verdict", "inference"]]
    for model, summary in f.models.items():
        c = f.against.get(model)
        cells = (f"{c.difference:+.2f} ({interval(c.corrected)})", verdict(c)) if c else ("-", "-")
        n, time = str(len(c.seeds) if c else summary["n"]), inference(f, model)
        rows.append([model + f.study.mark, n, accuracy(f, model), *cells, time])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    lines += [f"† {line}" for line in notes(f)]
    lines += [one_line(f"left out, {who(runs)}: {why}") for why, runs in f.study.left_out.items()]
    lines += map(one_line, f.lost)
    return "\n".join([one_line(f.study.title), answer(f).replace("`", ""), *lines])


TABLES = (
    main_table, published_table, test_table, seed_table, cost_table, class_table, gate_table,
    stage_table,
)  # fmt: skip
TEMPLATES.filters |= {function.__name__: function for function in TABLES}
