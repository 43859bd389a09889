"""How values become words: the templates' filters, and the cells of tables whose columns vary."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import jinja2

from kit.findings import CONTROL, Cost, Findings, ablation
from kit.results import Run, Study, in_table_order

# What Markdown would act upon; an underscore inside a word means nothing to it.
SPECIAL = re.compile(r"[\\`*\[\]|#<~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
UNSEEN = re.compile(r"[\x00-\x20\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def fill(template: str, **values) -> str:
    """A template of this folder, filled in; blank lines never come in pairs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(values))


# --- Filters --------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    """A table in Markdown; its header is the first row."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def one_line(value) -> str:
    return UNSEEN.sub(" ", str(value)).strip()


def text(value) -> str:
    """What comes from outside, as one line that Markdown shows as it is, whatever it holds."""
    as_entity = "<~$&"  # Markdown has no backslash for these
    line = one_line(value)
    return SPECIAL.sub(lambda m: f"&#{ord(m[0])};" if m[0] in as_entity else "\\" + m[0], line)


def number(form: str, unit: str = ""):
    """A filter: the number in this format, - for None."""
    return lambda value: "-" if value is None else f"{value:{form}}{unit}"


def interval(bounds: tuple[float, float] | None, form: str = "+.2f") -> str:
    return "-" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def p_value(p: float | None) -> str:
    return "< 0.001" if p is not None and p < 0.001 else number(".3f")(p)


def names(models: list[str]) -> str:
    return ", ".join(f"`{model}`" for model in models)


def label(model: str, study: Study) -> str:
    return f"{model} (quick)" if study.result["quick"] else model


def caption(figure: str) -> str:
    return figure.removesuffix(".png").replace("_", " ").replace(" vs ", " against ")


def mean_and_sd(summary: dict) -> str:
    if not summary["n"]:
        return "missing"
    spread = f" ± {summary['test_acc_sd']:.2f}" if summary["n"] > 1 else ""
    return f"{summary['test_acc_mean']:.2f}{spread}"


def training_ratio(cost: Cost) -> str:
    """Of the baseline's training time: the median over seeds, and the range."""
    if cost.ratios["training"] is None:
        return "-"
    low, high = cost.training_spread
    return f"{cost.ratios['training']:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low < high else "")


def how(row: dict) -> str:
    return f"{row['mode']} {row['precision']}"


def price(cost: Cost) -> str:
    """What a model costs beside the baseline, as the end of a sentence."""
    words = {"eager": "inference time"}
    if cost.training_spread and not cost.training_spread[0] <= 1 <= cost.training_spread[1]:
        words["training"] = "training time"  # otherwise the seeds do not even agree on the sign
    ratios = cost.ratios
    parts = [f"{ratios[key]:.2f} times its {what}" for key, what in words.items() if ratios[key]]
    return f", at {' and '.join(parts)}" if parts else ""


# --- Sentences and tables -------------------------------------------------------------------------


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
    groups = {"better": [], "worse": [], "not distinguishable": []}
    for model, c in f.against.items():
        groups[c.verdict].append(model)
    found = "; ".join(f"{verdict} {names(models)}" for verdict, models in groups.items() if models)
    against = "In this quick run, against" if f.study.result["quick"] else "Against"
    return f"**{against} the baseline, over {seeds} seeds: {found}.**"


def details(f: Findings) -> list[str]:
    """What modules gain over their controls, and which models are on the Pareto front."""
    quick = " in this quick run" if f.study.result["quick"] else ""
    so = {
        "better": "seeing the image helps",
        "worse": "seeing the image does harm",
        "not distinguishable": "nothing here is shown to come from seeing the image",
    }
    lines = [
        f"`{model}` against its control `{model}{CONTROL}` (the same parameters and operations, "
        f"gates that cannot see the image){quick}: {c.accuracy:.2f} % against {c.reference:.2f} %, "
        f"{c.difference:+.2f} points over {len(c.seeds)} seeds ({interval(c.corrected)}): "
        f"{so[c.verdict]}."
        for model, c in f.controlled.items()
    ]
    if f.front:
        judged = sum(model in f.costs for model in f.against) + 1
        lines.append(
            f"Accuracy against inference time ({f.timed['mode']}, {f.timed['precision']}), ties "
            f"counted as ties: the Pareto front of {judged} models is {names(f.front)}."
        )
    return lines


def published_rows(f: Findings) -> list[tuple]:
    """(model, summary, row of benchmark.json, published row) each; None for what there is not."""
    models = in_table_order(f.study.published.keys() | f.models.keys())
    sources = (f.models, f.costs, f.study.published)
    return [(m, *(defaultdict(lambda: None, s.get(m, {})) for s in sources)) for m in models]


def cost_table(f: Findings) -> list[list[str]]:
    """Header and rows: the baseline as measured, every other model relative to it."""
    eager, fast = (next(iter(rows.values()), None) for rows in (f.costs, f.fastest))
    columns = {
        "params": ("parameters", ",.0f", ""),
        "flops": ("FLOPs", ",.0f", ""),
        "eager": (f"inference, {how(eager)}" if eager else "", "#.3g", " ms/image"),
        "fast": (f"inference, {how(fast)}" if fast else "", "#.3g", " ms/image"),
        "training": ("training", ".1f", " s an epoch"),
        "memory": ("memory", ",.0f", " MB"),
    }
    measured = [k for k in columns if any(c.values[k] is not None for c in f.relative.values())]

    def cell(model: str, key: str) -> str:
        cost, (_, form, unit) = f.relative[model], columns[key]
        value, ratio = cost.values[key], cost.ratios[key]
        if ratio is None or model == "baseline":
            return "-" if value is None else f"{value:{form}}{unit}"
        if key in ("params", "flops"):
            return f"{100 * (ratio - 1):+.2f} %"
        return training_ratio(cost) if key == "training" else f"{ratio:.2f}x"

    header = ["model", *(columns[key][0] for key in measured)]
    rows = [[label(m, f.study), *(cell(m, key) for key in measured)] for m in f.relative]
    return [header, *rows]


def flops_and_time(cost: Cost, f: Findings, model: str) -> str:
    """FLOPs beside measured time, in words."""
    change = {key: 100 * (ratio - 1) for key, ratio in cost.ratios.items() if ratio}
    times = [f"{change['eager']:+.0f} % inference time ({how(f.costs[model])})"]
    if "fast" in change:
        times.append(f"{change['fast']:+.0f} % ({how(f.fastest[model])})")
    if "training" in change:
        low, high = (100 * (bound - 1) for bound in cost.training_spread)
        spread = f"({low:+.0f} to {high:+.0f} over seeds)"
        times.append(f"{change['training']:+.0f} % training time {spread}")
    return f"`{model}`: {change['flops']:+.2f} % FLOPs; measured {', '.join(times)}."


def class_table(f: Findings) -> list[list[str]]:
    """Header and rows: the baseline and differences from it; of many classes, those that differ."""
    against, n = f.by_class.against_baseline, len(f.by_class.classes)
    rows = []
    for i, (name, baseline) in enumerate(zip(f.by_class.classes, f.by_class.baseline, strict=True)):
        cells, differs = [text(name), f"{baseline:.2f}"], False
        for c in (comparisons[i] for comparisons in against.values()):
            holds = c.verdict != "not distinguishable"
            cells.append(f"**{c.difference:+.2f}**" if holds else f"{c.difference:+.2f}")
            differs |= holds
        if n <= 40 or differs:
            rows.append(cells)
    return [["class", "baseline %", *(label(m, f.study) for m in against)], *rows]


def gate_table(f: Findings) -> list[list[str]]:
    """Header and rows: accuracy in percent with gates as they are and fixed."""
    table = [["model", "seed", "images", "accuracy %", "gates fixed", "difference"]]
    for row in f.explained:
        cells = [label(f"`{row['model']}`", f.study), str(row["seed"]), f"{row['test_images']:,}"]
        cells += [f"{row['test_acc']:.2f}", number(".2f")(row.get("test_acc_gates_fixed"))]
        difference, bounds = ablation(row) or (None, None)
        cells.append(f"{difference:+.2f} ({interval(bounds)})" if bounds else "-")
        table.append(cells)
    return table


def mode_table(rows: list[dict]) -> list[list[str]]:
    """Header and rows: inference time of every model in every mode that was measured."""
    models = in_table_order({row["model"] for row in rows})
    variants = {}  # (width, batch size, precision, mode) -> model -> row
    for row in rows:
        variant = (row.get("width", 64), row["batch_size"], row["precision"], row["mode"])
        variants.setdefault(variant, {})[row["model"]] = row

    def cell(row: dict | None, base: dict) -> str:
        if row and row["batch_size"] == 1:
            keys = ("ms_per_image", "ms_per_image_p90", "ms_per_image_p99")
            return " / ".join(number("#.3g")(row.get(key)) for key in keys)
        ratio = f" ({row['ms_per_image'] / base['ms_per_image']:.2f}x)" if row and base else ""
        return f"{row['ms_per_image']:#.3g}" + ("" if row is base else ratio) if row else "-"

    table = [["width", "batch", "precision", "mode", *models, "baseline's TFLOP/s"]]
    for variant, by_model in variants.items():
        base = by_model.get("baseline", {})
        share = f"{base['tflops']:#.3g} ({100 * base['share_of_ceiling']:.0f} %)" if base else "-"
        table.append([*map(str, variant), *(cell(by_model.get(m), base) for m in models), share])
    return table


def environments(studies: list[Study]) -> list[str]:
    """What the runs were made with, each kind with their number, and when."""
    runs = [run for study in studies for run in study.all_runs]
    counted = Counter(map(environment, runs))
    lines = [f"{n} run{'s' * (n > 1)}: {words}" for words, n in counted.items()]
    if dates := sorted({str(run.env["date"]) for run in runs if "date" in run.env}):
        lines.append(f"trained on {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}")
    return lines


def machines(costs: list[dict]) -> list[tuple[str, str]]:
    return sorted({(row["device"], row.get("torch") or "unknown") for row in costs})


def made_with(study: Study) -> str:
    keys = ("device", "precision", "mode")
    kinds = sorted({", ".join(run.result[key] for key in keys) for run in study.all_runs})
    return f"{study.title}; {'; '.join(kinds)}"


def environment(run: Run) -> str:
    result, env, image = run.result, run.env, run.env.get("image")
    revision = image.get("revision") if isinstance(image, dict) else None
    commit = str(env.get("git_commit") or revision or "unknown")[:12]
    torch, cuda, python = (env.get(key) or "unknown" for key in ("torch", "cuda", "python"))
    return (
        f"{result['device']}, {result['precision']}, {result['mode']}; torch {torch}, CUDA {cuda}, "
        f"driver {env.get('driver') or 'none'}, Python {python}; commit {commit}"
        + (" with uncommitted changes" if env.get("git_dirty") else "")
    )


def short_table(f: Findings) -> str:
    """The first study for a terminal, in columns."""
    rows = [["model", "seeds", "test accuracy %", "verdict", "ms/image"]]
    for model, summary in f.models.items():
        verdict = f.against[model].verdict if model in f.against else "-"
        ms = number("#.3g")(f.costs.get(model, {}).get("ms_per_image"))
        rows.append([model, str(summary["n"]), mean_and_sd(summary), verdict, ms])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    return "\n".join([one_line(f.study.title), *filter(None, [one_line(f.study.mark)]), *lines])


FILTERS = {
    "table": table, "text": text, "names": names, "label": label, "caption": caption, "how": how,
    "mean_and_sd": mean_and_sd, "interval": interval, "p": p_value, "price": price,
    "training_ratio": training_ratio, "headline": headline, "details": details,
    "published_rows": published_rows, "cost_table": cost_table, "class_table": class_table,
    "flops_and_time": flops_and_time, "gate_table": gate_table, "mode_table": mode_table,
    "environments": environments, "machines": machines, "made_with": made_with,
    "one_line": one_line, "times": number(".2f", "x"), "n0": number(".0f"), "n1": number(".1f"), "n2": number(".2f"),
    "n3": number(".3f"), "g3": number("#.3g"), "plus": number("+.2f"), "percent": number(".0%"),
    "thousands": number(",.0f"), "millions": lambda n: number(".2f")(n and n / 1e6),
    "billions": lambda n: number(".2f")(n and n / 1e9),
}  # fmt: skip
