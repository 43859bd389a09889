"""What ./run_all.sh does: lists of commands, each of which skips what is already done.

    python -m kit.study [plan] quick | full | verdict | study

A study is a series of stages. The runs of one stage may train in parallel (JOBS); the next stage
begins when all have ended. If a command fails, it is reported, and the others still run.
"""

import functools
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import data
import train
from kit.command_line import UserError, exit_code, make_parser
from kit.environment import source_hashes
from kit.files import check_writable
from kit.plans import add_plan
from kit.preflight import visible_gpus
from kit.runner import Job, Runner
from kit.runs import changes_since, completed, in_brackets
from kit.settings import as_config
from models import MODELS

PUBLISHED = ["baseline", "se", "cbam_blocks", "cbam_classifier"]
COMPARED = [*PUBLISHED, "se_static"]
FURTHER = ["baseline", "cbam_blocks", *(model for model in MODELS if model not in COMPARED)]
# A model may have its own flags.
PLACED = ["baseline", *(f"{model} --position {position}" for model in ("se", "cbam_blocks")
                        for position in ("stages", "prepool", "classifier"))]  # fmt: skip
# What each word trains: recipe, models, number of seeds; optional: folder in OUT (not RUNS), flags.
TABLES = {
    "quick": [("quick", PUBLISHED, 1)],
    "full": [("published", PUBLISHED, 5), ("short", COMPARED, 20)],
    "verdict": [("short", COMPARED, 20)],
    "study": [
        ("published", COMPARED, 5),
        ("short", COMPARED, 20),
        ("short", ["baseline", "cbam_blocks"], 10, "fp32", ["--precision", "fp32"]),
        ("short", FURTHER, 10, "modules/runs"),
        ("short", PLACED, 10, "positions/runs"),
    ],
}
# Environment variables that a word does not accept.
OWN = {"full": [], "study": ["MODELS", "RECIPE", "DATASET", "RUNS", "SHARD"]}
hashes = functools.cache(source_hashes)  # they stay as they were when this process started
say = functools.partial(print, "#", flush=True)  # a heading among the commands
# FLAGS may not change these.
OF_THE_RUN = ("base_model", "dataset", "recipe", "seed", "runs", "dry_run", "overwrite")


class Training(Job):
    """A run of train.py. Raises ValueError if FLAGS do not suit all runs."""

    def __init__(self, s: SimpleNamespace, recipe: str, model: str, seed, runs: Path, flags):
        command = ["train.py", "--model", *model.split(), "--dataset", s.dataset]
        command += ["--recipe", recipe, "--seed", seed, "--runs", runs]
        plain, run = (
            train.parse(list(map(str, [*command[1:], *more]))) for more in ([], [*s.flags, *flags])
        )
        if any(getattr(plain, key) != getattr(run, key) for key in OF_THE_RUN):
            what = "model, dataset, recipe, seed, runs, dry-run or overwrite"
            raise ValueError(f"FLAGS: they may not set {what}")
        if "/" in run.dataset and not os.path.exists(run.dataset):
            raise ValueError(f"DATASET: there is no folder {run.dataset}")
        parts = run.dataset_name, run.recipe, run.model, f"seed{run.seed}"
        log = runs / "logs" / f"{'.'.join(parts)}.log"
        name, folder = f"{run.model}, seed {run.seed}", runs.joinpath(*parts)
        super().__init__([*command, *s.flags, *flags], name, folder, log)
        self.settings = run

    @property
    def state(self) -> str:
        """What train.py would say of the run: "done", with a remark if other code trained it; why
        the finished run is a different one; or "" if none is finished."""
        if not (self.folder / "result.json").exists():
            return ""
        run, config = self.settings, as_config(self.settings)
        try:
            if not run.dataset.isidentifier() or run.dataset == "tiny_imagenet":
                # The others are verified when read, and a plan downloads nothing.
                config["data"] = digest_of(run.dataset, run.data_dir, run.image_size)
            there = completed(self.folder, config)
        except UserError as error:
            return f"not done: {error}"
        return "done" + in_brackets(changes_since(there.env, {"sha256": hashes()}))


@functools.cache
def digest_of(*dataset) -> str:
    return data.load_dataset(*dataset).digest


def training(s: SimpleNamespace, recipe, models, seeds, folder="", flags=()) -> list[Training]:
    """The runs of models x seeds, seed by seed: finished runs form whole seeds."""
    runs = s.out / folder if folder else s.runs
    pairs = itertools.product(s.seeds or range(seeds), s.models or models)
    return [Training(s, recipe, model, seed, runs, flags) for seed, model in pairs]


def finished(s: SimpleNamespace, runs: list[Training]) -> list[Training]:
    """The finished runs; in a plan, all of them."""
    return [run for run in runs if s.planning or run.state.startswith("done")]


def explain(s: SimpleNamespace, runs: list[Training], limit: int = 10000) -> list[Job]:
    """Compares the finished models of the first seed."""
    first = [run for run in runs if run.settings.seed == runs[0].settings.seed]
    found = [run.folder for run in finished(s, first)]
    flags = "--keep", "--out", s.out, "--limit-test", limit, "--compare", *found
    return [Job(["explain.py", *flags])] if found else []


def tables(s: SimpleNamespace) -> Iterator[list[Job]]:
    """`quick`, `verdict` and `full`: training, then a benchmark and a report."""
    for runs in s.tables:
        yield runs[s.shard :: s.shards]
    all_runs = list(itertools.chain(*s.tables))
    done, quick = finished(s, all_runs), s.what == "quick"
    if s.shards > 1 or not done:
        return  # a final call without SHARD does the rest
    cost = ["benchmark.py", "--models", *dict.fromkeys(run.settings.base_model for run in all_runs)]
    cost += ["--keep", "--out", s.out] + ["--modes", "eager", "--batch-sizes", 64] * quick
    if s.flags or s.dataset != "fashion_mnist":
        cost += ["--like", done[0].folder]  # networks and images of that size
    yield [Job(cost)]
    yield explain(s, s.tables[-1], 500 if quick else 10000)
    yield [Job(["report.py", "--runs", s.runs, "--out", s.out])]


def study(s: SimpleNamespace) -> Iterator[list[Job]]:
    """Everything a claim needs, most important first: docs/reference-study.md."""
    published, verdict, fp32, modules, positions = s.tables
    same = "(baseline or se- or cbam or everything) and not static"  # of tests/test_fast.py
    test = ["-m", "pytest", "-q", "-n", 4, "tests/test_fast.py", "-k"]
    on_gpu = bool(s.gpus) or not s.flags
    modes = ["--modes", "eager", *["compile+graph"] * on_gpu]

    say("1. Is the fast step the step of plain PyTorch? If not, nothing more is run.")
    if s.planning or not finished(s, published):
        yield [Job([*test, same], needed=True)]
    say("2. The published study, and what the models of its first seed look at")
    yield published
    if not (done := finished(s, published)):
        return
    like = ["--like", done[0].folder] if s.flags else []
    cost = ["benchmark.py", "--keep", *modes, *like, "--models"]
    report = ["report.py", "--runs", s.runs, "--out", s.out]
    yield explain(s, published)
    say("3. How fast is a step, compared with a plain loop's? What do the models cost?")
    if s.planning or not (s.out / "benchmark_train.json").exists():
        speed = ["benchmark.py", "--train", "--models", "baseline", "cbam_blocks", *like]
        fast = ["--precisions", "bf16", *modes] if on_gpu else []
        yield [Job([*speed, *fast, "--out", s.out])]
    yield [Job([*cost, *COMPARED, "--out", s.out, "--batch-sizes", 64])]
    yield [Job([*cost, *COMPARED, "--out", s.out, "--batch-sizes", 1, 16, 256, 1024])]
    yield [Job(report)]
    say("4. The verdict: is any of them better or worse than the baseline, or equivalent?")
    yield verdict
    yield [Job(report)]
    say("5. Is bfloat16 as good as float32?")
    yield fp32
    yield [Job([*report, "--compare", s.out / "fp32"])]
    say("6. Every further module")
    yield [Job([*test, f"not ({same})"])]
    yield [Job([*cost, *FURTHER, "--out", s.out / "modules", "--batch-sizes", 64])]
    yield modules
    yield [Job(["report.py", "--runs", s.out / "modules/runs", "--out", s.out / "modules"])]
    say("7. SE and CBAM at other positions")
    yield positions
    yield [Job(["report.py", "--runs", s.out / "positions/runs", "--out", s.out / "positions"])]


def settings_of(what: str, planning: bool, gpus: list[str], gpu: str, fail) -> SimpleNamespace:
    """Environment variables, checked before hours of work. Calls fail(one line) if one is wrong."""
    rows, s = TABLES[what], SimpleNamespace(what=what, planning=planning, gpus=gpus)
    home = f"results/{re.sub('[^a-z0-9]+', '_', gpu.lower()) if gpus else 'cpu'}"
    names, path = (r"|.*\S.*", "name one"), ("(?!-).+", "give one line without a dash in front")
    for name, default, form, advice in (  # train.py checks the rest
        ("MODELS", "", *names), ("SEEDS", "", *names), ("RECIPE", rows[0][0], *names),
        ("DATASET", "fashion_mnist", *path), ("RUNS", "runs", *path),
        ("OUT", home if what == "study" else "results", *path), ("FLAGS", "", "(?s).*", ""),
        ("JOBS", str(len(gpus) or 1), "[1-9][0-9]{0,2}", "give a number from 1 to 999"),
        ("SHARD", "0/1", "[0-9]{1,4}/[0-9]{1,4}", "give i/n"),
    ):  # fmt: skip
        value = os.environ.get(name) or default
        if value != default and name in OWN.get(what, ["RECIPE"]):
            fail(f"{name}: {what} has its own, or none: unset it")
        if not re.fullmatch(form, value):
            fail(f"{name}: {value!r}: {advice}")
        setattr(s, name.lower(), value)
    s.models = list(dict.fromkeys(s.models.split()))
    s.out, s.jobs = Path(s.out), int(s.jobs)
    s.runs = s.out / "runs" if what == "study" else Path(s.runs)
    s.shard, s.shards = map(int, s.shard.split("/"))
    if s.shard >= s.shards:
        fail(f"SHARD: {s.shard}/{s.shards}: give i/n with i from 0 to n-1")
    if s.recipe != rows[0][0]:
        rows = [(s.recipe, *rows[0][1:])]  # that table alone
    said = io.StringIO()  # argparse's output
    try:
        s.seeds = list(dict.fromkeys(map(int, s.seeds.split())))
        s.flags = shlex.split(s.flags)
        with redirect_stderr(said), redirect_stdout(said):
            s.tables = [training(s, *row) for row in rows]
    except ValueError as error:
        unread = [name for name in ("seeds", "flags") if isinstance(getattr(s, name), str)]
        fail(f"{unread[0].upper()}: {error}" if unread else str(error))
    except SystemExit:
        why = said.getvalue().partition("error: ")[2].strip() or "--help is not for runs"
        fail(f"MODELS, SEEDS, RECIPE, DATASET or FLAGS: {why}")
    return s


@exit_code
def main(argv: list[str] | None = None) -> int:
    """Runs the runner with `argv` as its command line; returns the exit code."""
    parser = make_parser(__doc__)
    parser.prog = "run_all.sh"
    words = sys.argv[1:] if argv is None else argv
    planning = words[:1] == ["plan"]
    what = " ".join(words[planning:])
    gpus, gpu = visible_gpus()
    if not (what or gpus):
        print(f"{gpu}: a quick run on the CPU", file=sys.stderr)
    what = what or ("full" if gpus else "quick")
    if what not in TABLES:
        parser.error(f"{' '.join(words)!r}: use {', '.join(TABLES)}, or plan and one of these")
    s = settings_of(what, planning, gpus, gpu, parser.error)
    if what == "study" and not (planning or gpus or s.flags):
        raise UserError(f'the study needs a GPU, or small runs, as by FLAGS="--width 16": {gpu}')
    fetch = ["data.py", "--dataset", s.dataset, "--data-dir", s.tables[0][0].settings.data_dir]
    stages = itertools.chain([[Job(fetch, needed=True)]], (study if what == "study" else tables)(s))
    if planning:
        for job in itertools.chain.from_iterable(stages):
            state = job.state
            print(f"{job}  # {state}" if state else job)
        return 0
    for folder in (s.out, s.runs):
        advice = 'choose another RUNS or OUT (docker run: --user "$(id -u):$(id -g)")'
        check_writable(folder, advice)
    for runs in s.tables:
        add_plan([run.settings for run in runs])
    runner = Runner(s.jobs, gpus)
    for stage in stages:
        runner.run(stage)
        if runner.over:
            break
    return runner.end()


if __name__ == "__main__":
    sys.exit(main())
