"""What report.py compares: finished runs, grouped into studies, and rows of benchmark.json.

Needs no torch. Run folders may be anywhere below --runs: result.json says what they are. Damaged
or incompatible runs are left out, with a line that says why.
"""

import itertools
import json
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kit.command_line import UserError, in_one_line
from kit.files import check, read_json, read_small
from kit.plans import read_plans
from kit.runs import CONFIG, COST, EXPLAINED, FinishedRun, different, read_run

import numpy as np

# The published report: one run per model, 50 epochs, Fashion-MNIST; time on an RTX 4070, batch 64.
PUBLISHED = {
    "baseline": dict(test_acc=93.27, params_m=11.17, flops_g=0.92, ms_per_image=0.06),
    "se": dict(test_acc=92.70, params_m=11.26, flops_g=0.92, ms_per_image=0.07),
    "cbam_blocks": dict(test_acc=92.59, params_m=11.26, flops_g=0.92, ms_per_image=0.09),
    "cbam_classifier": dict(test_acc=93.18, params_m=11.21, flops_g=0.92, ms_per_image=0.07),
}


class Problem(NamedTuple):
    words: str
    is_lost: bool = False  # a run that a verdict may depend on is unreadable


@dataclass
class Study:
    """Comparable runs: one data set, one recipe, the same explicit settings."""

    dataset: str
    recipe: str
    overrides: dict
    runs: dict[str, list[FinishedRun]]  # model -> its runs, sorted by seed
    left_out: dict[str, list[FinishedRun]]  # reason -> invalid or incomparable runs
    plans: list[dict]  # this study's entries of RUNS/plan.json

    @property
    def planned(self) -> dict[str, set[int]]:
        """model -> planned seeds."""
        return seeds_by_model(self.plans)

    def looks(self, reference: str) -> int:
        """Possible looks at results: the most sets of two or more seeds that were ever planned for
        one comparison."""
        history = [seeds_by_model(self.plans[:n]) for n in range(1, len(self.plans) + 1)]
        sets = (
            {frozenset(planned_for_both(p.get(a), p.get(b))) for p in history
             if p.keys() >= self.planned.keys() & {a, b}}
            for a, b in itertools.combinations({*self.planned, reference}, 2)
        )  # fmt: skip
        return max([1, *(sum(len(seeds) > 1 for seeds in own) for own in sets)])

    @property
    def mark(self) -> str:
        """Suffix of every model's name: smoke test, or another width."""
        width = f"width {self.overrides['width']}" if "width" in self.overrides else ""
        marks = ", ".join(filter(None, ["smoke test" * self.result["quick"], width]))
        return f" ({marks})" if marks else ""

    @property
    def all_runs(self) -> list[FinishedRun]:
        return [run for runs in self.runs.values() for run in runs]

    @property
    def published(self) -> dict[str, dict]:
        """Published rows for this data set and recipe; for other models, the baseline's."""
        if self.dataset != "fashion_mnist" or self.recipe not in ("published", "quick"):
            return {}
        of_others = len(self.runs) > 1 and self.runs.keys() & PUBLISHED.keys() == {"baseline"}
        return {"baseline": PUBLISHED["baseline"]} if of_others else PUBLISHED

    @property
    def title(self) -> str:
        changed = "".join(f", {key.replace('_', ' ')} {v}" for key, v in self.overrides.items())
        smoke_test = " (smoke test)" * self.result["quick"]
        return f"{self.dataset}, recipe {self.recipe}{changed}{smoke_test}"

    def has_verdict(self, reference: str) -> bool:
        """Whether any model shares two seeds with the reference."""
        seeds = self.by_seed(reference).keys()
        return any(len(seeds & self.by_seed(m).keys()) > 1 for m in self.runs if m != reference)

    @property
    def result(self) -> dict:
        """The first run's; width, quick, image, classes and test_images are common to all."""
        return self.all_runs[0].result

    def by_seed(self, model: str) -> dict[int, FinishedRun]:
        return {run.seed: run for run in self.runs.get(model, [])}

    def accuracies(self, model: str) -> dict[int, float]:
        return {run.seed: run.result["test_acc"] for run in self.runs.get(model, [])}


def seeds_by_model(plans: list[dict]) -> dict[str, set[int]]:
    found = {}
    for plan in plans:
        for model in plan["models"]:
            found.setdefault(model, set()).update(plan["seeds"])
    return found


def planned_for_both(one: set[int] | None, other: set[int] | None) -> set[int] | None:
    """Planned seeds of a comparison. A model without a plan has whatever seeds the other has."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def read_studies(
    runs_dir: Path, reference: str = "baseline", **chosen
) -> tuple[list[Study], list[Problem]]:
    """(studies below `runs_dir`, problems). Studies with verdicts against the reference come first,
    then full length, then most runs. chosen: values of result.json to include; None: all."""
    groups, problems, plans = {}, [], []
    wanted = {key: values for key, values in chosen.items() if values}
    folders = run_folders(runs_dir, problems)
    # RUNS may lie above or below `runs_dir`: RUNS/<dataset>/<recipe>/<model>/seed<k>/
    above = [path for folder in folders for path in folder.absolute().parents[3:4]]
    for folder in {path.resolve(): path for path in [*above, runs_dir]}.values():
        try:
            for plan in read_plans(folder):
                models = [m for m in plan["models"] if m in wanted.get("model", [m])]
                plans += [plan | {"models": models}] if models else []
        except UserError as error:
            problems.append(Problem(str(error), is_lost=True))

    for folder in folders:
        with suppress(ValueError):  # without a readable config.json the run may be wanted
            config = read_json(folder / "config.json", CONFIG)
            config["dataset"] = config["dataset_name"]
            if not all(config[key] in values for key, values in wanted.items()):
                continue
        if not (folder / "result.json").exists():
            problems.append(Problem(f"unfinished: {folder}, {epochs_of(folder)} epochs done"))
            continue
        try:
            run = read_run(folder)
            run.explained = read_explained(run, problems)
            key = [run.result[key] for key in ("dataset", "recipe", "quick")]
            overrides = json.dumps(run.result["overrides"], sort_keys=True)
            groups.setdefault((*key, overrides), []).append(run)
        except Exception as error:  # damaged files can raise anything
            reason = f"its files are damaged or contradict each other ({in_one_line(error)})"
            again = "train it again with --overwrite"
            problems.append(Problem(f"{folder} left out, {reason}: {again}", is_lost=True))
    studies = []
    for (dataset, recipe, *_), runs in groups.items():
        kept, left_out = comparable(runs)
        for why, those in left_out.items():
            problems += [Problem(f"{run.folder} left out, {why}") for run in those]
        if kept:
            overrides = runs[0].result["overrides"]
            own = dict(dataset=dataset, recipe=recipe, overrides=overrides)
            of_study = [plan for plan in plans if own.items() <= plan.items()]
            studies.append(Study(dataset, recipe, overrides, kept, left_out, of_study))

    def order(s: Study):
        return not s.has_verdict(reference), s.result["quick"], -len(s.all_runs), s.title

    return sorted(studies, key=order), problems


def run_folders(runs_dir: Path, problems: list[Problem]) -> list[Path]:
    """Folders of finished and unfinished runs, at any depth but not in hidden folders. Appends
    unreadable folders to `problems`."""

    def unreadable(error: OSError) -> None:
        if runs_dir.is_dir():
            why = f"{error.filename} left out, it cannot be read: {error.strerror}"
            problems.append(Problem(why, is_lost=True))

    found, seen = set(), set()
    for name, folders, files in os.walk(runs_dir, onerror=unreadable, followlinks=True):
        path = Path(name)
        if "result.json" in files or ("config.json" in files and re.match(r"seed\d", path.name)):
            found.add(path)
        seen.add(path.resolve())
        inside = [path / each for each in folders if each[0] != "."]
        # A link to a visited folder may be circular.
        folders[:] = [p.name for p in inside if not (p.is_symlink() and p.resolve() in seen)]
    # Shallowest first: keep the original, not its copies or links.
    linked = sorted(found, key=lambda path: path.resolve() == path.absolute())
    real = {path.resolve(): path for path in linked}
    return sorted(
        real.values(), key=lambda path: (len(path.parts), path.parent, len(path.name), path.name)
    )


def comparable(runs: list[FinishedRun]) -> tuple[dict, dict]:
    """({model: its runs, sorted by seed}, {reason: runs left out}) for one study."""
    keys = {run.folder: json.dumps(run.settings, sort_keys=True) for run in runs}
    n = Counter(keys.values())
    # The most common settings (in a tie, a baseline's).
    usual = max(runs, key=lambda run: (n[keys[run.folder]], run.result["model"] == "baseline"))
    kept, found, left_out = {}, {}, {}
    for run in runs:
        if differences := different(run.settings, usual.settings):
            why = f"its settings differ: {'; '.join(differences)}"
        elif (first := kept.setdefault((run.result["model"], run.seed), run)) is not run:
            why = f"same model and seed as {first.folder}"
        else:
            continue
        left_out.setdefault(why, []).append(run)
    for model in in_table_order({model for model, _ in kept}):
        own = [kept[key] for key in sorted(kept) if key[0] == model]
        for run in own:
            if why := why_invalid(run, own):
                left_out.setdefault(why, []).append(run)
            else:
                found.setdefault(model, []).append(run)
    return found, left_out


def why_invalid(run: FinishedRun, runs: list[FinishedRun]) -> str | None:
    """Why it is no result of its model, whose `runs` must be of one size and no two alike."""
    sizes = Counter(each.result["params"] for each in runs).most_common()
    usual = sizes[0][0] if len(sizes) == 1 or sizes[0][1] > sizes[1][1] else None
    if run.result["params"] != usual:
        sizes_in_words = " or ".join(f"{size:,}" for size, _ in sizes)
        return f"seeds of one model have different parameter counts, {sizes_in_words}"
    if any(other is not run and same_mistakes(run, other) for other in runs):
        return "the same predictions for different seeds: one run is a copy"
    return None


def epochs_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    try:
        return len(read_small(path).splitlines())
    except OSError:
        return 0


def same_mistakes(run: FinishedRun, other: FinishedRun) -> bool:
    """Whether one is a copy of the other: same history, seconds included, or same predictions with
    too many errors for a coincidence."""
    if run.metrics == other.metrics:
        return True
    if not np.array_equal(run.predictions, other.predictions) or run.predictions is None:
        return False
    wrong = len(run.predictions) if run.correct is None else (~run.correct).sum()
    return wrong >= 10 and np.ptp(run.predictions) > 0  # not all of one class


def in_table_order(models) -> list[str]:
    return [m for m in PUBLISHED if m in models] + sorted(set(models) - PUBLISHED.keys())


def read_rows(path: Path) -> tuple[list[dict], list[Problem]]:
    """(rows of a benchmark.json, none if it is damaged; the problems with it)."""
    try:
        rows = [check(row, COST) for row in (read_json(path) if path.exists() else [])]
        json.dumps(rows, allow_nan=False)
        return rows, []
    except Exception as error:  # damaged files can raise anything
        again = "delete it, and run python benchmark.py again"
        return [], [Problem(f"{path} is damaged ({in_one_line(error)}): {again}")]


def read_explained(run: FinishedRun, problems: list[Problem]) -> dict | None:
    """The run's explain.json, if any; appends to `problems` if it is damaged."""
    path = run.folder / "explain.json"
    try:
        found = read_json(path, EXPLAINED) if path.exists() else None
        json.dumps(found, allow_nan=False)
    except ValueError as error:
        again = "run python explain.py again"
        why = f"{path} left out, it is damaged ({in_one_line(error)}): {again}"
        problems.append(Problem(why))
        return None
    return found and found | {"model": run.result["model"], "seed": run.seed}
