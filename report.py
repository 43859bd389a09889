"""From run folders to a report: is a model better than the baseline, and what does it cost?

    python report.py                                  # runs/ -> results/
    python report.py --runs DIR --out DIR             # either may hold benchmark.json
    python report.py --recipe short --reference se    # one study; another reference model
    python report.py --compare DIR                    # with another recipe, precision or GPU
    python report.py --formats png pdf svg            # figures for a paper; its table: results.tex
    python report.py --out results/mine --readme README.md     # updates the README's blocks
    python report.py --power --difference 0.2         # seeds needed, given the spread in runs/

Reads only files and needs no torch: copy the small files of each run folder to a laptop, and it
takes a few seconds there. Every model is compared with the baseline seed by seed and gets a verdict
(kit/verdicts.py). Writes report.md, report.html (the same on one page, figures included),
results.csv, results.tex, summary.json and figures.

A study is one data set, one recipe and the same explicit settings. Only its runs are compared. The
first study has verdicts and most runs. A study shorter than its recipe is marked as a smoke test.

--readme replaces the text between these lines of a file (OUT relative to that file):
    <!-- report.py: OUT --> and <!-- end of OUT -->              the results in brief
    <!-- explain.py: OUT --> and <!-- end of explain.py -->      the gate table
"""

import argparse
import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

from kit import pages
from kit.command_line import UserError, exit_code, make_parser
from kit.figures import FIGURES, FORMATS, draw_figures
from kit.files import check_writable, locked, write_atomically
from kit.findings import Findings
from kit.report_tables import compared_table, gate_table
from kit.results import PUBLISHED, Problem, Study, read_rows, read_studies
from kit.runs import different, seeds_of, who
from kit.verdicts import LEVEL, MARGIN, Comparison, seeds_in_words
from kit.words import one_line

CSV_COLUMNS = (
    "dataset", "recipe", "quick", "model", "seed", "width", "test_acc", "test_acc_last", "val_acc",
    "best_epoch", "epochs_run", "stopped_early", "params", "train_seconds", "images_per_second",
    "precision", "mode", "device", "overrides", "test_images", "peak_memory_mb", "fallback",
)  # fmt: skip


def make_report(args: argparse.Namespace) -> list[Findings]:
    """Writes every file of the report; returns the findings of its sections. Raises UserError."""
    out, chosen = args.out, dict(dataset=args.dataset, recipe=args.recipe, model=args.models)
    studies, problems = read_studies(args.runs, args.reference, **chosen)
    if not studies:
        reasons = "; ".join(problem.words for problem in problems)
        where = f"{args.runs}" + " (not a folder)" * (not args.runs.is_dir())
        if any(chosen.values()):
            reasons = reasons or "none with the chosen --dataset, --recipe and --models"
        reasons = reasons or "run `python train.py --model baseline` first"
        raise UserError(f"no finished run below {where}: {one_line(reasons)}")
    name = "benchmark.json"  # either folder may hold it
    known = {model for study in studies for model in study.runs}
    unknown = [model for model in args.models or () if model not in known]
    problems += [Problem(f"--models {name}: no finished run", is_lost=True) for name in unknown]
    costs, damaged = read_rows((out if (out / name).exists() else args.runs) / name)
    problems += damaged
    found = [Findings(study, costs, args.reference, args.margin) for study in studies]
    sections = [f for f in found if f is found[0] or f.against]
    there = compare_runs(found[0], args.compare, problems) if args.compare else None
    found[0].lost = [problem.words for problem in problems if problem.is_lost]
    figures = draw_figures(found[0], there, args.formats)
    explained = explained_pictures(found[0].study, out)
    pictures = {name: body for name, body in figures.items() if name in FIGURES} | explained
    missing = [problem.words for problem in problems] + missing_of(sections, out)
    report = pages.report_md(found, sections, list(figures), list(explained), there, missing)
    files = {
        **{out / name: body for name, body in figures.items()},
        out / "results.tex": pages.results_tex(found[0]),
        out / "results.csv": results_csv(studies),
        out / "summary.json": summary_json(found, costs, there),
        out / "report.md": report,
        out / "report.html": pages.page_html(report, pictures),
    }
    readmes = [path.resolve() for path in args.readme]
    for path in readmes:
        with_blocks(path, out, found[0])  # raises before anything is written
    check_writable(out)
    with locked(out, "report.*", "results.*", "summary.json", *FIGURES):
        for name in FIGURES:  # from an earlier report
            for path in {(out / name).with_suffix(f".{kind}") for kind in FORMATS} - files.keys():
                path.unlink(missing_ok=True)
        for path, body in files.items():  # folder names, and so texts, may not be valid UTF-8
            write_atomically(path, body.encode(errors="replace") if isinstance(body, str) else body)
    for path in readmes:
        with locked(path.parent):  # someone may have edited it meanwhile
            write_atomically(path, with_blocks(path, out, found[0]))
    return sections


def missing_of(sections: list[Findings], out: Path) -> list[str]:
    """Planned but unfinished runs, and studies without measured costs."""
    found = []
    for f in sections:
        for model, seeds in f.missing.items():
            found.append(f"{f.study.title}: planned, not finished: {model} {seeds_of(seeds)}")
        if not f.costs:
            shape = "x".join(map(str, f.study.result["image"]))
            size = f"--width {f.study.result['width']} --image {shape}"
            classes = f"--classes {len(f.study.result['classes'])}"
            command = f"python benchmark.py {size} {classes} --out {out}"
            found.append(f"{f.study.title}: no FLOPs and no inference time: run {command}")
    return found


def compare_runs(here: Findings, folder: Path, problems: list[Problem]) -> dict | None:
    """Compares the first study with runs in `folder`; appends to `problems`."""
    studies, others = read_studies(folder, here.reference, dataset=[here.study.dataset])
    problems += others
    if not studies:
        nothing = f"--compare {folder}: no finished run on {here.study.dataset} below it"
        problems.append(Problem(nothing, is_lost=True))
        return None
    # Prefer the same recipe and settings; otherwise take the first study.
    studies.sort(key=lambda study: study.title != here.study.title)
    for study in studies[1:]:
        problems.append(Problem(f"--compare {folder}: {study.title} there is not compared"))
    there = Findings(studies[0], [], here.reference)
    settings, others = (study.all_runs[0].settings for study in (here.study, studies[0]))
    of_data = settings.keys() & others & {"data", "test_images", "image", "classes", "labels"}
    if differences := different(*({k: s[k] for k in of_data} for s in (others, settings))):
        why = "; ".join(differences)
        problems.append(Problem(f"--compare {folder}: not compared, {why}", is_lost=True))
        return None
    models = [model for model in here.models if model in there.models]
    against = here.compare({model: (model, model) for model in models}, there.study)
    return {
        "folder": folder, "here": here, "there": there, "against": against,
        "table": compared_table(here, there, against), "different": different(others, settings),
        "notes": list(dict.fromkeys(f"{m}: {x}" for m, c in against.items() for x in c.unlike)),
    }  # fmt: skip


def explained_pictures(study: Study, out: Path) -> dict[str, bytes]:
    """{link from the report: PNG}: models side by side, then each model with gates."""
    runs = [run for run in study.all_runs if run.explained]
    paths = [out / "explain_compare.png"] if len(runs) > 1 else []
    shown = [run for run in runs if run.explained["gates"]] or runs[:1]
    paths += [run.folder / "explain.png" for run in shown]
    found = {}
    for path in paths:
        is_own = path.is_file() and not path.is_symlink()  # an untrusted link may point anywhere
        if is_own and (body := path.read_bytes()).startswith(b"\x89PNG"):
            found[quote(Path(os.path.relpath(path, out)).as_posix())] = body
    return found


def with_blocks(readme: Path, out: Path, found: Findings) -> str:
    """`readme` with the report's blocks replaced. Raises UserError."""
    folder = Path(os.path.relpath(out.resolve(), readme.parent)).as_posix()
    gates, brief = f"<!-- explain.py: {folder} -->", pages.readme_block(found, folder)
    blocks = {
        f"<!-- report.py: {folder} -->": (f"<!-- end of {folder} -->", brief),
        gates: ("<!-- end of explain.py -->", gate_table(found)),
    }
    try:
        text = readme.read_bytes().decode()
        windows = "\r\n" in text
        text = text.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{readme} is not UTF-8 text: {error}") from error
    if not any(first in text for first in blocks):
        raise UserError(
            f"{readme} lacks the lines '<!-- report.py: {folder} -->' and '<!-- end of {folder} "
            "-->' that mark where the results go"
        )
    if gates in text and not found.explained:
        print(f"note: {readme}: its table of gates stays: {out} has none now", file=sys.stderr)
        del blocks[gates]
    for first, (last, block) in blocks.items():
        old = f"(?s)(?<={re.escape(first)}\n)(?:(?!<!--).)*(?={re.escape(last)})"  # no marker in it
        parts = re.split(old, text)
        if len(parts) != 1 + text.count(first) or len(parts) > 2:
            raise UserError(f"{readme} must contain '{first}' exactly once, followed by '{last}'")
        text = block.join(parts)
    return text.replace("\n", "\r\n") if windows else text


def results_csv(studies: list[Study]) -> str:
    """A row per run."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for study in studies:
        overrides = " ".join(f"{k}={v}" for k, v in study.overrides.items())
        writer.writerows(run.result | {"overrides": overrides} for run in study.all_runs)
    return buffer.getvalue()


def summary_json(found: list[Findings], costs: list[dict], there: dict | None) -> str:
    """Every number in the report, machine-readable."""

    def plain(found) -> dict | list:
        if isinstance(found, set):
            return sorted(found)
        return vars(found) | ({"verdict": found.verdict} if isinstance(found, Comparison) else {})

    of_study = "dataset", "recipe", "overrides", "plans"
    own = "reference", "margin", "level", "models", "spread", "by_class", "missing", "explained"
    studies = [
        {key: getattr(f.study, key) for key in of_study}
        | {key: getattr(f, key) for key in own}
        | {
            "quick": f.study.result["quick"],
            "against_reference": f.against,
            "against_control": f.controlled,
            "costs": f.relative,
            "costs_of_other_code": f.stale,
            "epochs_and_accuracy": f.stopping,
            "pareto_front": f.front,
            "left_out": {why: who(runs) for why, runs in f.study.left_out.items()},
        }
        for f in found
    ]
    content = {"studies": studies, "benchmark": costs, "published": PUBLISHED}
    content["compared"] = there and {str(there["folder"]): there["against"]}
    return json.dumps(content, indent=2, default=plain) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings. Exits with 2 on wrong usage."""
    parser = make_parser(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    add("--runs", type=Path, default=Path("runs"), help=f"folder of all runs; {default}")
    add("--out", type=Path, default=Path("results"), help=f"where to write; {default}")
    add("--dataset", nargs="+", help="only runs on these data sets")
    add("--recipe", nargs="+", help="only runs with these recipes")
    add("--models", nargs="+", help="only these and the reference; decide before you see results")
    add("--reference", default="baseline", help=f"model that others are compared with; {default}")
    add("--margin", type=float, default=MARGIN, metavar="X",
        help=f"points of test accuracy within which models are equivalent; {default}")  # fmt: skip
    add("--compare", type=Path, help="folder of other runs to compare the first study with")
    add("--formats", nargs="+", choices=FORMATS, default=["png"], help="formats besides PNG")
    add("--readme", type=Path, nargs="+", default=[], help="files whose blocks to update")
    add("--power", action="store_true", help="only print the seeds that --difference takes")
    add("--sd", type=float, help="over seeds, in points; default: estimated from --runs")
    add("--difference", type=float, help="to detect, in points")
    add("--comparisons", type=int, help="how many; default: those of --runs; with --sd 4")
    args = parser.parse_args(argv)
    if args.power != bool(args.difference) or (args.sd is not None and not args.power):
        parser.error("--power and --difference go together; --sd only with them")
    points = [args.difference or 1, 1 if args.sd is None else args.sd]
    sensible = min(points) > 0 and max(points) <= 100 and 1e-3 <= points[0] / points[1] <= 1e3
    if not (sensible and (args.comparisons is None or 1 <= args.comparisons <= 1000)):
        parser.error("--difference and --sd are in points, above 0 and up to 100, the first 0.001 "
                     "to 1,000 times the second; --comparisons is 1 to 1,000")  # fmt: skip
    if not 0 < args.margin <= 100:
        parser.error("--margin is in points, greater than 0 up to 100")
    if args.compare and not args.compare.is_dir():
        parser.error(f"--compare: there is no folder {args.compare}")
    if args.models:
        args.models = [args.reference, *args.models]
    return args


def print_seeds(args: argparse.Namespace) -> None:
    """Prints seeds needed for --difference, given --sd or the spread in --runs."""
    sd = args.sd and args.sd * 2**0.5  # of differences, if paired accuracies are uncorrelated
    comparisons, level = args.comparisons or 4, LEVEL
    if not sd:
        chosen = dict(dataset=args.dataset, recipe=args.recipe, model=args.models)
        studies, _ = read_studies(args.runs, args.reference, **chosen)
        found = Findings(studies[0], [], args.reference) if studies else None
        if not (found and found.spread):
            raise UserError(f"{args.runs} has fewer than three pairs of runs: give --sd")
        print(f"{one_line(found.study.title)}:")
        sd, level = found.spread.of_difference, found.level
        comparisons = args.comparisons or len(found.family)
    print(seeds_in_words(args.difference, sd, comparisons, level))


@exit_code
def main(argv: list[str] | None = None) -> None:
    """Runs the script with `argv` as its command line."""
    args = parse(argv)
    if args.power:
        return print_seeds(args)
    for found in make_report(args):
        print(pages.for_terminal(found))
    print(f"written: {args.out / 'report.md'}, and report.html beside it")


if __name__ == "__main__":
    sys.exit(main())
