"""From run folders to a report: is a model better than the baseline, and what does it cost?

    python report.py                                  # runs/ -> results/
    python report.py --runs DIR --out DIR             # either may hold benchmark.json, explain.json
    python report.py --compare DIR                    # another recipe, precision or GPU beside it
    python report.py --out results/mine --readme README.md    # and the README's block of it
    python report.py --power --sd 0.15 --difference 0.2       # how many seeds does that take?

Reads files alone and needs no torch: copy the small files of a run folder to a laptop and it works
there, in a few seconds. Every model is compared with the baseline, seed by seed, and gets a verdict
(verdicts.py). Writes report.md, the same as one page with its figures inside (report.html),
results.csv, summary.json and six figures.

Runs are compared only within a study: one data set, one recipe, the same explicit settings. A study
that is shorter or narrower than its recipe is marked as a quick run wherever its figures stand.

--readme FILE: writes the results in brief between these two lines of FILE, OUT as FILE sees it:
    <!-- report.py: OUT -->
    <!-- end of OUT -->
"""

import argparse
import csv
import io
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from kit import sections
from kit import verdicts
from kit.explained import explained_of, pictures_of, read_explained
from kit.figures import FIGURES, draw_figures
from kit.files import write_atomically
from kit.findings import Findings, accuracies, compared, find
from kit.page import as_page
from kit.results import PUBLISHED, RUN_COLUMNS, ReportError, Study, read_costs, read_studies

# --- What is written ------------------------------------------------------------------------------


def make_report(runs_dir: Path, out: Path, compare: Path | None, readme: Path | None) -> None:
    """Writes all files of the report. Raises ReportError or OSError in one line."""
    studies, problems = read_studies(runs_dir)
    if not studies:
        reasons = "; ".join(problems) or "run `python train.py --model baseline` first"
        raise ReportError(f"no finished run below {runs_dir}: {reasons}")
    costs, damaged = read_costs([out / "benchmark.json", runs_dir / "benchmark.json"])
    seen, of_seen = read_explained([out / "explain.json", runs_dir / "explain.json"])
    problems += damaged + of_seen
    found, strangers = [], len(seen)
    for study in studies:
        rows, others = explained_of(study, seen)
        found.append(find(study, costs, rows))
        problems += others
        strangers -= len(rows) + len(others)
    if strangers:
        problems.append(f"explain.json: {strangers} of its {len(seen)} entries are of no run here")
    beside = compare_runs(found[0], compare, problems) if compare else []
    texts = {"results.csv": results_csv(studies), "summary.json": summary_json(found, costs)}
    figures = draw_figures(found[0])
    pictures = pictures_of(found[0].explained, out)
    shown = [name for name in FIGURES if name in figures] + list(pictures)
    texts["report.md"] = sections.write_report(found, costs, problems, shown, beside)
    texts["report.html"] = as_page(texts["report.md"], figures | pictures)
    if readme:
        readme = readme.resolve()
        new_readme = with_block(readme, out, found[0])

    for name in FIGURES:
        if name in figures:
            write_atomically(out / name, figures[name])
        else:
            (out / name).unlink(missing_ok=True)  # one of an earlier report
    for name, text in texts.items():
        write_atomically(out / name, text.encode(errors="replace"))  # names of folders may be odd
    if readme:
        write_atomically(readme, new_readme)


def compare_runs(here: Findings, folder: Path, problems: list[str]) -> list[str]:
    """The section on another set of runs beside the first study; adds to the problems."""
    studies, others = read_studies(folder)
    problems += others
    studies = [study for study in studies if study.dataset == here.study.dataset]
    if not studies:
        problems.append(f"--compare {folder}: no finished run on {here.study.dataset} below it")
        return []
    # Its runs with the same recipe and settings, or else its first study.
    studies.sort(key=lambda study: study.title != here.study.title)
    for study in studies[1:]:
        problems.append(f"--compare {folder}: {study.title} there is not compared")
    there = find(studies[0], [])  # its inference times are for a report of its own
    models = here.models.keys() & there.models.keys()
    pairs = {m: (accuracies(here.study, m), accuracies(there.study, m)) for m in sorted(models)}
    comparisons = compared(pairs, here.study.n_images)
    return sections.beside_section(here, there, str(folder), comparisons)


def with_block(readme: Path, out: Path, found: Findings) -> str:
    """The text of `readme` with the block of this report replaced."""
    folder = Path(os.path.relpath(out.resolve(), readme.parent)).as_posix()
    first, last = f"<!-- report.py: {folder} -->", f"<!-- end of {folder} -->"
    try:
        text = readme.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ReportError(f"{readme} is no text: {error}") from error
    if not (text.count(first) == text.count(last) == 1 and text.index(first) < text.index(last)):
        raise ReportError(
            f"{readme} must have the lines '{first}' and '{last}', once each and in this order: "
            "the results go in between"
        )
    before, after = text.partition(first)[0], text.partition(last)[2]
    block = "\n".join(sections.readme_block(found, folder))
    return f"{before}{first}\n{block}\n{last}{after}"


def results_csv(studies: list[Study]) -> str:
    """One line a run."""
    buffer = io.StringIO()
    columns = [*RUN_COLUMNS, "overrides", "test_images", "peak_memory_mb", "fallback"]
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for study in studies:
        for runs in study.runs.values():
            for run in runs:
                overrides = " ".join(f"{k}={v}" for k, v in study.overrides.items())
                writer.writerow(run.result | {"overrides": overrides})
    return buffer.getvalue()


def summary_json(found: list[Findings], costs: list[dict]) -> str:
    """Every figure of the report, for programs to read."""

    def plain(comparison):
        return asdict(comparison) | {"verdict": comparison.verdict}

    studies = [
        {
            "dataset": f.study.dataset,
            "recipe": f.study.recipe,
            "overrides": f.study.overrides,
            "quick": f.study.quick,
            "models": f.models,
            "against_baseline": {
                model: plain(c) | {"seeds_and_images": f.resampled[model]}
                for model, c in f.against.items()
            },
            "against_control": {model: plain(c) for model, c in f.controlled.items()},
            "by_class": f.by_class and {
                "classes": f.by_class.classes,
                "baseline": f.by_class.baseline,
                "against_baseline": {
                    model: [plain(c) for c in row] for model, row in f.by_class.against.items()
                },
            },
            "costs": {model: asdict(cost) for model, cost in f.relative.items()},
            "pareto_front": f.front,
            "missing": f.missing,
            "explained": f.explained,
        }
        for f in found
    ]  # fmt: skip
    content = {"studies": studies, "benchmark": costs, "published": PUBLISHED}
    return json.dumps(content, indent=2) + "\n"


# --- Command line ---------------------------------------------------------------------------------


def print_power(sd: float, difference: float, comparisons: int) -> None:
    """Prints the seeds that `difference` takes; it and `sd` in points of test accuracy."""
    sd_of_differences = sd * 2**0.5  # if the accuracies of a pair do not correlate
    alone, corrected = (
        verdicts.seeds_needed(difference, sd_of_differences, verdicts.LEVEL / k)
        for k in (1, comparisons)
    )
    print(
        f"A difference of {difference:g} points is found 8 times in 10, at a level of 5 % and a "
        f"standard deviation of {sd:g} over seeds, with\n"
        f"{alone:6,} seeds a model in a single comparison with the baseline\n"
        f"{corrected:6,} seeds a model in the first of {comparisons} comparisons (Holm)\n"
        "(paired t test; fewer where seeds help or hurt all models alike)"
    )


def main(argv: list[str] | None = None) -> int:
    """The script, with `argv` in place of the command line; the exit code."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: %(default)s")
    add("--out", type=Path, default=Path("results"), help="where to write; default: %(default)s")
    add("--compare", type=Path, help="folder of other runs, to be set beside the first")
    add("--readme", type=Path, help="file with a block to be written anew")
    add("--power", action="store_true", help="print the seeds that --difference takes, no report")
    add("--sd", type=float, help="of one model's test accuracy over seeds, in points")
    add("--difference", type=float, help="to be found, in points")
    add("--comparisons", type=int, default=3, help="with the baseline; default: %(default)s")
    args = parser.parse_args(argv)
    if args.power:
        if not (args.sd and args.difference and args.sd > 0 and args.difference > 0):
            parser.error("--power takes --sd and --difference, both greater than 0")
        if not (args.comparisons >= 1 and 1e-3 <= args.difference / args.sd <= 1e3):
            parser.error("--comparisons is at least 1, --difference from 0.001 to 1,000 times --sd")
        print_power(args.sd, args.difference, args.comparisons)
        return 0
    if args.compare and not args.compare.is_dir():
        parser.error(f"--compare: there is no folder {args.compare}")
    try:
        make_report(args.runs, args.out, args.compare, args.readme)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    sys.exit(main())
