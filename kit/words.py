"""A study in sentences, for report.md, results.tex, the README and the terminal."""

import re
from collections import Counter
from statistics import mean, stdev
from urllib.parse import unquote

from kit.findings import Findings
from kit.results import Study
from kit.runs import FinishedRun
from kit.verdicts import VERDICTS, Comparison

# What Markdown would interpret; it ignores underscores inside words.
SPECIAL = re.compile(r"[\\`*\[\]|#<~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
TEX = {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
UNSEEN = re.compile(r"[\x00-\x20\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")
FEW = 5  # pairs: a verdict based on fewer says so

# --- Values ---------------------------------------------------------------------------------------


def one_line(value) -> str:
    return UNSEEN.sub(" ", str(value)).strip()


def text(value) -> str:
    """Untrusted text as one line, escaped so that Markdown shows it verbatim."""
    as_entity = "<~$&"  # Markdown cannot escape these by backslash
    line = one_line(value)
    return SPECIAL.sub(lambda m: f"&#{ord(m[0])};" if m[0] in as_entity else "\\" + m[0], line)


def tex(value) -> str:
    """Escaped for LaTeX; characters that pdflatex cannot print become question marks."""
    line = one_line(value).encode("latin-1", errors="replace").decode("latin-1")
    return re.sub(r"[\\{}$&#^_~%]", lambda m: TEX.get(m[0], "\\" + m[0]), line)


def caption(picture: str) -> str:
    """From a path; in a run's folder, with model and seed."""
    name = " ".join(unquote(picture)[:-4].split("/")[-3:])
    return text(name.replace("_", " ").replace(" vs ", " against "))


def fmt(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def interval(bounds: tuple[float, float] | None, form: str = "+.2f") -> str:
    return "-" if bounds is None else " to ".join(f"{bound:{form}}" for bound in bounds)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def flag(reasons) -> str:
    """A mark if there are `reasons`; a note below gives them."""
    return " †" if reasons else ""


def how(row: dict | None) -> str:
    if not row:
        return "-"
    precision = row["precision"].replace("default", "PyTorch's default precision")
    return text(f"{row['mode']} in {precision}")


def names(models) -> str:
    return ", ".join(f"`{model}`" for model in models)


# --- A study in sentences -------------------------------------------------------------------------


def answer(f: Findings) -> str:
    """The first sentence: does it help?"""
    if f.reference not in f.models:
        return f"No verdict: there is no finished run of `{f.reference}` to compare with."
    if len(f.models) == 1:
        return f"No verdict: only `{f.reference}` has a result that can be compared."
    if not f.against:
        return f"No verdict: no model has two seeds in common with `{f.reference}`."
    means = {"equivalent": f"equivalent (within {f.margin:g} points)"}
    parts = [
        f"{means.get(verdict, verdict)}: {names_of(f, verdict)}"
        for verdict in VERDICTS
        if f.with_verdict(verdict)
    ]
    if interim := f.with_verdict(None):
        parts.append(f"no verdict yet: {names(interim)}")
    smoke_test = "In this smoke test, compared" if f.study.result["quick"] else "Compared"
    found = f"{smoke_test} with `{f.reference}` over {pairs_of(f)}, {'; '.join(parts)}."
    if f.spread and f.with_verdict("undecided"):
        smallest = f"{f.spread.detectable:.2g} points"
        found += f" These seeds reliably detect only differences above {smallest} (80% power)."
    return found


def names_of(f: Findings, verdict: str) -> str:
    found = {model: f.against[model] for model in f.with_verdict(verdict)}
    return ", ".join(f"`{m}` ({c.difference:+.2f}){flag(c.unlike)}" for m, c in found.items())


def mean_and_sd(f: Findings, model: str) -> tuple[float, float | None]:
    """Over the compared seeds, so that differences add up, or else all. sd: None for one run."""
    found = f.study.accuracies(model)
    own = [found[seed] for seed in f.compared_runs.get(model) or found]
    return mean(own), stdev(own) if len(own) > 1 else None


def pairs_of(f: Findings) -> str:
    counts = sorted({len(c.seeds) for c in f.against.values()})
    span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return "only " * (counts[0] < FEW) + f"{span} seeds"


def progress(c: Comparison) -> str:
    """The verdict, or how many of the planned seeds have finished."""
    return c.verdict or f"interim, {len(c.seeds)} of {len(c.planned)}"


def verdict(c: Comparison) -> str:
    return progress(c) + flag(c.unlike)


def sentence(f: Findings, model: str) -> str:
    """One model against the reference."""
    c, cost = f.against[model], f.relative[model]
    says = {
        "better": f"`{model}` is better than `{f.reference}`",
        "worse": f"`{model}` is worse than `{f.reference}`",
        "equivalent": f"`{model}` is equivalent to `{f.reference}` within {f.margin:g} points",
        "undecided": f"`{model}` is undecided",
        None: f"`{model}` has no verdict yet ({progress(c)})",
    }[c.verdict]
    few = "only " * (len(c.seeds) < FEW)
    words = [
        f"{says}{f.study.mark}: {c.difference:+.2f} points ({interval(c.corrected)}), "
        f"over {few}{len(c.seeds)} seeds ({c.accuracy:.2f}% against "
        f"{c.reference:.2f}%; p {p_value(c.p_holm)} after correction)"
    ]
    published = [f.published.get(m, {}).get("test_acc") for m in (model, f.reference)]
    if all(published):
        words.append(f"published, from one run each: {published[0] - published[1]:+.2f}")
    if cost.inference_spread and not cost.inference_spread[0] <= 1 <= cost.inference_spread[1]:
        words.append(f"inference takes {inference(f, model)} the baseline's time")
    found = "; ".join(words)
    also = f" **Some pairs differ in more than the model: {text('; '.join(c.unlike))}.**"
    return f"{found}.{also if c.unlike else ''}"


def inference(f: Findings, model: str) -> str:
    """Relative to the baseline: eager, and fastest mode."""
    ratios = f.relative[model].ratios
    if not ratios["inference"]:
        return "-"
    found = f"{ratios['inference']:.2f}x{flag(f.stale.get(model))}"
    if ratios["fastest"]:
        found += f", {f.fastest[model]['mode']} {ratios['fastest']:.2f}x"
    return found


def control_sentence(f: Findings, model: str) -> str:
    """A module against its control: do gates that depend on the input help?"""
    c = f.controlled[model]
    says = {
        "better": "input-dependent gates help",
        "worse": "input-dependent gates hurt",
        "equivalent": f"input-dependent gates change less than {f.margin:g} points",
        "undecided": "undecided whether input-dependent gates matter",
        None: "no verdict yet",
    }[c.verdict]
    return (
        f"`{model}` against its control `{f.controls[model]}` (same parameters and operations, "
        f"gates that ignore the input){f.study.mark}: {c.difference:+.2f} points, "
        f"{interval(c.corrected)}, over {len(c.seeds)} seeds: {says}{flag(c.unlike)}."
    )


def spread_sentences(f: Findings) -> list[str]:
    """Sources of the spread, and the number of seeds needed."""
    s = f.spread
    by_images = f"; the {f.study.result['test_images']:,} test images alone would give"
    alone = f"{by_images} {s.from_images:.2f}" if s.from_images else ""
    pair = f"{by_images} {s.difference_from_images:.2f}" if s.from_images else ""
    needed = "; ".join(
        f"{points:g} points: {middle:,} ({low:,} to {high:,})"
        for points, (middle, low, high) in s.seeds_needed.items()
    )
    return [
        f"Accuracy has a standard deviation of {s.over_seeds:.2f} points over seeds{alone}.",
        f"That of a paired difference is {s.of_difference:.2f}, 95% interval "
        f"{interval(s.interval, '.2f')}{pair}.",
        f"Minimum detectable difference (80% power, first of {len(f.family)} comparisons): "
        f"{s.detectable:.2f} points. Seeds needed to detect {needed}.",
    ]


def stopping_sentence(f: Findings) -> str:
    """If runs stop at different epochs: does that explain differences?"""
    epochs = {model: summary["epochs_run"] for model, summary in f.models.items()}
    every = [n for of_model in epochs.values() for n in of_model]
    means = ", ".join(f"`{model}` {mean(of_model):.0f}" for model, of_model in epochs.items())
    found = (
        f"Runs trained for {min(every)} to {max(every)} epochs (mean: {means}). Over all "
        f"{len(every)} runs, epochs and test accuracy correlate with r = {f.stopping:+.2f}"
    )
    matters = abs(f.stopping) > 2 / len(every) ** 0.5  # about the 5% level
    return found + (": differences may come from when training stopped." if matters else ".")


def balance_sentence(f: Findings) -> str:
    share, balanced = f.balance
    means = ", ".join(f"`{model}` {value:.2f}%" for model, value in balanced.items())
    return f"The largest class has {share:.1f}% of the test images. Balanced accuracy: {means}."


def plan_sentence(f: Findings) -> str:
    tested = f"Paired t test over seeds, Holm's correction over {names(f.family)}, level "
    tested += f"{100 * f.level:.2g}%"
    if not f.study.plans:
        chosen = "if the number of seeds was chosen after seeing results, the level does not hold"
        return f"{tested}. No plan was recorded: {chosen}."
    dates = ", ".join(dict.fromkeys(plan["date"] for plan in f.study.plans))
    n, seeds = f.study.looks(f.reference), max(map(len, f.study.planned.values()))
    all_looks = sum(5 / look for look in range(1, n + 1))
    added = f" (5% / {n}, because seeds were added: over all looks at most {all_looks:.2g}%)"
    return f"{tested}{added * (n > 1)}. Planned on {dates}: {seeds} seeds."


def front_sentence(f: Findings) -> str:
    found = f"Pareto front (accuracy against inference time): {names(f.front)}."
    if not f.dominated:
        return f"{found} No model is shown to be both faster than another and better or equivalent."
    why = "; ".join(f"`{m}` ({names(others)})" for m, others in f.dominated.items())
    return f"{found} Not on it (in brackets: what is faster, and better or equivalent): {why}."


def notes(f: Findings) -> list[str]:
    """What the marks † stand for."""
    found = [f"{model}: {line}" for model, c in f.against.items() for line in c.unlike]
    for model, c in f.controlled.items():
        found += [f"{model} against {f.controls[model]}: {line}" for line in c.unlike]
    for model, scripts in f.stale.items():
        edited = ", ".join(scripts[:3]) + f" and {len(scripts) - 3} more" * (len(scripts) > 3)
        found.append(f"{model}: cost and accuracy were measured with different code ({edited})")
    return [one_line(line) for line in dict.fromkeys(found)]


def environments(runs: list[FinishedRun]) -> list[str]:
    """The runs' hardware and software, with counts; what changed in mid-run."""
    counted = Counter(map(environment, runs)).items()
    lines = [f"{n} run{'s' * (n > 1)}: {words}" for words, n in counted]
    if dates := sorted({str(run.env["date"]) for run in runs if "date" in run.env}):
        lines.append(f"trained on {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}")
    for run in runs:
        if run.result["fallback"]:
            lines.append(f"{run.folder}: {run.result['fallback']}")
        changes = run.env.get("changes") or []
        lines += [f"{run.folder}: changed during the run: {change}" for change in changes]
    return lines


def environment(run: FinishedRun) -> str:
    env, image = run.env, run.env.get("image")
    revision = image.get("revision") if isinstance(image, dict) else None
    commit = str(env.get("git_commit") or revision or "unknown")[:12]
    torch, cuda, python = (env.get(key) or "unknown" for key in ("torch", "cuda", "python"))
    return (
        f"{device(run)}; torch {torch}, CUDA {cuda}, driver {env.get('driver') or 'none'}, Python "
        f"{python}; commit {commit}" + " with uncommitted changes" * bool(env.get("git_dirty"))
    )


def device(run: FinishedRun) -> str:
    return ", ".join(run.result[key] for key in ("device", "precision", "mode"))


def devices(study: Study) -> str:
    return "; ".join(sorted(set(map(device, study.all_runs))))
