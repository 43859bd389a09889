"""What ./run_all.sh does: lists of commands, each of which skips what is done already.

    python -m kit.study [plan] quick | full | verdict | study [--miniature]

A study is a series of stages. The runs of one stage may train at the same time (JOBS); the next
stage begins when all of them have ended. A command that fails is noted, and the rest is tried.
"""

import functools
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import data
import train
from kit.command_line import UserError, exit_code, make_parser
from kit.environment import source_hashes
from kit.files import check_writable
from kit.plans import add_plan
from kit.preflight import preflight, visible_gpus
from kit.runner import Job, Runner
from kit.runs import changes_since, completed, in_brackets
from kit.settings import as_config
from models import MODELS

import torch

PUBLISHED = ["baseline", "se", "cbam_blocks", "cbam_classifier"]
COMPARED = [*PUBLISHED, "se_static"]
# Recipe, models and seeds of each, unless variables of the environment name others.
TABLES = {
    "quick": ("quick", PUBLISHED, range(1)),
    "full": ("published", PUBLISHED, range(5)),
    "verdict": ("short", COMPARED, range(20)),
}
FIXED = ["MODELS", "SEEDS", "RECIPE", "DATASET", "FLAGS", "RUNS", "SHARD"]  # by the study


def one(*command) -> list[Job]:
    """A stage of one command."""
    return [Job([*command])]


def training(s: SimpleNamespace, **changes) -> list[Job]:
    """The runs of models x seeds. Seeds are outside: what is finished is whole seeds.

    A model may have flags of its own: "se --position stages". Raises ValueError for FLAGS that are
    not for all runs.
    """
    s, jobs = SimpleNamespace(**vars(s) | changes), []
    for seed, model in itertools.product(s.seeds, s.models):
        command = ["train.py", "--model", *model.split(), "--dataset", s.dataset]
        command += ["--recipe", s.recipe, "--seed", seed, "--runs", s.runs, *s.flags]
        run = train.parse(list(map(str, command[1:])))
        asked = model.split()[0], data.resolve(s.dataset)[0], s.recipe, seed, s.runs, False
        once = run.dry_run or run.overwrite
        if asked != (run.base_model, run.dataset, run.recipe, run.seed, run.runs, once):
            raise ValueError("no model, dataset, recipe, seed, runs, dry-run or overwrite")
        parts = run.dataset_name, run.recipe, run.model, f"seed{seed}"
        log = run.runs / "logs" / f"{'.'.join(parts)}.log"
        name, folder = f"{run.model}, seed {seed}", run.runs.joinpath(*parts)
        jobs.append(Job(command, name, folder, log, state=state_of, settings=run))
    plan = {"dataset": run.dataset_name, "recipe": run.recipe, "overrides": run.overrides}
    plan["models"] = [job.settings.model for job in jobs[: len(s.models)]]
    return [replace(job, plan=plan | {"seeds": [*s.seeds]}) for job in jobs]


def state_of(job: Job) -> str:
    """What train.py would say of the run: "done", with a remark if other code has trained it; why
    the run that is there is another; or nothing, if none is finished."""
    if not (job.folder / "result.json").exists():
        return ""
    run, config = job.settings, as_config(job.settings)
    try:
        if not run.dataset.isidentifier() or run.dataset == "tiny_imagenet":
            # The others are verified when they are read, and a plan fetches nothing.
            config["data"] = digest_of(run.dataset, run.data_dir, run.image_size)
        completed(job.folder, config)
    except UserError as error:
        return f"not done: {error}"
    return "done" + in_brackets(changes_since(job.folder, {"sha256": source_hashes()}))


@functools.cache
def digest_of(*dataset) -> str:
    return data.load_dataset(*dataset).digest


def tables(s: SimpleNamespace, parts: list[list[Job]]) -> Iterator[list[Job] | str]:
    """`quick`, `verdict` and `full`: training, then what the models cost and a report."""
    for runs in parts:
        yield runs[s.shard :: s.shards]
    all_runs = [run for runs in parts for run in runs]
    done = [run for run in all_runs if run.is_done] or (all_runs if s.planning else [])
    if s.shards > 1 or not done:
        return  # the rest is for a last call without SHARD
    models = dict.fromkeys(run.settings.base_model for run in all_runs)
    like = ["--like", done[0].folder] if s.flags or s.dataset != "fashion_mnist" else []
    cheap, limit = [], ["--limit-test", 10000]
    if s.what == "quick":
        cheap = ["--modes", "eager", "--batch-sizes", 64]
        limit = ["--limit-test", 500]
    yield one("benchmark.py", "--models", *models, "--keep", "--out", s.out, *like, *cheap)
    yield explain(s, parts[-1], limit)
    yield one("report.py", "--runs", s.runs, "--out", s.out)


def explain(s: SimpleNamespace, runs: list[Job], limit: list) -> list[Job]:
    """A stage that compares the finished models of the first seed; nothing if there is none."""
    first = [run for run in runs if run.settings.seed == runs[0].settings.seed]
    found = [run.folder for run in first if s.planning or run.is_done]
    return one("explain.py", "--keep", "--out", s.out, *limit, "--compare", *found) if found else []


def study(s: SimpleNamespace, miniature: bool, on_gpu: bool) -> Iterator[list[Job] | str]:
    """Everything a claim needs, what matters most first: docs/reference-study.md."""
    five, ten, twenty, limit = range(5), range(10), range(20), ["--limit-test", 10000]
    width, turns, s.models = [], [], COMPARED
    same = "(baseline or se- or cbam or everything) and not static"  # of tests/test_fast.py
    others, modes = f"not ({same})", ["--modes", "eager", *(["compile+graph"] if on_gpu else [])]
    if miniature:
        five, ten, twenty, limit = range(2), range(1), range(3), []
        width, turns = ["--width", 16], ["--repeats", 2]
        s.flags = [*width, "--epochs", 4, "--limit-train", 256, "--limit-test", 500]
        same, others = "se-compile-fp32", "eca-compile-fp32"
    test = ["-m", "pytest", "-q", "-m", "", "-n", 4, "tests/test_fast.py", "-k"]
    cost = ["benchmark.py", "--keep", *modes, *width, "--models"]
    write = ["report.py", "--runs", s.runs, "--out", s.out]

    published = training(s, seeds=five)
    yield "1. Is the fast step the step of plain PyTorch? If not, nothing more is run."
    if s.planning or not any(run.is_done for run in published):
        yield [Job([*test, same], needed=True)]
    yield "2. How fast is it, compared with a plain loop? What do the models cost?"
    if s.planning or not (s.out / "benchmark_train.json").exists():
        speed = ["benchmark.py", "--train", "--models", "baseline", "cbam_blocks", *width, *turns]
        yield one(*speed, "--out", s.out, *(["--precisions", "bf16", *modes] if on_gpu else []))
    yield one(*cost, *COMPARED, "--out", s.out, "--batch-sizes", 64)
    yield one(*cost, *COMPARED, "--out", s.out, "--batch-sizes", 1, 16, 256, 1024)
    yield "3. The published study, and what the models of its first seed look at"
    yield published
    yield explain(s, published, limit)
    yield one(*write)
    yield "4. The verdict: is any of them better or worse than the baseline, or equivalent?"
    yield training(s, seeds=twenty, recipe="short")
    yield one(*write)
    yield "5. Is bfloat16 as good as float32?"
    fp32 = {"runs": s.out / "fp32", "flags": [*s.flags, "--precision", "fp32"]}
    yield training(s, seeds=ten, recipe="short", models=["baseline", "cbam_blocks"], **fp32)
    yield one(*write, "--compare", fp32["runs"])
    yield "6. Every further module"
    yield [Job([*test, others])]
    further = ["baseline", *(model for model in MODELS if model not in COMPARED)]
    modules = s.out / "modules"
    yield one(*cost, *further, "--out", modules, "--batch-sizes", 64)
    yield training(s, seeds=ten, recipe="short", models=further, runs=modules / "runs")
    yield one("report.py", "--runs", modules / "runs", "--out", modules)
    yield "7. SE and CBAM at other positions"
    at = itertools.product(("se", "cbam_blocks"), ("stages", "prepool", "classifier"))
    placed = ["baseline", *(f"{model} --position {position}" for model, position in at)]
    positions = s.out / "positions"
    yield training(s, seeds=ten, recipe="short", models=placed, runs=positions / "runs")
    yield one("report.py", "--runs", positions / "runs", "--out", positions)


def settings_of(what: str, fail) -> SimpleNamespace:
    """The environment, checked before hours of work. Calls fail(one line) if something is wrong."""
    if what.startswith("study") and any(map(os.environ.get, FIXED)):
        fail(f"the study has its own {', '.join(FIXED[:-1])}, and no SHARD: unset them")
    recipe, models, seeds = TABLES.get(what, TABLES["full"])
    found, list_of = {"what": what}, r"(\s*\b({})\b)+\s*".format
    path = "(?!-).+", "give a path of one line that does not begin with a dash"
    for name, default, form, advice in (
        ("MODELS", " ".join(models), list_of("|".join(MODELS)),
         f"choose from {' '.join(MODELS)}"),
        ("SEEDS", " ".join(map(str, seeds)), list_of("0|[1-9][0-9]{0,8}"),
         "give whole numbers below 10^9, without leading zeros"),
        ("RECIPE", recipe, "|".join(train.RECIPES), "train.py has no such recipe"),
        ("DATASET", "fashion_mnist", *path),
        ("RUNS", "runs", *path),
        ("OUT", "results", *path),
        ("FLAGS", "", ".*", "give flags of train.py, in one line"),
        ("JOBS", "", "|[1-9][0-9]{0,2}", "give a number from 1 to 999"),
        ("SHARD", "0/1", "([0-9]{1,4})/([0-9]{1,4})", "give i/n with i from 0 to n-1"),
    ):  # fmt: skip
        value = found[name.lower()] = os.environ.get(name) or default
        match = re.fullmatch(form, value)
        if not match or (name == "SHARD" and int(match[1]) >= int(match[2])):
            fail(f"{name}: {value!r}: {advice}")
    s = SimpleNamespace(**found)
    s.models, s.seeds = (list(dict.fromkeys(names.split())) for names in (s.models, s.seeds))
    s.seeds, s.recipe = list(map(int, s.seeds)), s.recipe if what == "full" else recipe
    s.runs, s.out, s.jobs = Path(s.runs), Path(s.out), int(s.jobs or 0)
    s.shard, s.shards = map(int, s.shard.split("/"))
    try:
        folder = data.resolve(s.dataset)[0]
        if "/" in folder and not os.path.exists(folder):
            raise ValueError(f"there is no folder {folder}")
    except ValueError as error:
        fail(f"DATASET: {error}")
    said = io.StringIO()  # by argparse
    try:
        s.flags = shlex.split(s.flags)
        with redirect_stderr(said):
            s.stage = training(s)
    except (SystemExit, ValueError) as error:
        fail(f"FLAGS: {said.getvalue().rpartition('error: ')[2].strip() or error}")
    return s


@exit_code
def main(argv: list[str] | None = None) -> int:
    """The runner, with `argv` in place of the command line."""
    parser = make_parser(__doc__)
    parser.prog = "run_all.sh"
    words = [word.removeprefix("--") for word in (sys.argv[1:] if argv is None else argv)]
    planning = words[:1] == ["plan"]
    what = " ".join(words[planning:])
    if what not in ("", *TABLES, "study", "study miniature"):
        known = "quick, full, verdict, study [--miniature]"
        parser.error(f"'{' '.join(words)}': use {known} or none, or plan and one of these")
    gpus, gpu = visible_gpus()
    if not (what or gpus):
        print(f"{gpu}: a quick run on the CPU", file=sys.stderr)
    what = what or ("full" if gpus else "quick")
    whole, small = what.startswith("study"), what == "study miniature"
    s = settings_of(what, parser.error)
    s.planning = planning
    if os.environ.get("RECIPE", s.recipe) not in ("", s.recipe):
        parser.error(f"RECIPE: {what} has a recipe of its own: unset it")
    if whole:
        if not (planning or gpus or small):
            raise UserError(f"the study needs a GPU: {gpu}. Without one, try study --miniature")
        name = re.sub("[^a-z0-9]+", "_", gpu.lower()) if gpus else "a_gpu"
        s.out = Path(os.environ.get("OUT") or f"results/{'miniature' if small else name}")
        s.runs = s.out / "runs"
        stages = study(s, small, bool(gpus) or not small)
    else:
        parts = [s.stage]
        if what == "full" and s.recipe == "published":
            parts.append(settings_of("verdict", parser.error).stage)
        stages = tables(s, parts)
    where = s.stage[0].settings.data_dir
    fetch = Job(["data.py", "--dataset", s.dataset, "--data-dir", where], needed=True)
    if planning:
        for stage in ([fetch], *stages):
            for job in [f"# {stage}"] if isinstance(stage, str) else stage:
                state = job.state(job) if isinstance(job, Job) else ""
                print(f"{job}  # {state}" if state else job)
        return 0
    runner = Runner(s.jobs or len(gpus) or 1, gpus)
    runner.run([fetch])
    if not runner.over:
        advice = 'choose another RUNS or OUT (docker run: --user "$(id -u):$(id -g)")'
        for folder in (s.out, s.runs):
            check_writable(folder, advice)
            preflight(torch.device("cpu"), folder)
        for stage in itertools.takewhile(lambda _: not runner.over, stages):
            for job in stage[:1]:
                if isinstance(job, Job) and job.plan:
                    add_plan(job.settings.runs, job.plan)
            runner.run(stage)
    return runner.end()


if __name__ == "__main__":
    sys.exit(main())
