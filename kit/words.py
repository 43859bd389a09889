"""How values become words: the templates' filters, and the tables whose columns vary."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

from kit.costs import Cost
from kit.findings import Findings, ablation
from kit.results import Study, in_table_order
from kit.runs import FinishedRun, who

import jinja2

# What Markdown would act upon; an underscore inside a word means nothing to it.
SPECIAL = re.compile(r"[\\`*\[\]|#<~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
TEX = {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
UNSEEN = re.compile(r"[\x00-\x20\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")

# --- Values ---------------------------------------------------------------------------------------


def one_line(value) -> str:
    return UNSEEN.sub(" ", str(value)).strip()


def text(value) -> str:
    """What comes from outside, as one line that Markdown shows as it is, whatever it holds."""
    as_entity = "<~$&"  # Markdown has no backslash for these
    line = one_line(value)
    return SPECIAL.sub(lambda m: f"&#{ord(m[0])};" if m[0] in as_entity else "\\" + m[0], line)


def tex(value) -> str:
    """As text that LaTeX prints as it is; what pdflatex has no character for is a question mark."""
    line = one_line(value).encode("latin-1", errors="replace").decode("latin-1")
    return re.sub(r"[\\{}$&#^_~%]", lambda m: TEX.get(m[0], "\\" + m[0]), line)


def caption(picture: str) -> str:
    """In words; one in a run's folder is called by model and seed."""
    name = " ".join(unquote(picture)[:-4].split("/")[-3:])
    return text(name.replace("_", " ").replace(" vs ", " against "))


def fmt(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def change(ratio: float, form: str = "+.0f") -> str:
    """In percent: 0.9 is -10."""
    return f"{100 * (ratio - 1):{form}}"


def interval(bounds: tuple[float, float] | None, form: str = "+.2f") -> str:
    return "-" if bounds is None else " to ".join(f"{bound:{form}}" for bound in bounds)


def mean_and_sd(summary: dict) -> str:
    if not summary:
        return "missing"
    spread = f" ± {summary['test_acc_sd']:.2f}" if summary["n"] > 1 else ""
    return f"{summary['test_acc_mean']:.2f}{spread}"


def flag(reasons) -> str:
    """Marks what is not as it should be; a line below says why."""
    return " †" if reasons else ""


def flagged(models: list[str], f: Findings, costs: bool = False) -> str:
    """Their names, marked where their verdict is, or, if costs count, their time."""
    marked = {model for model, c in f.against.items() if c.unlike} | set(f.stale if costs else ())
    return ", ".join(f"`{model}`{flag(model in marked)}" for model in models)


def how(row: dict) -> str:
    return text(f"{row.get('mode')} {row.get('precision')}")


def training_ratio(cost: Cost) -> str:
    """Of the baseline's training time: the median over seeds, and the range."""
    if cost.ratios["training"] is None:
        return "-"
    low, high = cost.training_spread
    return f"{cost.ratios['training']:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low < high else "")


# --- Studies --------------------------------------------------------------------------------------


def mark(study: Study) -> str:
    """How much less than the published recipe this is; empty for a full study."""
    if not study.result["quick"]:
        return ""
    config, width = study.all_runs[0].config, study.result["width"]
    epochs = config["epochs"]
    less = [f"{epochs} epoch" + "s" * (epochs != 1)]
    for key, what in (("limit_train", "training images"), ("limit_test", "test images")):
        if config[key]:
            less.append(f"{config[key]:,} {what}")
    if width != 64:
        less.append(f"width {width} instead of 64")
    if len(less) == 1 and "patience" in study.overrides:
        less.append(f"patience {study.overrides['patience']}")
    return f"smoke test: {', '.join(less)}"


def environments(runs: list[FinishedRun]) -> list[str]:
    """What the runs were made with, each kind with their number, and when."""
    counted = Counter(map(environment, runs)).items()
    lines = [f"{n} run{'s' * (n > 1)}: {words}" for words, n in counted]
    if dates := sorted({str(run.env["date"]) for run in runs if "date" in run.env}):
        lines.append(f"trained on {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}")
    return lines


def environment(run: FinishedRun) -> str:
    env, image = run.env, run.env.get("image")
    revision = image.get("revision") if isinstance(image, dict) else None
    commit = str(env.get("git_commit") or revision or "unknown")[:12]
    torch, cuda, python = (env.get(key) or "unknown" for key in ("torch", "cuda", "python"))
    return (
        f"{device(run)}; torch {torch}, CUDA {cuda}, driver {env.get('driver') or 'none'}, Python "
        f"{python}; commit {commit}" + (" with uncommitted changes" if env.get("git_dirty") else "")
    )


def device(run: FinishedRun) -> str:
    return ", ".join(run.result[key] for key in ("device", "precision", "mode"))


def devices(study: Study) -> str:
    return "; ".join(sorted(set(map(device, study.all_runs))))


# --- Tables ---------------------------------------------------------------------------------------


def header(columns: str) -> str:
    """The first two lines of a table with the columns "one | another"."""
    return f"| {columns} |\n|{' --- |' * len(columns.split(' | '))}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join([header(" | ".join(columns)), *(f"| {' | '.join(row)} |" for row in rows)])


def filled(columns: dict[str, list[str | None]]) -> str:
    """A table of the columns that hold something."""
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    rows = zip(*kept.values(), strict=True)
    return table(list(kept), [[cell or "-" for cell in row] for row in rows])


def main_table(f: Findings, quick: str) -> str:
    """Ours, and of a full study the published figures beside them."""
    columns = {"model": [], "seeds": [], "test accuracy %": [], "published accuracy %": [],
               "parameters M": [], "published parameters M": [], "GFLOPs": [],
               "published GFLOPs": [], "ms/image": [], "published ms/image": []}  # fmt: skip
    for model in f.wanted if f.published else f.models:
        s, cost, published = (x.get(model, {}) for x in (f.models, f.costs, f.published))
        ms, sizes = cost.get("ms_per_image"), s or cost
        cells = (
            text(model) + quick, str(s.get("n", 0)), mean_and_sd(s),
            maybe(published.get("test_acc")),
            maybe(sizes and sizes["params"] / 1e6), maybe(published.get("params_m")),
            maybe(cost and cost["flops"] / 1e9), maybe(published.get("flops_g")),
            ms and f"{ms:#.3g}{flag(f.stale.get(model))}", maybe(published.get("ms_per_image")),
        )  # fmt: skip
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return filled(columns)


def maybe(value: float | None) -> str | None:
    return f"{value:.2f}" if value else None


def cost_table(f: Findings, quick: str) -> str:
    """The baseline as measured, every other model relative to it."""
    columns = {
        "params": ("parameters", ",.0f", ""),
        "flops": ("FLOPs", ",.0f", ""),
        "inference": (f"inference, {how(f.timed or {})}", "#.3g", " ms/image"),
        "training": ("training", ".1f", " s/epoch"),
        "memory": ("memory", ",.0f", " MB"),
    }

    def cell(model: str, key: str) -> str | None:
        cost, ratio = f.relative[model], f.relative[model].ratios[key]
        if cost.values[key] is None:
            return None
        if ratio is None or model == "baseline":
            return fmt(cost.values[key], *columns[key][1:])
        if key in ("params", "flops"):
            return change(ratio, "+.2f") + "%"
        return training_ratio(cost) if key == "training" else f"{ratio:.2f}x"

    names = [text(model) + quick + flag(f.stale.get(model)) for model in f.relative]
    cells = {columns[key][0]: [cell(model, key) for model in f.relative] for key in columns}
    return filled({"model": names} | cells)


def mode_table(rows: list[dict]) -> str:
    """Inference time of every model in every mode that was measured."""
    models = in_table_order({row["model"] for row in rows})
    variants = {}  # (width, batch size, precision, mode) -> model -> row
    for row in rows:
        variant = (row["width"], row["batch_size"], row["precision"], row["mode"])
        variants.setdefault(variant, {})[row["model"]] = row

    def cell(row: dict | None, base: dict | None) -> str:
        if row is None:
            return "-"
        if row["batch_size"] == 1:
            times = (row.get(f"ms_per_image{p}") for p in ("", "_p90", "_p99"))
            return " / ".join(fmt(time, "#.3g") for time in times)
        ratio = f" ({row['ms_per_image'] / base['ms_per_image']:.2f}x)" if base else ""
        return f"{row['ms_per_image']:#.3g}" + ("" if row is base else ratio)

    found = []
    for variant, by_model in variants.items():
        base = by_model.get("baseline")
        found.append([*map(str, variant), *(cell(by_model.get(m), base) for m in models)])
    return table(["width", "batch", "precision", "mode", *map(text, models)], found)


def short_table(f: Findings) -> str:
    """The first study for a terminal, in columns."""
    rows = [["model", "seeds", "test accuracy %", "verdict", "ms/image"]]
    for model, summary in f.models.items():
        c = f.against.get(model)
        verdict = c.verdict + flag(c.unlike) if c else "-"
        ms = fmt(f.costs.get(model, {}).get("ms_per_image"), "#.3g") + flag(f.stale.get(model))
        rows.append([model, str(summary["n"]), mean_and_sd(summary), verdict, ms])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]
    lines += [f"† {line}" for line in notes(f)]
    lines += [one_line(f"left out, {who(runs)}: {why}") for why, runs in f.study.left_out.items()]
    lines += map(one_line, f.damaged)
    return "\n".join([one_line(f.study.title), *filter(None, [mark(f.study)]), *lines])


def notes(f: Findings) -> list[str]:
    """What the marks † stand for."""
    found = [line for c in [*f.against.values(), *f.controlled.values()] for line in c.unlike]
    for model, scripts in f.stale.items():
        names = ", ".join(scripts)
        found.append(f"{model}: its cost was measured with other code ({names}) than its accuracy")
    return [one_line(line) for line in dict.fromkeys(found)]


# --- Templates ------------------------------------------------------------------------------------

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
FILTERS = (
    text, tex, flag, flagged, who, one_line, fmt, change, interval, mean_and_sd, how, ablation,
    training_ratio, mark, environments, devices, notes, header, main_table, cost_table, mode_table,
)  # fmt: skip
TEMPLATES.filters |= {function.__name__: function for function in FILTERS} | {
    "names": lambda models: ", ".join(f"`{model}`" for model in models),
    "caption": caption,
    "p": lambda p: "< 0.001" if p is not None and p < 0.001 else fmt(p, ".3f"),
}


def fill(template: str, **values) -> str:
    """A template of this folder, filled in; blank lines never come in pairs."""
    return re.sub(r"\n{3,}", "\n\n", TEMPLATES.get_template(template).render(values))
