"""How values become words: the templates' filters, and the tables whose columns vary."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import jinja2

from kit.costs import Cost
from kit.findings import Findings, ablation
from kit.results import Run, Study, in_table_order

# What Markdown would act upon; an underscore inside a word means nothing to it.
SPECIAL = re.compile(r"[\\`*\[\]|#<~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
UNSEEN = re.compile(r"[\x00-\x20\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")

# --- Values ---------------------------------------------------------------------------------------


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


def mean_and_sd(summary: dict) -> str:
    if not summary["n"]:
        return "missing"
    spread = f" ± {summary['test_acc_sd']:.2f}" if summary["n"] > 1 else ""
    return f"{summary['test_acc_mean']:.2f}{spread}"


def how(row: dict) -> str:
    return text(f"{row['mode']} {row['precision']}")


def training_ratio(cost: Cost) -> str:
    """Of the baseline's training time: the median over seeds, and the range."""
    if cost.ratios["training"] is None:
        return "-"
    low, high = cost.training_spread
    return f"{cost.ratios['training']:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low < high else "")


def price(cost: Cost) -> str:
    """What a model costs relative to the baseline, as the end of a sentence."""
    words = {"eager": "inference time"}
    if cost.training_spread and not cost.training_spread[0] <= 1 <= cost.training_spread[1]:
        words["training"] = "training time"  # otherwise the seeds do not even agree on the sign
    ratios = cost.ratios
    parts = [f"{ratios[key]:.2f} times its {what}" for key, what in words.items() if ratios[key]]
    return f", at {' and '.join(parts)}" if parts else ""


def flops_and_time(cost: Cost, f: Findings, model: str) -> str:
    """The change in FLOPs and in measured time, in words."""
    change = {key: 100 * (ratio - 1) for key, ratio in cost.ratios.items() if ratio}
    times = [f"{change['eager']:+.0f}% inference time ({how(f.costs[model])})"]
    if "fast" in change:
        times.append(f"{change['fast']:+.0f}% ({how(f.fastest[model])})")
    if "training" in change:
        low, high = (100 * (bound - 1) for bound in cost.training_spread)
        spread = f"({low:+.0f} to {high:+.0f} over seeds)"
        times.append(f"{change['training']:+.0f}% training time {spread}")
    return f"`{model}`: {change['flops']:+.2f}% FLOPs; measured {', '.join(times)}."


# --- Studies --------------------------------------------------------------------------------------


def mark(study: Study) -> str:
    """How much less than the published recipe this is; empty for a full study."""
    if not study.result["quick"]:
        return ""
    config, width = study.all_runs[0].config, study.result["width"]
    epochs = config.get("epochs") or "?"
    less = [f"{epochs} epoch" + "s" * (epochs != 1)]
    for key, what in (("limit_train", "training images"), ("limit_test", "test images")):
        if config.get(key):
            less.append(f"{config[key]:,} {what}")
    if width != 64:
        less.append(f"width {width} instead of 64")
    if len(less) == 1 and "patience" in study.overrides:
        less.append(f"patience {study.overrides['patience']}")
    return f"smoke test: {', '.join(less)}"


def environments(studies: list[Study]) -> list[str]:
    """What the runs were made with, each kind with their number, and when."""
    runs = [run for study in studies for run in study.all_runs]
    counted = Counter(map(environment, runs))
    lines = [f"{n} run{'s' * (n > 1)}: {words}" for words, n in counted.items()]
    if dates := sorted({str(run.env["date"]) for run in runs if "date" in run.env}):
        lines.append(f"trained on {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}")
    return lines


def environment(run: Run) -> str:
    env, image = run.env, run.env.get("image")
    revision = image.get("revision") if isinstance(image, dict) else None
    commit = str(env.get("git_commit") or revision or "unknown")[:12]
    torch, cuda, python = (env.get(key) or "unknown" for key in ("torch", "cuda", "python"))
    return (
        f"{device(run)}; torch {torch}, CUDA {cuda}, driver {env.get('driver') or 'none'}, Python "
        f"{python}; commit {commit}" + (" with uncommitted changes" if env.get("git_dirty") else "")
    )


def device(run: Run) -> str:
    return ", ".join(run.result[key] for key in ("device", "precision", "mode"))


def devices(study: Study) -> str:
    return "; ".join(sorted(set(map(device, study.all_runs))))


# --- Tables: rows of cells, the header first ------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def published_rows(f: Findings) -> list[tuple]:
    """(model, summary, row of benchmark.json, published row) each; None for what there is not."""
    models = in_table_order(f.study.published.keys() | f.models.keys())
    sources = (f.models, f.costs, f.study.published)
    return [(m, *(defaultdict(lambda: None, s.get(m, {})) for s in sources)) for m in models]


def cost_table(f: Findings, quick: str) -> list[list[str]]:
    """The baseline as measured, every other model relative to it."""
    eager, fast = (next(map(how, rows.values()), "") for rows in (f.costs, f.fastest))
    columns = {
        "params": ("parameters", ",.0f", ""),
        "flops": ("FLOPs", ",.0f", ""),
        "eager": (f"inference, {eager}", "#.3g", " ms/image"),
        "fast": (f"inference, {fast}", "#.3g", " ms/image"),
        "training": ("training", ".1f", " s/epoch"),
        "memory": ("memory", ",.0f", " MB"),
    }
    measured = [k for k in columns if any(c.values[k] is not None for c in f.relative.values())]

    def cell(model: str, key: str) -> str:
        cost, ratio = f.relative[model], f.relative[model].ratios[key]
        if ratio is None or model == "baseline":
            return number(*columns[key][1:])(cost.values[key])
        if key in ("params", "flops"):
            return f"{100 * (ratio - 1):+.2f}%"
        return training_ratio(cost) if key == "training" else f"{ratio:.2f}x"

    rows = [[text(model) + quick, *(cell(model, key) for key in measured)] for model in f.relative]
    return [["model", *(columns[key][0] for key in measured)], *rows]


def class_table(f: Findings, quick: str) -> list[list[str]]:
    """The baseline's accuracy and differences from it; of many classes, those that differ."""
    found, rows = f.by_class, []
    for i, (name, baseline) in enumerate(zip(found.classes, found.baseline, strict=True)):
        comparisons = [of_model[i] for of_model in found.against_baseline.values()]
        differ = [c.verdict != "not distinguishable" for c in comparisons]
        if len(found.classes) <= 40 or any(differ):
            marks = ["**" * bold for bold in differ]
            cells = [f"{m}{c.difference:+.2f}{m}" for m, c in zip(marks, comparisons, strict=True)]
            rows.append([text(name), f"{baseline:.2f}", *cells])
    return [
        ["class", "baseline %", *(text(model) + quick for model in found.against_baseline)],
        *rows,
    ]


def mode_table(rows: list[dict]) -> list[list[str]]:
    """Inference time of every model in every mode that was measured."""
    models = in_table_order({row["model"] for row in rows})
    variants = {}  # (width, batch size, precision, mode) -> model -> row
    for row in rows:
        variant = (row.get("width", 64), row["batch_size"], row["precision"], row["mode"])
        variants.setdefault(variant, {})[row["model"]] = row

    def cell(row: dict | None, base: dict | None) -> str:
        if row is None:
            return "-"
        if row["batch_size"] == 1:
            return " / ".join(
                number("#.3g")(row.get(f"ms_per_image{p}")) for p in ("", "_p90", "_p99")
            )
        ratio = f" ({row['ms_per_image'] / base['ms_per_image']:.2f}x)" if base else ""
        return f"{row['ms_per_image']:#.3g}" + ("" if row is base else ratio)

    found = [["width", "batch", "precision", "mode", *map(text, models), "baseline's TFLOP/s"]]
    for variant, by_model in variants.items():
        base = by_model.get("baseline")
        share = "-"
        if base and base.get("tflops") and base.get("share_of_ceiling"):
            share = f"{base['tflops']:#.3g} ({100 * base['share_of_ceiling']:.0f}%)"
        found.append([*map(str, variant), *(cell(by_model.get(m), base) for m in models), share])
    return found


def short_table(f: Findings) -> str:
    """The first study for a terminal, in columns."""
    rows = [["model", "seeds", "test accuracy %", "verdict", "ms/image"]]
    for model, summary in f.models.items():
        verdict = f.against[model].verdict if model in f.against else "-"
        ms = number("#.3g")(f.costs.get(model, {}).get("ms_per_image"))
        rows.append([model, str(summary["n"]), mean_and_sd(summary), verdict, ms])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    return "\n".join([one_line(f.study.title), *filter(None, [mark(f.study)]), *lines])


# --- Templates ------------------------------------------------------------------------------------

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {
    "text": text, "one_line": one_line, "interval": interval, "mean_and_sd": mean_and_sd,
    "how": how, "price": price, "training_ratio": training_ratio, "flops_and_time": flops_and_time,
    "ablation": ablation, "mark": mark, "environments": environments, "devices": devices,
    "cost_table": cost_table, "class_table": class_table, "mode_table": mode_table, "table": table,
    "published_rows": published_rows,
    "names": lambda models: ", ".join(f"`{model}`" for model in models),
    "caption": lambda figure: figure[:-4].replace("_", " ").replace(" vs ", " against "),
    "n0": number(".0f"), "n1": number(".1f"), "n2": number(".2f"), "n3": number(".3f"),
    "g3": number("#.3g"), "plus": number("+.2f"), "percent": number(".0%"),
    "times": number(".2f", "x"), "thousands": number(",.0f"),
    "millions": lambda n: number(".2f")(n and n / 1e6),
    "billions": lambda n: number(".2f")(n and n / 1e9),
    "p": lambda p: "< 0.001" if p is not None and p < 0.001 else number(".3f")(p),
}  # fmt: skip


def fill(template: str, **values) -> str:
    """A template of this folder, filled in; blank lines never come in pairs."""
    return re.sub(r"\n{3,}", "\n\n", TEMPLATES.get_template(template).render(values))
