"""The report's tables, in Markdown."""

from kit import words
from kit.command_line import table
from kit.findings import Findings, ablation
from kit.results import in_table_order
from kit.verdicts import Comparison

MANY = 40  # with more classes, only those with a significant difference are shown


def columns(found: dict[str, list[str | None]]) -> str:
    """A table without the empty columns."""
    kept = {name: cells for name, cells in found.items() if any(cells)}
    rows = zip(*kept.values(), strict=True)
    return table([list(kept), *([cell or "-" for cell in row] for row in rows)])


def accuracy(f: Findings, model: str) -> str:
    middle, sd = words.mean_and_sd(f, model)
    return f"{middle:.2f} ± {sd:.2f}" if sd is not None else f"{middle:.2f}"


def difference(f: Findings, model: str) -> str | None:
    c = f.against.get(model)
    if not c:
        return "no verdict: fewer than two common seeds" * (model in f.unjudged) or None
    other = abs(c.reference - f.models[f.reference]["test_acc_mean"]) > 0.005
    where = f"; `{f.reference}` {c.reference:.2f} on these seeds" * other
    return f"{c.difference:+.2f} ({words.interval(c.corrected)}){where}"


def main_table(f: Findings, seeds: bool = True) -> str:
    """Verdict and cost in at most six columns; five in a README."""
    models = list(f.models)
    verdicts = [f.against.get(model) for model in models]
    return columns({
        "model": [f"`{model}`{f.study.mark}" for model in models],
        "seeds": [seeds and str(len(f.compared_runs.get(m) or f.models[m]["seeds"]))
                  for m in models],
        "test accuracy %": [accuracy(f, model) for model in models],
        f"against `{f.reference}`, points": [difference(f, model) for model in models],
        "verdict": [c and words.verdict(c) for c in verdicts],
        "inference time": [words.inference(f, m) if f.relative[m].ratios["inference"] else None
                           for m in models],
    })  # fmt: skip


def published_table(f: Findings) -> str:
    """The four published quantities and ours."""

    def both(model, key, ours, form=".2f"):
        return f"{words.fmt(f.published.get(model, {}).get(key))} / {words.fmt(ours, form)}"

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


def cost_table(f: Findings) -> str:
    """The baseline as measured, every other model relative to it."""
    fastest = next(iter(f.fastest.values()), None)
    heads = {
        "params": ("parameters", ",.0f", ""),
        "flops": ("FLOPs", ",.0f", ""),
        "inference": (f"inference, {words.how(f.timed)}", "#.3g", " ms/image"),
        "fastest": (f"inference, {words.how(fastest)}", "#.3g", " ms/image"),
        "training": ("training", ".1f", " s/epoch"),
        "memory": ("memory", ",.0f", " MB"),
    }

    def cell(model: str, key: str) -> str | None:
        value, ratio = (of[key] for of in (f.relative[model].values, f.relative[model].ratios))
        if value is None:
            return None
        if ratio is None or model == "baseline":
            return words.fmt(value, *heads[key][1:])
        return f"{100 * (ratio - 1):+.2f}%" if key in ("params", "flops") else f"{ratio:.2f}x"

    models = [f"`{model}`{f.study.mark}{words.flag(f.stale.get(model))}" for model in f.relative]
    cells = {heads[key][0]: [cell(model, key) for model in f.relative] for key in heads}
    return columns({"model": models} | cells)


def class_table(f: Findings) -> str:
    """Points per class, bold if significant; of many classes, only rows with a bold one."""
    found, models = f.by_class, list(f.by_class.against)
    rows = [["class", f"`{f.reference}` %", *(f"`{model}`{f.study.mark}" for model in models)]]
    for i, name in enumerate(found.classes):
        cs = [found.against[model][i] for model in models]
        bold = ["**" * (c.verdict in ("better", "worse")) for c in cs]
        if len(found.classes) <= MANY or any(bold):
            cells = (f"{b}{c.difference:+.2f}{b}" for b, c in zip(bold, cs, strict=True))
            rows.append([words.text(name), words.fmt(found.baseline[i]), *cells])
    return table(rows)


def gate_table(f: Findings) -> str:
    """Accuracy with every gate replaced by its mean."""
    rows = [["model", "seed", "images", "accuracy %", "gates replaced by their mean", "difference"]]
    for e in f.explained:
        found = ablation(e)
        gained = f"{found[0]:+.2f} ({words.interval(found[1])})" if found else "-"
        rows.append([
            f"`{e['model']}`{f.study.mark}", str(e["seed"]), f"{e['test_images']:,}",
            words.fmt(e["test_acc"]), words.fmt(e["test_acc_gates_fixed"]), gained,
        ])  # fmt: skip
    return table(rows)


def stage_table(f: Findings) -> str:
    rows = [["model", "stage", "mean gate", "spread over channels", "over images", "saturated",
             "near-constant"]]  # fmt: skip
    keys = dict(mean=".3f", spread_over_channels=".3f", spread_over_images=".3f", saturated=".0%",
                hardly_vary=".0%")  # fmt: skip
    for e in f.explained:
        for stage, gate in e["gates"].items():
            cells = [words.fmt(gate[key], form) for key, form in keys.items()]
            rows.append([f"`{e['model']}`{f.study.mark}", words.text(stage), *cells])
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
            points = f"{c.difference:+.2f} ({words.interval(c.corrected)})"
            rest = (points, words.verdict(c), str(len(c.seeds)))
        rows.append([f"`{model}`{here.study.mark}", words.fmt(a), words.fmt(b), *rest])
    return table(rows)
