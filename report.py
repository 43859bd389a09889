"""From run folders to a report: is a model better than the baseline, and what does it cost?

    python report.py                                  # runs/ -> results/
    python report.py --runs DIR --out DIR             # either may hold benchmark.json
    python report.py --compare DIR                    # with another recipe, precision or GPU
    python report.py --formats png pdf svg            # figures for a paper; its table: results.tex
    python report.py --out results/mine --readme README.md    # rewrites the README's blocks
    python report.py --power --sd 0.15 --difference 0.2       # how many seeds does that take?

Reads files alone and needs no torch: copy the small files of a run folder to a laptop and it works
there, in a few seconds. Every model is compared with the baseline, seed by seed, and gets a verdict
(kit/verdicts.py). Writes report.md (from the template kit/report.md), the same as one page with its
figures inside (report.html), results.csv, results.tex, summary.json and six figures.

Runs are compared only within a study: one data set, one recipe, the same explicit settings. A study
that is shorter or narrower than its recipe is marked as a smoke test wherever its numbers appear.

--readme rewrites what stands between these lines of a file (OUT relative to that file):
    <!-- report.py: OUT --> and <!-- end of OUT -->              the results in brief
    <!-- explain.py: OUT --> and <!-- end of explain.py -->      the table of gates
"""

import base64
import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

from kit import words
from kit.command_line import UserError, exit_code, make_parser
from kit.figures import FIGURES, FORMATS, draw_figures
from kit.files import check_writable, locked, write_atomically
from kit.findings import Findings, compare, have_same_labels
from kit.results import PUBLISHED, Study, read_rows, read_studies
from kit.runs import different
from kit.verdicts import Comparison, seeds_in_words

import markdown

CSV_COLUMNS = (
    "dataset", "recipe", "quick", "model", "seed", "width", "test_acc", "test_acc_last", "val_acc",
    "best_epoch", "epochs_run", "stopped_early", "params", "train_seconds", "images_per_second",
    "precision", "mode", "device", "overrides", "test_images", "peak_memory_mb", "fallback",
)  # fmt: skip


def make_report(
    runs_dir: Path, out: Path, other: Path | None, readmes: list[Path], formats=("png",)
) -> Findings:
    """Writes all files of the report; returns what the first study shows. Raises UserError."""
    studies, problems = read_studies(runs_dir)
    if not studies:
        reasons = "; ".join(problems) or "run `python train.py --model baseline` first"
        where = f"{runs_dir}" + ", which is no folder" * (not runs_dir.is_dir())
        raise UserError(f"no finished run below {where}: {words.one_line(reasons)}")
    costs, damaged = read_rows(first_of(out, runs_dir, "benchmark.json"))
    problems += damaged
    found = [Findings(study, costs) for study in studies]
    first = found[0]
    unread = ("left out, its files", "left out, it cannot be read")
    first.damaged = [line for line in problems if any(words in line for words in unread)]
    figures = draw_figures(first, formats)
    pictures = {name: body for name, body in figures.items() if name in FIGURES}
    pictures |= explained_pictures(first.study, out)
    there = compare_runs(first, other, problems) if other else None
    if other and not there:
        print(f"note: {words.one_line(problems[-1])}", file=sys.stderr)
    machines = {}  # what inference was timed on, and with which images -> its rows
    for row in costs:
        images = f"{row['image']}, {row['classes']} classes"
        name = f"{row['device']}; torch {row['torch']}; images {images}"
        machines.setdefault(name, []).append(row)
    sections = [f for f in found if f is first or f.against]
    report = words.fill(
        "report.md", found=found, sections=sections, figures=list(pictures), other=there,
        problems=problems, costs=costs, machines=machines,
    )  # fmt: skip
    files = {
        **{out / name: body for name, body in figures.items()},
        out / "results.tex": words.fill("results.tex", f=first),
        out / "results.csv": results_csv(studies),
        out / "summary.json": summary_json(found, costs, there),
        out / "report.md": report,
        out / "report.html": as_page(report, pictures),
        **{readme: with_blocks(readme, out, first) for readme in map(Path.resolve, readmes)},
    }
    check_writable(out)
    with locked(out, "report.*", "results.*", "summary.json", *FIGURES):
        for name in FIGURES:  # those of an earlier report
            for path in {(out / name).with_suffix(f".{kind}") for kind in FORMATS} - files.keys():
                path.unlink(missing_ok=True)
        for path, body in files.items():  # names of folders, and so texts, may hold anything
            write_atomically(path, body.encode(errors="replace") if isinstance(body, str) else body)
    return first


def first_of(out: Path, runs_dir: Path, name: str) -> Path:
    """Where a file lies that either folder may hold."""
    return out / name if (out / name).exists() else runs_dir / name


def compare_runs(here: Findings, folder: Path, problems: list[str]) -> dict | None:
    """The first study compared with another set of runs; adds to the problems."""
    studies, others = read_studies(folder)
    problems += others
    studies = [study for study in studies if study.dataset == here.study.dataset]
    if not studies:
        problems.append(f"--compare {folder}: no finished run on {here.study.dataset} below it")
        return None
    # Its runs with the same recipe and settings, or else its first study.
    studies.sort(key=lambda study: study.title != here.study.title)
    for study in studies[1:]:
        problems.append(f"--compare {folder}: {study.title} there is not compared")
    there = Findings(studies[0], [])  # its inference times are for a report of its own
    settings, others = (study.all_runs[0].settings for study in (here.study, studies[0]))
    of_data = {key: settings.get(key) for key in ("data", "test_images", "image", "classes")}
    differences = different({key: others.get(key) for key in of_data}, of_data)
    if differences or not have_same_labels(here.study.all_runs + studies[0].all_runs):
        why = "; ".join(differences) or "other test labels"
        problems.append(f"--compare {folder}: not compared, {why}")
        return None
    models = [model for model in here.models if model in there.models]
    found = compare(here.study, {model: (model, model) for model in models}, there.study)
    return {
        "folder": folder, "found": there, "models": models, "against": found,
        "different": different(others, settings),
        "notes": list(dict.fromkeys(line for c in found.values() for line in c.unlike)),
    }  # fmt: skip


def explained_pictures(study: Study, out: Path) -> dict[str, bytes]:
    """{link from the report: PNG}: the models side by side, and each of those with gates."""
    runs = [run for run in study.all_runs if run.explained]
    paths = [out / "explain_compare.png"] if len(runs) > 1 else []
    shown = [run for run in runs if run.explained["gates"]] or runs[:1]
    paths += [run.folder / "explain.png" for run in shown]
    found = {}
    for path in paths:
        if path.is_file() and not path.is_symlink():  # a stranger's link may lead anywhere
            link = quote(Path(os.path.relpath(path, out)).as_posix())
            found[link] = path.read_bytes()
    return {link: body for link, body in found.items() if body.startswith(b"\x89PNG")}


def as_page(report: str, pictures: dict[str, bytes]) -> str:
    """report.md as one self-contained HTML page. pictures: {file name: PNG}, all that it shows."""
    converter = markdown.Markdown(extensions=["tables", "fenced_code"])
    converter.preprocessors.deregister("html_block")  # raw HTML stays text
    converter.inlinePatterns.deregister("html")
    title = report.partition("\n")[0].removeprefix("# ")
    images = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    body = re.sub(
        r'(<img alt="[^"]*" src=")([^"]+)',
        lambda match: f"{match[1]}data:image/png;base64,{images[match[2]]}",
        converter.convert(report),
    )
    return words.fill("page.html", title=title, body=body)


def with_blocks(readme: Path, out: Path, found: Findings) -> str:
    """The text of `readme` with the blocks of this report replaced."""
    folder = Path(os.path.relpath(out.resolve(), readme.parent)).as_posix()
    made = words.TEMPLATES.get_template("readme_block.md").module
    gates = f"<!-- explain.py: {folder} -->"
    blocks = {
        f"<!-- report.py: {folder} -->": (f"<!-- end of {folder} -->", made.results(found, folder)),
        gates: ("<!-- end of explain.py -->", made.gates(found)),
    }
    try:
        text = readme.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{readme} is no text: {error}") from error
    if not any(first in text for first in blocks):
        raise UserError(
            f"{readme} has no lines '<!-- report.py: {folder} -->' and '<!-- end of {folder} -->': "
            "the results go in between"
        )
    if gates in text and not found.explained:
        print(f"note: {readme}: its table of gates stays, {out} has none now", file=sys.stderr)
        del blocks[gates]
    for first, (last, block) in blocks.items():
        old = f"(?s)(?<={re.escape(first)}\n)(?:(?!<!--).)*(?={re.escape(last)})"  # no marker in it
        parts = re.split(old, text)
        if len(parts) != 1 + text.count(first) or len(parts) > 2:
            raise UserError(f"{readme} must have '{first}' once, and then '{last}'")
        text = (re.sub(r"\n{3,}", "\n\n", block.strip()) + "\n").join(parts)
    return text


def results_csv(studies: list[Study]) -> str:
    """One line a run."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for study in studies:
        overrides = " ".join(f"{k}={v}" for k, v in study.overrides.items())
        writer.writerows(run.result | {"overrides": overrides} for run in study.all_runs)
    return buffer.getvalue()


def summary_json(found: list[Findings], costs: list[dict], there: dict | None) -> str:
    """Every figure of the report, for programs to read."""

    def plain(found) -> dict:
        return vars(found) | ({"verdict": found.verdict} if isinstance(found, Comparison) else {})

    studies = [
        {key: getattr(f.study, key) for key in ("dataset", "recipe", "overrides")}
        | {
            "quick": f.study.result["quick"],
            "models": f.models,
            "against_baseline": {
                model: plain(c) | {"seeds_and_images": f.resampled[model]}
                for model, c in f.against.items()
            },
            "against_control": f.controlled,
            "by_class": f.by_class,
            "costs": f.relative,
            "costs_of_other_code": f.stale,
            "epochs_and_accuracy": f.stopping,
            "pareto_front": f.front,
            "not_shown_to_be_dominated": f.tied,
            "missing": f.missing,
            "left_out": {why: words.who(runs) for why, runs in f.study.left_out.items()},
            "explained": f.explained,
        }
        for f in found
    ]
    content = {"studies": studies, "benchmark": costs, "published": PUBLISHED}
    content["compared"] = there and {str(there["folder"]): there["against"]}
    return json.dumps(content, indent=2, default=plain) + "\n"


@exit_code
def main(argv: list[str] | None = None) -> None:
    """The script, with `argv` in place of the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: %(default)s")
    add("--out", type=Path, default=Path("results"), help="where to write; default: %(default)s")
    add("--compare", type=Path, help="folder of other runs to compare the first study with")
    add("--formats", nargs="+", choices=FORMATS, default=["png"], help="of the figures; PNG always")
    add("--readme", type=Path, nargs="+", default=[], help="files whose blocks are rewritten")
    add("--power", action="store_true", help="print how many seeds --difference takes, no report")
    add("--sd", type=float, help="standard deviation of test accuracy over seeds, in points")
    add("--difference", type=float, help="to be detected, in points")
    add("--comparisons", type=int, default=3, help="with the baseline; default: %(default)s")
    args = parser.parse_args(argv)
    if args.power != bool(args.sd or args.difference):
        parser.error("--power, --sd and --difference go together")
    if args.power:
        if not all(0 < (points or 0) <= 100 for points in (args.sd, args.difference)):
            parser.error("--power takes --sd and --difference, points greater than 0 up to 100")
        if not (1 <= args.comparisons <= 1000 and 1e-3 <= args.difference / args.sd <= 1e3):
            parser.error("--comparisons is 1 to 1,000, --difference 0.001 to 1,000 times --sd")
        print(seeds_in_words(args.difference, args.sd, args.comparisons))
        return
    if args.compare and not args.compare.is_dir():
        parser.error(f"--compare: there is no folder {args.compare}")
    found = make_report(args.runs, args.out, args.compare, args.readme, args.formats)
    print(words.short_table(found))
    print(f"written: {args.out / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
