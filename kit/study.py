"""What ./run_all.sh does: lists of commands, each of which skips what is done already.

    python -m kit.study [plan] quick | full | study [--miniature]

A study is a series of stages. The runs of one stage may train at the same time (JOBS); the next
stage begins when all of them have ended. A command that fails is noted, and the rest is tried.
"""

import contextlib
import functools
import itertools
import os
import re
import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

from kit.command_line import UserError, exit_code, make_parser
from kit.files import check_writable
from kit.runner import DAMAGED, Job, Runner, read

MODELS = {}  # before all packages are installed, a plan is printed without knowing them
if find_spec("torch") and not os.environ.get("NO_PACKAGES"):
    from kit.environment import HERE, source_hashes
    from kit.finished import completed
    from kit.preflight import preflight, visible_gpus
    from kit.run_folder import changes_since, in_brackets
    from kit.settings import as_config
    from models import MODELS

    import torch

PUBLISHED = ["baseline", "se", "cbam_blocks", "cbam_classifier"]
COMPARED = ["baseline", "cbam_classifier", "se", "cbam_blocks", "se_static"]  # by the study
CANDIDATES = ["cbam_classifier", "se", "cbam_blocks"]  # the two best also train with `strong`
FIXED = ["MODELS", "SEEDS", "RECIPE", "DATASET", "RUNS", "SHARD"]  # by the study


def one(*command) -> list[Job]:
    """A stage of one command."""
    return [Job([*command])]


def train(runs, models, seeds, recipe="published", dataset="fashion_mnist", flags=()) -> list[Job]:
    """A stage of training runs."""
    jobs = []
    for seed, model in itertools.product(seeds, models):
        parts = Path(os.path.abspath(dataset)).name, recipe, model, f"seed{seed}"
        command = ["train.py", "--model", model, "--dataset", dataset, "--recipe", recipe]
        command += ["--seed", seed, "--runs", runs, *flags]
        log = Path(runs, "logs", f"{'.'.join(parts)}.log")
        job = Job(command, f"{model}, seed {seed}", Path(runs, *parts), log, state=state_of)
        jobs.append(job)
    return jobs


def state_of(run: Job) -> str:
    """What train.py would say of the run: "done", with a remark if other code has trained it; why
    the run that is there is another; or nothing, if none is finished."""
    if not (MODELS and (run.folder / "result.json").exists()):
        return ""
    settings = train_script()["parse"](list(map(str, run.command[1:])))
    config = as_config(settings)
    try:
        if not settings.dataset.isidentifier() or settings.dataset == "tiny_imagenet":
            # The others are verified when they are read, and a plan fetches nothing.
            config["data"] = digest_of(settings.dataset, settings.data_dir, settings.image_size)
        completed(run.folder, config)
    except UserError as error:
        return f"not done: {error}"
    return "done" + in_brackets(changes_since(run.folder, {"sha256": source_hashes()}))


@functools.cache
def train_script() -> dict:
    """The names of train.py, run as a command but in this process: a hundred starts take minutes.

    (Nothing in kit imports a script.)
    """
    return runpy.run_path(str(HERE / "train.py"))


@functools.cache
def digest_of(*dataset) -> str:
    return train_script()["data"].load_dataset(*dataset).digest


def table(s: SimpleNamespace, quick: bool, planning: bool) -> Iterator[list[Job] | str]:
    """`quick` and `full`, with the settings of the environment."""
    runs = train(s.runs, s.models, s.seeds, s.recipe, s.dataset)
    yield runs[s.shard :: s.shards]
    done = [run for run in runs if run.is_done]
    if s.shards > 1 or not (done or planning):
        return  # the rest is for a last call without SHARD
    size = ["--like", (done or runs)[0].folder] if s.dataset != "fashion_mnist" else []
    cheap = ["--modes", "eager", "--batch-sizes", 64] if quick else []
    yield one("benchmark.py", "--models", *s.models, "--keep", "--out", s.out, *size, *cheap)
    limit = ["--limit-test", 500, "--limit-cam", 20] if quick else ["--limit-test", 10000]
    if explained := [r.folder for r in runs[: len(s.models)] if planning or r in done]:
        yield one("explain.py", "--keep", "--out", s.out, *limit, "--compare", *explained)
    yield one("report.py", "--runs", s.runs, "--out", s.out)


def study(out: Path, miniature: bool, on_gpu: bool, planning: bool) -> Iterator[list[Job] | str]:
    """Everything a claim needs, what matters most first: docs/reference-study.md."""
    further = ["baseline", *(model for model in MODELS if model not in COMPARED)]
    runs, fp32, to_the_end, modules = (out / n for n in ("runs", "fp32", "to_the_end", "modules"))
    first, more, few, once = range(5), range(5, 10), range(3), range(3)
    width, small, limit, turns = [], [], ["--limit-test", 10000], []
    same = "(baseline or se- or cbam or everything) and not static"  # of tests/test_fast.py
    others = f"not ({same})"
    if miniature:
        first, more, few, once = range(2), [2], range(2), [0]
        width, limit, turns = ["--width", 16], [], ["--repeats", 2]
        small = [*width, "--epochs", 4, "--limit-train", 256, "--limit-test", 500]
        same, others = "se-compile-fp32", "eca-compile-fp32"
    costs = ["--modes", "eager", *(["compile+graph"] if on_gpu else []), *width, "--batch-sizes"]
    write = ["report.py", "--runs", runs, "--out", out]
    write += ["--compare", fp32] if fp32.is_dir() else []

    published = train(runs, COMPARED, first[:1], flags=small)
    test = ["-m", "pytest", "-q", "-m", "", "-n", 4, "tests/test_fast.py", "-k"]
    yield "1. Is the fast step the step of plain PyTorch? If not, nothing more is run."
    if planning or not any(run.is_done for run in published):
        yield [Job([*test, same], needed=True)]
    yield "2. How fast is it, compared with a plain loop? What do the models cost?"
    if planning or not (out / "benchmark_train.json").exists():
        speed = "benchmark.py", "--train", "--models", "baseline", "cbam_blocks", "--switches"
        which = ["--precisions", "bf16", "--modes", "eager", "compile+graph"] if on_gpu else []
        yield one(*speed, "--out", out, *which, *width, *turns)
    cost = "benchmark.py", "--models", *COMPARED, "--keep", "--out", out, *costs
    yield one(*cost, 64)
    yield one(*cost, 1, 16, 256, 1024)
    yield "3. The published study, and what its first seed looks at while the weights are there"
    yield published
    if explained := [run.folder for run in published if planning or run.is_done]:
        yield one("explain.py", "--keep", "--out", out, *limit, "--compare", *explained)
    yield one(*write)
    yield train(runs, COMPARED, first[1:], flags=small)
    yield one(*write)
    yield "4. The same without early stopping, which ends runs while the learning rate is high"
    yield train(to_the_end / "runs", COMPARED, once, flags=["--patience", 50, *small])
    yield one("benchmark.py", "--models", *COMPARED, "--keep", "--out", to_the_end, *costs, 64)
    yield one("report.py", "--runs", to_the_end / "runs", "--out", to_the_end, "--compare", runs)
    yield "5. Is bfloat16 as good as float32?"
    yield train(fp32, ["baseline", "cbam_blocks"], few, flags=["--precision", "fp32", *small])
    write = ["report.py", "--runs", runs, "--out", out, "--compare", fp32]
    yield one(*write)
    yield "6. The recipe strong: the baseline, and the two modules that are best in validation"
    if best := best_two(runs, first):
        yield train(runs, ["baseline", *best], few, "strong", flags=small)
        yield one(*write)
    else:
        yield "(which two are best is known when 3 is done)"
    yield "7. Every further module"
    yield [Job([*test, others])]
    yield one("benchmark.py", "--models", *further, "--keep", "--out", modules, *costs, 64)
    yield train(modules / "runs", further, once, flags=small)
    yield one("report.py", "--runs", modules / "runs", "--out", modules)
    yield "8. More seeds of 3"
    yield train(runs, COMPARED, more, flags=small)
    yield one(*write)


def best_two(runs: Path, seeds) -> list[str]:
    """Of CANDIDATES, by mean validation accuracy; none as long as a result is missing."""

    def accuracy(model):
        results = [read(run.folder / "result.json") for run in train(runs, [model], seeds)]
        return mean(result["val_acc"] for result in results)

    with contextlib.suppress(*DAMAGED):
        return sorted(CANDIDATES, key=accuracy)[-2:]
    return []


def settings_of(what: str, fail) -> SimpleNamespace:
    """The environment, checked before hours of work. Calls fail(one line) if something is wrong."""
    if what.startswith("study") and any(map(os.environ.get, FIXED)):
        fail(f"the study has its own {', '.join(FIXED[:-1])}, and no SHARD: unset them")
    quick, found, list_of = what == "quick", {}, r"(\s*\b({})\b)+\s*".format
    script = train_script() if MODELS else {}
    recipe, seeds = ("quick", "0") if quick else ("published", "0 1 2 3 4")
    for name, default, form, advice in (
        ("MODELS", " ".join(PUBLISHED), list_of("|".join(MODELS) or r"\w+"),
         f"choose from {' '.join(MODELS)}"),
        ("SEEDS", seeds, list_of("0|[1-9][0-9]{0,8}"),
         "give whole numbers below 10^9, without leading zeros"),
        ("RECIPE", recipe, "quick" if quick else "|".join(script.get("RECIPES", [r"\w+"])),
         "quick is a recipe of its own: unset it" if quick else "train.py has no such recipe"),
        ("DATASET", "fashion_mnist", ".+", "give a name, or a folder of images"),
        ("RUNS", "runs", ".+", "give a path of one line"),
        ("OUT", "results", ".+", "give a path of one line"),
        ("JOBS", "", "|[1-9][0-9]{0,2}", "give a number from 1 to 999"),
        ("SHARD", "0/1", "([0-9]{1,4})/([0-9]{1,4})", "give i/n with i from 0 to n-1"),
    ):  # fmt: skip
        value = found[name.lower()] = os.environ.get(name) or default
        match = re.fullmatch(form, value)
        if not match or (name == "SHARD" and int(match[1]) >= int(match[2])):
            fail(f"{name}: {value!r}: {advice}")
    s = SimpleNamespace(**found)
    s.models, s.seeds = (list(dict.fromkeys(names.split())) for names in (s.models, s.seeds))
    s.runs, s.out, s.jobs = Path(s.runs), Path(s.out), int(s.jobs or 0)
    s.shard, s.shards = map(int, s.shard.split("/"))
    try:
        folder = script and script["data"].resolve(s.dataset)[0]
        if "/" in folder and not os.path.exists(folder):
            raise ValueError(f"there is no folder {folder}")
    except ValueError as error:
        fail(f"DATASET: {error}")
    return s


@exit_code
def main(argv: list[str] | None = None) -> int:
    """The runner, with `argv` in place of the command line."""
    parser = make_parser(__doc__)
    parser.prog = "run_all.sh"
    parser.add_argument("words", nargs="*", metavar="[plan] quick | full | study [--miniature]")
    args, flags = parser.parse_known_args(argv)
    planning, words = args.words[:1] == ["plan"], " ".join([*args.words, *flags])
    what = words.removeprefix("plan").strip().replace(" --", " ")
    if what not in ("", "quick", "full", "study", "study miniature"):
        parser.error(f"'{words}': use quick, full, study [--miniature] or none, or plan and these")
    gpus, gpu = visible_gpus() if MODELS else ([], "PyTorch is not installed yet")
    if not (what or gpus):
        print(f"{gpu}: a quick run on the CPU", file=sys.stderr)
    what = what or ("full" if gpus else "quick")
    s = settings_of(what, parser.error)
    whole, small = what.startswith("study"), what == "study miniature"
    if whole:
        if planning and not MODELS:
            raise UserError("the plan of the study needs PyTorch: ./run_all.sh test installs it")
        if not (planning or gpus or small):
            raise UserError(f"the study needs a GPU: {gpu}. Without one, try study --miniature")
        name = re.sub("[^a-z0-9]+", "_", gpu.lower()) if gpus else "a_gpu"
        s.out = Path(os.environ.get("OUT") or f"results/{'miniature' if small else name}")
        stages = study(s.out, small, bool(gpus) or not small, planning)
    else:
        stages = table(s, what == "quick", planning)
    data = Job(["data.py", "--dataset", s.dataset], needed=True)
    if planning:
        for stage in ([data], *stages):
            for job in [f"# {stage}"] if isinstance(stage, str) else stage:
                state = job.state(job) if isinstance(job, Job) else ""
                print(f"{job}  # {state}" if state else job)
        return 0
    runner = Runner(s.jobs or len(gpus) or 1, gpus)
    runner.run([data])
    if not runner.over:
        for folder in [s.out] if whole else [s.out, s.runs]:
            try:
                check_writable(folder)
                preflight(torch.device("cpu"), folder)
            except OSError:
                advice = 'choose another RUNS or OUT (docker run: --user "$(id -u):$(id -g)")'
                raise UserError(f"{folder} cannot be written: {advice}") from None
        for stage in itertools.takewhile(lambda _: not runner.over, stages):
            runner.run(stage)
    return runner.end()


if __name__ == "__main__":
    sys.exit(main())
