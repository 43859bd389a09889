"""How fast it is, mode against mode and beside reference implementations, measured in one run.

    python speed.py                               # this project's modes
    python speed.py --peers DIR                   # ... and beside the reference scripts in DIR
    python speed.py --peers DIR --plan            # the commands alone
    python speed.py --check baseline se           # the self-check of the fast mode alone

The reference scripts do the same work as most people run it; each prints a JSON object a line.
plain_loop.py: torchvision's ResNet-18, PIL transforms in a DataLoader, eager float32, `.item()`
every step; lightning_loop.py: the same in PyTorch Lightning (on a GPU only). Both take --data,
--epochs and --workers, and print train_images_per_second or images_per_second_with_validation.
timm_inference.py: `attention` and `ms_per_image` of timm's models at batch 64.

Each job is a process of its own and leaves OUT/speed/<job>.json: stop it at any time, and the same
command goes on with what is missing or was measured on another device, torch or source. The figures
are medians over the rounds. On a CPU it trains 960 images an epoch and takes about 15 minutes; on a
GPU it trains whole epochs, begins with the self-check of the mode that is to be fast, and ends with
50 epochs of each published model from start to end. Writes OUT/speed.json and OUT/speed.md. Exit
code 1 if a job failed or a target was missed.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from environment import choose_device, describe_environment
from files import check_writable, write_atomically
from models import MODELS
from modes import MODES, PRECISIONS, why_not
from training_step import choose_mode, choose_precision

PUBLISHED = ("baseline", "se", "cbam_blocks", "cbam_classifier")
STEPS = 50 * 844  # of the published recipe
BATCH_SIZE = 64
TIMM = {"none": "baseline", "se": "se", "cbam": "cbam_blocks"}  # the same models there

FAILURES = (RuntimeError, OSError, ValueError, LookupError, StopIteration)

# (what, figure, divided by this figure or None, at least, at most). {fast}: the mode that `auto`
# takes for the published recipe.
CPU_TARGETS = [
    ("training, baseline, compiled against eager",
     "train baseline compile", "train baseline eager", None, None),
    *((f"inference, {model}, eager against compiled",
       f"ms/image {model} eager fp32", f"ms/image {model} compile fp32", None, None)
      for model in PUBLISHED),
    ("training, baseline, against the plain loop",
     "train baseline fastest", "train plain loop, 0 workers", 1.1, None),
    *((f"inference, timm's {name} against {model}",
       f"ms/image timm {name} fp32", f"ms/image {model} fastest", 1.15, None)
      for name, model in TIMM.items()),
]  # fmt: skip
GPU_TARGETS = [
    ("training, baseline, graph against eager",
     "train baseline graph", "train baseline eager", None, None),
    ("training, baseline, compile+graph against eager",
     "train baseline compile+graph", "train baseline eager", None, None),
    ("training against the plain loop, 0 workers",
     "train baseline {fast}", "train plain loop, 0 workers", 10, None),
    ("training against the plain loop, 8 workers",
     "train baseline {fast}", "train plain loop, 8 workers", 4, None),
    ("training against Lightning, 8 workers",
     "train baseline {fast}", "train Lightning, 8 workers", 4, None),
    ("training, images/s", "train baseline {fast}", None, 45_000, None),
    ("50 epochs of baseline, everything, s", "50 epochs baseline", None, None, 70),
    ("50 epochs of all four models, s", "50 epochs all four", None, None, 360),
    ("training step time, cbam_blocks against baseline",
     "train baseline {fast}", "train cbam_blocks {fast}", None, 1.4),
    ("inference, baseline, ms/image", "ms/image baseline fastest", None, None, 0.006),
    ("inference time, cbam_blocks against baseline",
     "ms/image cbam_blocks fastest", "ms/image baseline fastest", None, 1.3),
    ("inference, timm's cbam, eager fp32, against cbam_blocks",
     "ms/image timm cbam fp32", "ms/image cbam_blocks fastest", 4, None),
    ("inference, timm's cbam, compiled bf16, against cbam_blocks",
     "ms/image timm cbam bf16 compiled", "ms/image cbam_blocks fastest", 1.1, None),
]  # fmt: skip


def jobs_of(args, cuda: bool) -> dict[str, list]:
    """{job: its command}, what matters most first. The last word of a name is the round."""
    fast = choose_mode("auto", torch.device("cuda" if cuda else "cpu"), STEPS)
    on = ["--width", args.width, "--device", args.device]
    train = ["train.py", "--data-dir", args.data_dir, "--patience", 50, *on]
    some = [] if cuda else ["--limit-train", 960, "--limit-test", 100]
    check = ["train.py", "--self-check", "--mode", fast, "--precision", args.precision, *on]
    raw = args.data_dir / "FashionMNIST" / "raw"
    peer_data = ["--data", raw if raw.is_dir() else args.data_dir, "--epochs", 3]
    peer_data += [] if cuda else ["--limit", 960]
    benchmark = ["benchmark.py", "--models", *PUBLISHED, "--batch-sizes", BATCH_SIZE, *on]
    jobs = {
        f"check {model} {args.precision} 0": [*check, "--model", model]
        for model in args.check or (PUBLISHED if cuda else ())
    }
    for i in range(0 if args.check else args.rounds):
        for model in PUBLISHED if cuda else ("baseline",):
            modes = ("eager", "graph", fast) if cuda and model == "baseline" else ("eager", fast)
            for mode in modes:
                short = ["--model", model, "--epochs", 4, "--mode", mode, *some]
                jobs[f"train {model} {mode} {i}"] = [*train, *short]
        if args.peers:
            for workers in (0, 8) if cuda else (0,):
                plain = [args.peers / "plain_loop.py", *peer_data, "--workers", workers]
                jobs[f"plain loop, {workers} workers {i}"] = plain
            if cuda:
                lightning = [args.peers / "lightning_loop.py", *peer_data, "--workers", 8]
                jobs[f"Lightning, 8 workers {i}"] = lightning
        for precision in ("bf16", "fp32") if cuda else ("fp32",):
            inference = [*benchmark, "--precisions", precision, "--modes", "eager", fast]
            jobs[f"inference {precision} {i}"] = inference
        if args.peers:
            timm = [args.peers / "timm_inference.py"]
            jobs[f"timm fp32 {i}"] = timm
            if cuda:
                compiled = [*timm, "--precision", "bf16", "--compile"]
                jobs[f"timm bf16 compiled {i}"] = compiled
    if cuda and not (args.check or args.short):
        for model in PUBLISHED:
            jobs[f"50 epochs {model} 0"] = [*train, "--model", model]
    return {name: ["python", *map(str, command)] for name, command in jobs.items()}


def run_job(name: str, command: list[str]) -> dict:
    """Runs it; {"command", "seconds", "figures": {name: value}, "raw": what they come from}.

    Raises RuntimeError if it fails, LookupError or ValueError if its output is not as expected.
    """
    kind = name.rpartition(" ")[0]
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        place = {"train.py": "--runs", "benchmark.py": "--out"}.get(command[1])
        keep = [place, folder] if place and "--self-check" not in command else []
        start = time.perf_counter()
        here = [sys.executable, *command[1:], *keep]
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # from start to end: compiled anew
        anew = {name: f"{folder}/{name}" for name in caches} if kind.startswith("50") else {}
        done = subprocess.run(
            here, capture_output=True, text=True, timeout=3600, env=os.environ | anew
        )
        seconds = time.perf_counter() - start
        measured_in_part = (Path(folder) / "benchmark.json").exists()
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            if "--self-check" in command:
                print(done.stdout)
            if not measured_in_part:
                raise RuntimeError(f"exit code {done.returncode}: {said[-1]}")
            print(f"({said[-1]})", end=" ")
        raw = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if "--self-check" in command:
            raw, figures = done.stdout.splitlines(), {}
        elif command[1] == "train.py":
            run = next(Path(folder).glob("*/*/*/seed0"))
            raw = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            speed = median(row["images_per_second"] for row in raw[1:])  # the first one warms up
            figures = {kind: seconds} if kind.startswith("50") else {kind: speed}
            result = json.loads((run / "result.json").read_text())
            if result["fallback"]:  # in another mode than the figure would be named after
                raise RuntimeError(result["fallback"])
            raw = {"result": result, "epochs": raw}
        elif command[1] == "benchmark.py":
            raw = json.loads((Path(folder) / "benchmark.json").read_text())
            figures = {
                f"ms/image {row['model']} {row['mode']} {row['precision']}": row["ms_per_image"]
                for row in raw
            }
            row = raw[0]
            figures[f"ceiling {row['precision']}"] = row["tflops"] / row["share_of_ceiling"]
            figures |= {f"GFLOP/image {row['model']}": row["flops_aten"] / 1e9 for row in raw}
        elif kind.startswith("timm"):
            variant = kind.removeprefix("timm ")
            figures = {
                f"ms/image timm {row['attention']} {variant}": row["ms_per_image"] for row in raw
            }
        else:
            keys = ("train_images_per_second", "images_per_second_with_validation")
            figures = {f"train {kind}": next(raw[-1][key] for key in keys if key in raw[-1])}
    return {"command": command, "seconds": seconds, "figures": figures, "raw": raw}


def read_job(path: Path, command: list[str], made_with: dict) -> dict | None:
    """What a job left in `path`, if the same command was run here on the same sources."""
    try:
        job = json.loads(path.read_text())
        same = (job["command"], job["made_with"]) == (command, made_with)
        whole = job["figures"] or "--self-check" in command
        whole = whole and all(value > 0 for value in job["figures"].values())
        return job if same and whole else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def medians_of(found: dict[str, dict]) -> dict[str, float]:
    """{figure: its median over the rounds}, and the fastest mode and the sum made of them."""
    values = {}
    for job in found.values():
        for name, value in job["figures"].items():
            values.setdefault(name, []).append(value)
    medians = {name: median(several) for name, several in values.items()}
    modes = [medians[key] for key in medians if key.startswith("train baseline ")]
    if modes:
        medians["train baseline fastest"] = max(modes)
    for model in PUBLISHED:
        times = [medians[key] for key in medians if key.startswith(f"ms/image {model} ")]
        if times:
            medians[f"ms/image {model} fastest"] = min(times)
    wholes = [medians.get(f"50 epochs {model}") for model in PUBLISHED]
    if all(wholes):
        medians["50 epochs all four"] = sum(wholes)
    return medians


def check_targets(medians: dict[str, float], targets: list[tuple], fast: str) -> list[dict]:
    """A row a target; `figure` and `met` are None where something was not measured."""
    rows = []
    for what, over, under, least, most in targets:
        over, under = over.format(fast=fast), under and under.format(fast=fast)
        figure, met = None, None
        if over in medians and (under is None or under in medians):
            figure = medians[over] / (medians[under] if under else 1)
            met = (least is None or figure >= least) and (most is None or figure <= most)
        met = None if least is None and most is None else met
        target = "" if most is None else f"at most {most:,}"
        target = target if least is None else f"at least {least:,}"
        rows.append({"what": what, "figure": figure, "target": target, "met": met})
    return rows


def training_table(medians: dict[str, float], precision: str) -> list[str]:
    """Every model and mode that was trained, in lines of Markdown.

    FLOPs of a step: three times those of the forward pass, for there is a gradient by weights and
    one by inputs. The ceiling: see benchmark.py.
    """
    lines = [
        f"| training, batches of {BATCH_SIZE}, {precision} | images/s | ms a step | TFLOP/s "
        "| of the ceiling |",
        "|---|---|---|---|---|",
    ]
    for model in PUBLISHED:
        for mode in MODES:
            if speed := medians.get(f"train {model} {mode}"):
                tflops = 3 * medians.get(f"GFLOP/image {model}", 0) * speed / 1e3
                share = tflops / medians.get(f"ceiling {precision}", float("inf"))
                known = f"{tflops:.3g} | {100 * share:.0f} %" if share else "- | -"
                step = 1e3 * BATCH_SIZE / speed
                lines.append(f"| `{model}`, {mode} | {speed:,.0f} | {step:.3g} | {known} |")
    return lines if len(lines) > 2 else []


def as_markdown(rows: list[dict], medians: dict, args, environment: dict) -> str:
    """speed.md: the targets, all medians, and where they were measured."""

    def number(value):
        if value is None:
            return "not measured"
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    words = {None: "", True: "met", False: "**missed**"}
    lines = ["| ratio | measured | target | |", "|---|---|---|---|"]
    lines += [f"| {r['what']} | {number(r['figure'])} | {r['target']} | {words[r['met']]} |"
              for r in rows]  # fmt: skip
    if trained := training_table(medians, args.precision):
        lines += ["", *trained]
    lines += [
        "",
        f"| images/s in training, ms/image in inference at batch {BATCH_SIZE}, ceilings in TFLOP/s "
        "| median |",
        "|---|---|",
    ]
    lines += [f"| {name} | {number(value)} |" for name, value in medians.items()]
    keys = ("device", "torch", "cuda", "driver", "python", "git_commit")
    known = ", ".join(f"{key} {environment[key]}" for key in keys if environment[key])
    width = "" if args.width == 64 else f"width {args.width} instead of 64; "
    return "\n".join([*lines, "", f"{width}medians over up to {args.rounds} rounds; {known}", ""])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings, device and precision resolved. Exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--peers", type=Path, help="folder of the reference scripts; default: none are measured")
    add("--data-dir", type=Path, default=Path("data"), help="default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--check", nargs="+", choices=MODELS, metavar="MODEL", default=[],
        help="run the self-check of these models in the mode that `auto` takes for the published "
        "recipe, nothing else; exit code 1 if one fails")  # fmt: skip
    add("--precision", default="auto", choices=["auto", *PRECISIONS],
        help="of the self-check; auto: as train.py has it")  # fmt: skip
    add("--short", action="store_true", help="on a GPU: leave out the 50 epochs of each model")
    add("--lenient", action="store_true", help="let no missed target be a failure")
    add("--width", type=int, default=64, help="channels of the first stage; default: %(default)s")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu or cuda")
    add("--out", type=Path, default=Path("results"), help="folder; default: %(default)s")
    add("--plan", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if min(args.rounds, args.width) < 1:
        parser.error("--rounds and --width must be at least 1")
    if args.peers and not (args.peers / "plain_loop.py").is_file():
        parser.error(f"--peers {args.peers}: there is no plain_loop.py")
    if args.peers and args.width != 64:
        parser.error("--peers are of width 64: leave --width out")
    if args.precision != "auto" and not args.check:
        parser.error("--precision is for --check: what is timed has the precisions of its table")
    args.precision = choose_precision(args.precision, device)
    if impossible := why_not("eager", args.precision, device):
        parser.error(impossible)
    return args


def main(argv: list[str] | None = None) -> int:
    """The script, with `argv` in place of the command line; the exit code."""
    args = parse(argv)
    try:
        if not args.plan:
            check_writable(args.out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    device = choose_device(args.device)
    environment = describe_environment(device)
    made_with = {key: environment[key] for key in ("device", "torch", "sha256")}
    found, failed = {}, []
    for name, command in jobs_of(args, device.type == "cuda").items():
        path = args.out / "speed" / f"{name.replace(' ', '_')}.json"
        if args.plan:
            print(shlex.join(command) + ("  # done" if path.exists() else ""))
            continue
        try:
            if kept := read_job(path, command, made_with):
                found[name] = kept
                continue
            print(f"{name} ...", end=" ", flush=True)
            found[name] = run_job(name, command)
            print(f"{found[name]['seconds']:.0f} s", flush=True)
            content = found[name] | {"made_with": made_with}
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        except (*FAILURES, subprocess.SubprocessError) as error:
            print(f"failed: {error}", flush=True)
            failed.append(name)
            if name.startswith("check") and not args.check:
                break  # figures of a wrong step are worth nothing
    if args.plan or args.check:
        return 1 if failed else 0

    medians = medians_of(found)
    fast = choose_mode("auto", device, STEPS)
    rows = check_targets(medians, GPU_TARGETS if device.type == "cuda" else CPU_TARGETS, fast)
    text = as_markdown(rows, medians, args, environment)
    content = {"environment": environment, "targets": rows, "medians": medians, "failed": failed}
    try:
        write_atomically(args.out / "speed.json", json.dumps(content, indent=1) + "\n")
        write_atomically(args.out / "speed.md", text)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    missed = any(row["met"] is False for row in rows) and not args.lenient
    return 1 if failed or missed else 0


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM):  # leaves with its child ended and no traceback
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    sys.exit(main())
