"""Layout of the report: report.md, the same as one HTML page, results.tex and README blocks.

The sentences are in words.py, the tables in report_tables.py. A layout is a list of blocks:
paragraphs, tables, lists and pictures. Empty ones are left out.
"""

import base64
import html
import re
from pathlib import Path
from string import Template

from kit import report_tables, words
from kit.findings import Findings
from kit.runs import who

import markdown

SMOKE_TEST = "A smoke test shows that everything works. It says nothing about fully \
trained models."
PUBLISHED = "Published: one run per model, 50 epochs, 10,000 test images; inference on an NVIDIA \
RTX 4070. GFLOPs: 2 x the MACs that thop counts. ms/image: median at batch 64, eager, with \
PyTorch's own flags; times on different hardware are not comparable."
COSTS = "The baseline as measured, every other model relative to it. FLOPs (FlopCounterMode) leave \
out most of the cost of gates: memory traffic and kernel launches. Training times are given only \
if every run is known to have had its GPU to itself."
ABLATION = "Test accuracy of the same weights with every gate (per channel and position) replaced \
by its mean over these images. The 95% interval is over images, for one seed. If it contains 0, \
these weights are not shown to need input-dependent gates. This shows what trained weights rely \
on, not whether attention helped."
GATES = "Gates: output / input, averaged over the positions of each channel where the input is not \
0. Spread: standard deviation. Saturated: below 0.05 or above 0.95 (-: gates outside 0 to 1). \
Near-constant: a standard deviation below 0.01 across images."
MEASURED = (
    "A seed fixes the split, the order of the images and the backbone's initial weights, for all "
    "models alike.",
    "The test set is used only after training, and never to choose weights or settings of a run.",
)
LIMITS = "Seeds measure how much training varies on these images with this recipe. Other data \
sets or recipes may give other results."


def joined(blocks: list[str]) -> str:
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"


def bullets(lines) -> str:
    return "\n".join(f"- {line}" for line in lines)


def shown(figures: list[str], *wanted: str) -> list[str]:
    """One block per wanted figure that exists."""
    return [f"![{words.caption(name)}]({name})" for name in wanted if name in figures]


# --- report.md ------------------------------------------------------------------------------------


def report_md(
    found: list[Findings], sections: list[Findings], figures: list[str], explained: list[str],
    there: dict | None, missing: list[str],
) -> str:  # fmt: skip
    """found: one per study; sections: those that get a section, the first with figures.

    explained: links to explain.py's pictures. there: see report.compare_runs.
    """
    runs = [run for f in found for run in f.study.all_runs]
    blocks = ["# Does attention earn its keep in ResNet-18?"]
    for f in sections:
        first = f is sections[0]
        blocks += study_blocks(f, figures if first else [], explained if first else [])
    if others := [f for f in found if f not in sections]:
        blocks += ["## Other runs, without a verdict", bullets(map(without_verdict, others))]
    if there:
        blocks += compared_blocks(there, figures)
    if missing:
        blocks += ["## What is missing", bullets(map(words.text, missing))]
    measured = [*map(words.text, words.environments(runs)), *MEASURED]
    blocks += ["## How it was measured", bullets(measured)]
    blocks += ["### Limits", bullets([LIMITS, *limits_of(found)])]
    commands = filter(None, (run.config.get("command") for run in runs))
    blocks += ["### Commands", "\n".join(f"    {words.one_line(each)}" for each in commands)]
    return joined(blocks)


def study_blocks(f: Findings, figures: list[str], explained: list[str]) -> list[str]:
    """A study: the answer first, then the evidence."""
    n_images = f"{f.study.result['test_images']:,}"
    table_says = (
        "Test accuracy: mean ± sample standard deviation over seeds, in percent of "
        f"{n_images} images. Difference: in points, paired by seed, before rounding, with the "
        "interval after Holm's correction. Undecided does not mean equal."
    )
    table_says += f" {timed(f)}; relative to the baseline." if f.timed else ""
    lines = [words.sentence(f, model) for model in f.against]
    lines += [words.control_sentence(f, model) for model in f.controlled]
    if f.unjudged:
        few = f"no verdict, fewer than two seeds in common with `{f.reference}`"
        lines.append(f"{words.names(f.unjudged)}: {few}.")
    if f.balance:
        lines.append(words.balance_sentence(f))
    if f.stopping is not None:
        lines.append(words.stopping_sentence(f))
    blocks = [f"## {words.text(f.study.title)}", f"**{words.answer(f)}**"]
    blocks += [
        SMOKE_TEST * f.study.result["quick"],
        report_tables.main_table(f),
        table_says,
        bullets(lines + left_out(f)),
    ]
    blocks += shown(figures, "differences.png", "test_accuracy.png", "accuracy_vs_epochs.png")
    if f.published:
        blocks += ["### Published / ours", report_tables.published_table(f), PUBLISHED]
    if f.against:
        spread = words.spread_sentences(f) if f.spread else []
        verdicts = (
            "Better, worse: the corrected interval excludes 0. Equivalent: it contains 0 and lies "
            f"within {f.margin} points of it. Undecided: neither."
        )
        blocks += ["### How sure", "\n".join([words.plan_sentence(f), *spread]), verdicts]
    if "baseline" in f.relative:
        blocks += ["### What it costs", report_tables.cost_table(f), COSTS]
        blocks += [words.front_sentence(f)] if f.front else []
    costs = "accuracy_vs_latency.png", "inference_time.png", "accuracy_vs_params.png"
    blocks += shown(figures, *costs)
    if f.by_class:
        mean = f"Mean paired difference from `{f.reference}` per class, in points. Bold: "
        bold = "significant after Holm's correction over all comparisons by class."
        only = f" Of {len(f.by_class.classes)} classes those with a significant one are shown."
        bold += only * (len(f.by_class.classes) > report_tables.MANY)
        blocks += ["### Class by class", report_tables.class_table(f), mean + bold]
    blocks += shown(figures, "learning_curves.png")
    if f.explained:
        blocks += ["### What attention attends to", *shown(explained, *explained)]
        blocks += [report_tables.gate_table(f), ABLATION, report_tables.stage_table(f), GATES]
    return blocks


def timed(f: Findings) -> str:
    """How inference was timed: eager, and in the fastest mode."""
    device, ways = words.text(f.timed["device"]), [f.timed, *list(f.fastest.values())[:1]]
    how = " and ".join(map(words.how, ways))
    return f"Inference: batch {f.timed['batch_size']}, {device}, {how}"


def left_out(f: Findings, text=words.text) -> list[str]:
    """What the table leaves out, and what its marks † mean."""
    lines = [f"**Left out, {text(who(r))}:** {text(why)}." for why, r in f.study.left_out.items()]
    if f.unplanned:
        plan = "not planned (to plan them: ./run_all.sh with all SEEDS)"
        lines.append(f"**Not compared, {text(who(f.unplanned))}:** {plan}.")
    return [*lines, *map(text, f.lost), *(f"† {text(line)}" for line in words.notes(f))]


def without_verdict(f: Findings) -> str:
    models = [
        f"{words.text(model)} {words.fmt(s['test_acc_mean'])}% ({s['n']} seed{'s' * (s['n'] > 1)})"
        for model, s in f.models.items()
    ]
    return f"{words.text(f.study.title)}: {', '.join(models)}"


def compared_blocks(there: dict, figures: list[str]) -> list[str]:
    """The first study against other runs; there: see report.compare_runs."""
    both = there["here"].study, there["there"].study
    here, other = (f"{study.title}; {words.devices(study)}" for study in both)
    says = "Here against there, paired by seed; Holm's correction over this table."
    if there["different"]:
        other += f". Settings that differ: there {'; '.join(there['different'])} here"
    return [
        f"## Compared with {words.text(there['folder'])}",
        there["table"],
        f"{says} Here: {words.text(here)}. There: {words.text(other)}.",
        bullets(f"† {words.text(line)}" for line in there["notes"]),
        *shown(figures, "compared.png"),
    ]


def limits_of(found: list[Findings]) -> list[str]:
    """Limits of the models in the report."""
    models = {model for f in found for model in f.models}
    limits = []
    if models & {"se", "cbam_blocks"}:
        start = "At initialisation CBAM's gates scale a branch to a quarter, SE's gate to a half"
        limits.append(f"{start}: initialisation alone may make a difference.")
    if "cbam_classifier" in models:
        one = "cbam_classifier, as published, acts after global pooling, on a single position"
        limits.append(f"{one}: its mean is its maximum, and no position can be preferred.")
    return limits


# --- Terminal, README, HTML, LaTeX ----------------------------------------------------------------


def for_terminal(f: Findings) -> str:
    lines = bullets(left_out(f, words.one_line))
    return joined(
        [words.one_line(f.study.title), words.answer(f), report_tables.main_table(f), lines]
    )


def readme_block(f: Findings, folder: str) -> str:
    """A study in brief; its report is in `folder`."""
    says = "mean ± standard deviation over seeds, in percent; difference, before rounding, with "
    says += "corrected interval."
    return joined([
        f"**{words.answer(f)}**",
        report_tables.main_table(f, seeds=False),
        bullets(left_out(f)),
        "\n".join([
            f"{words.text(f.study.title)}: {says}",
            *([f"{timed(f)}."] if f.timed else []),
            f"Full report: [{folder}/report.md]({folder}/report.md).",
        ]),
    ])  # fmt: skip


def page_html(report: str, pictures: dict[str, bytes]) -> str:
    """report.md as one self-contained page. pictures: {link: PNG}, all it shows."""
    converter = markdown.Markdown(extensions=["tables", "fenced_code"])
    converter.preprocessors.deregister("html_block")  # raw HTML stays text
    converter.inlinePatterns.deregister("html")
    images = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    body = re.sub(
        r'(<img alt="[^"]*" src=")([^"]+)',
        lambda match: f"{match[1]}data:image/png;base64,{images[match[2]]}",
        converter.convert(report),
    )
    title = html.escape(report.partition("\n")[0].removeprefix("# "))
    page = Template(Path(__file__).with_name("page.html").read_text())
    return page.substitute(title=title, body=body)


def results_tex(f: Findings) -> str:
    """Every model of the study against the reference, with a legend."""
    rows, mark = [], r"\textsuperscript{*}"
    for model, s in f.models.items():
        c, ratios = f.against.get(model), f.relative[model].ratios
        cells = [words.tex(model + f.study.mark), *map(words.fmt, words.mean_and_sd(f, model))]
        if c:
            bounds = words.interval(c.corrected).replace("to", "$ to $")
            word = words.tex(words.progress(c)) + mark * bool(c.unlike)
            cells += [str(len(c.seeds)), f"${c.difference:+.2f}$", f"${bounds}$", word]
        else:
            cells += [str(s["n"]), "", "", ""]
        rows.append([*cells, words.fmt(ratios["params"], ".4f"), words.fmt(ratios["inference"])])
    legend = [
        r"Test accuracy in percent over $n$ seeds. $\Delta$: difference from",
        f"{words.tex(f.reference)} in points, paired by seed, with the interval after Holm's",
        "correction.",
        f"Equivalent: within {f.margin} points.",
    ]
    if f.spread:
        points = words.fmt(f.spread.detectable)
        legend.append(rf"Minimum detectable difference: {points} points (80\% power).")
    way = f" ({words.tex(words.how(f.timed))}, batch {f.timed['batch_size']})" if f.timed else ""
    legend.append(f"Size (parameters) and inference time{way}: times the baseline's.")
    marked = {model: c.unlike for model, c in f.against.items() if c.unlike}
    for model, why in marked.items():
        legend.append(f"{mark}{words.tex(model)}: {words.tex('; '.join(why))}.")
    return "\n".join([
        f"% {words.tex(f.study.title)}",
        r"% In a document: \usepackage{booktabs}, then \input{results}",
        r"{\footnotesize\setlength{\tabcolsep}{2.5pt}",
        r"\begin{tabular}{lrrrrllrr}",
        r"\toprule",
        r"model & mean & SD & $n$ & $\Delta$ & interval & verdict & size & time \\",
        r"\midrule",
        *(rf"{' & '.join(cells)} \\" for cells in rows),
        r"\bottomrule",
        r"\multicolumn{9}{p{0.95\linewidth}}{" + "\n".join(legend) + r"} \\",
        r"\end{tabular}}" + "\n",
    ])  # fmt: skip
