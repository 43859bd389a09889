"""How fast it is, and how much faster than the usual ways: everything in one run, as ratios.

    python speed.py                               # this project's modes against each other
    python speed.py --peers DIR --data-dir DATA   # and beside the yardsticks in DIR

The yardsticks are scripts that do the same work as most people run it: plain_loop.py (torchvision's
ResNet-18, PIL transforms in a DataLoader, eager float32, `.item()` every step), lightning_loop.py
(the same in PyTorch Lightning, needs lightning) and timm_inference.py (timm's models, needs timm).

Each step is a process of its own and leaves OUT/speed/<step>.json: stop it at any time, and the
same command goes on with what is missing. Rounds take turns, the table has medians over them. On a
CPU: training of 960 images an epoch, and inference; about 15 minutes. On a GPU: whole epochs, the
self-check, 50 epochs of each published model from start to end, and a sweep of batch sizes.
Writes OUT/speed.json, OUT/benchmark.json and OUT/speed.md. Exit code 1 if a step failed or a target
was missed.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from environment import choose_device, describe_environment
from files import write_atomically
from training_step import COMPILE_PAYS_FROM, choose_mode

PUBLISHED = ("baseline", "se", "cbam_blocks", "cbam_classifier")
TIMM = {"baseline": "none", "se": "se", "cbam_blocks": "cbam"}  # the same model there


def steps_of(args, device: torch.device) -> list[tuple[str, list[str]]]:
    """(name, command) of every step, what matters most first. OUT/speed/<name>.json is its result.

    A name's first part says how its output is read, its last is the round.
    """
    cuda = device.type == "cuda"
    here, runs = [sys.executable], ["--runs", args.out / "speed" / "runs", "--overwrite"]
    data = ["--data-dir", args.data_dir]
    train = [*here, "train.py", *data, *runs, "--device", args.device, "--patience", "1000"]
    short = ["--epochs", "4"] if cuda else ["--epochs", "3", "--limit-train", "960"]
    short += [] if cuda else ["--limit-test", "100"]
    modes = ["eager", "graph", "compile+graph"] if cuda else ["eager", "compile"]
    raw = args.data_dir / "FashionMNIST" / "raw"
    raw = raw if raw.is_dir() else args.data_dir
    steps = []
    if cuda:
        steps.append(("check.0", [*here, "train.py", "--self-check", "--device", args.device]))
    for i in range(args.rounds):
        for model in ("baseline", "cbam_blocks") if cuda else ("baseline",):
            for mode in modes:
                command = [*train, *short, "--model", model, "--mode", mode]
                steps.append((f"train.{model}.{mode}.{i}", command))
        if cuda:
            command = [*train, *short, "--model", "baseline", "--mode", "eager"]
            steps.append((f"train.baseline.eager-fp32.{i}", [*command, "--precision", "fp32"]))
        if args.peers:
            peer = [*here, args.peers / "plain_loop.py", "--data", raw, "--epochs", "3"]
            peer += ["--device", device.type] if cuda else ["--device", "cpu", "--limit", "960"]
            for workers in ("0", "8") if cuda else ("0",):
                steps.append((f"peer.plain.{workers}.{i}", [*peer, "--workers", workers]))
            if cuda:
                peer = [*here, args.peers / "lightning_loop.py", "--data", raw, "--epochs", "3"]
                steps.append((f"peer.lightning.8.{i}", [*peer, "--workers", "8"]))
        sizes = ["1", "64", "1024"] if cuda and i == 0 else ["64"]
        bench = [*here, "benchmark.py", "--models", *PUBLISHED, "--device", args.device]
        bench += ["--batch-sizes", *sizes, "--out", args.out / "speed" / f"inference.{i}"]
        steps.append((f"inference.{i}", bench))
        if args.peers:
            peer = [*here, args.peers / "timm_inference.py", "--device", device.type]
            steps.append((f"peer.timm.fp32.{i}", peer))
            if cuda:
                compiled = [*peer, "--precision", "bf16", "--compile"]
                steps.append((f"peer.timm.bf16-compiled.{i}", compiled))
        if cuda and i == 0:
            for model in PUBLISHED:
                steps.append((f"whole.{model}.0", [*train, "--model", model]))
    return [(name, [str(word) for word in command]) for name, command in steps]


def run_step(name: str, command: list[str], out: Path) -> dict:
    """Runs it and returns what it measured. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"exit code {done.returncode}: {last}")
    found = {"command": command, "seconds": seconds}
    kind = name.split(".")[0]
    if kind in ("train", "whole"):
        folder = next((out / "speed" / "runs").glob("*/*/*/seed0"))
        result = json.loads((folder / "result.json").read_text())
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        speeds = [row["images_per_second"] for row in epochs[1:]]  # the first one warms up
        found |= {"images_per_second": median(speeds), "result": result}
        shutil.rmtree(out / "speed" / "runs")
    elif kind == "peer":
        found["lines"] = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    elif kind == "inference":
        found["rows"] = json.loads((out / "speed" / name / "benchmark.json").read_text())
    elif kind == "check":
        found["lines"] = done.stdout.splitlines()
    return found


# --- The table ------------------------------------------------------------------------------------


class Figures:
    """Medians over the rounds of what the steps measured; None where a step is missing."""

    def __init__(self, found: dict[str, dict]):
        self.found = found

    def over_rounds(self, name: str, value) -> float | None:
        values = [value(f) for key, f in self.found.items() if key.rpartition(".")[0] == name]
        return median(values) if values else None

    def training(self, model: str, mode: str) -> float | None:
        return self.over_rounds(f"train.{model}.{mode}", lambda f: f["images_per_second"])

    def plain(self, workers: int) -> float | None:
        name = f"peer.plain.{workers}"
        return self.over_rounds(name, lambda f: f["lines"][-1]["train_images_per_second"])

    def lightning(self) -> float | None:
        name = "images_per_second_with_validation"
        return self.over_rounds("peer.lightning.8", lambda f: f["lines"][-1][name])

    def timm(self, variant: str, model: str) -> float | None:
        def value(f):
            return next(x for x in f["lines"] if x["attention"] == TIMM[model])["ms_per_image"]

        return self.over_rounds(f"peer.timm.{variant}", value)

    def inference(self, model: str, mode: str, precision: str) -> float | None:
        wanted = {"model": model, "mode": mode, "precision": precision, "batch_size": 64}

        def value(f):
            rows = [row for row in f["rows"] if wanted.items() <= row.items()]
            return rows[0]["ms_per_image"] if rows else float("inf")

        return self.over_rounds("inference", value)

    def whole(self, model: str) -> float | None:
        return self.over_rounds(f"whole.{model}", lambda f: f["seconds"])


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def table_of(figures: Figures, cuda: bool, mode: str) -> list[dict]:
    """Rows of {"what", "figure", "least" or "most"}, the targets; `mode`: the fast one."""
    f = figures
    if not cuda:
        modes = ("eager", "compile")
        fastest = max(f.training("baseline", mode) or 0.0 for mode in modes) or None
        rows = [
            row("training, images/s, baseline, eager", f.training("baseline", "eager")),
            row("training, images/s, baseline, compile", f.training("baseline", "compile")),
            row("training, images/s, plain loop", f.plain(0)),
            row("training, fastest mode / plain loop", ratio(fastest, f.plain(0)), least=1.1),
        ]
        for model in TIMM:
            times = [f.inference(model, mode, "fp32") for mode in modes]
            best = min((t for t in times if t), default=None)
            rows += [
                row(f"inference, ms/image, {model}, eager", times[0]),
                row(f"inference, ms/image, {model}, compile", times[1]),
                row(f"inference, ms/image, timm {TIMM[model]}", f.timm("fp32", model)),
                row(f"inference, timm / fastest mode, {model}",
                    ratio(f.timm("fp32", model), best), least=1.15),
            ]  # fmt: skip
        return rows

    fast = f.training("baseline", mode)
    wholes = [f.whole(model) for model in PUBLISHED]
    rows = [
        row(f"training, images/s, {model}, {m}", f.training(model, m))
        for model in ("baseline", "cbam_blocks")
        for m in ("eager-fp32", "eager", "graph", "compile+graph")
        if f.training(model, m)
    ]
    cbam = f.inference("cbam_blocks", "compile+graph", "bf16")
    base = f.inference("baseline", "compile+graph", "bf16")
    rows += [
        row("training, images/s, plain loop, 0 workers", f.plain(0)),
        row("training, images/s, plain loop, 8 workers", f.plain(8)),
        row("training, images/s, Lightning, 8 workers, with validation", f.lightning()),
        row("training / plain loop, 0 workers", ratio(fast, f.plain(0)), least=10),
        row("training / plain loop, 8 workers", ratio(fast, f.plain(8)), least=4),
        row("training / Lightning, 8 workers", ratio(fast, f.lightning()), least=4),
        row(f"training, images/s, baseline, {mode}", fast, least=45_000),
        row("50 epochs of baseline from start to end, s", wholes[0], most=70),
        row("50 epochs of all four models from start to end, s",
            sum(wholes) if all(wholes) else None, most=360),
        row(f"training step time, cbam_blocks / baseline, {mode}",
            ratio(fast, f.training("cbam_blocks", mode)), most=1.4),
        row("inference, ms/image, baseline, eager fp32", f.inference("baseline", "eager", "fp32")),
        row("inference, ms/image, baseline, fast", base, most=0.006),
        row("inference time, cbam_blocks / baseline, fast", ratio(cbam, base), most=1.3),
        row("inference, timm eager fp32 / fast, cbam",
            ratio(f.timm("fp32", "cbam_blocks"), cbam), least=4),
        row("inference, timm compiled bf16 / fast, cbam",
            ratio(f.timm("bf16-compiled", "cbam_blocks"), cbam), least=1.1),
    ]  # fmt: skip
    return rows


def row(what: str, figure: float | None, **target: float) -> dict:
    """`target`: least=... or most=..."""
    met = None
    if target and figure is not None:
        met = figure >= target["least"] if "least" in target else figure <= target["most"]
    return {"what": what, "figure": figure, **target, "met": met}


def as_markdown(rows: list[dict], environment: dict) -> str:
    lines = ["| what | figure | target | |", "|---|---|---|---|"]
    for r in rows:
        figure = "not measured" if r["figure"] is None else f"{r['figure']:,.4g}"
        if r["figure"] is not None and r["figure"] >= 1000:
            figure = f"{r['figure']:,.0f}"
        target = f"at least {r['least']:,g}" if "least" in r else ""
        target = f"at most {r['most']:,g}" if "most" in r else target
        met = {None: "", True: "met", False: "missed"}[r["met"]]
        lines.append(f"| {r['what']} | {figure} | {target} | {met} |")
    what = ("device", "torch", "cuda", "driver", "python", "git_commit")
    known = ", ".join(f"{key} {environment[key]}" for key in what if environment[key])
    return "\n".join([*lines, "", known, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--peers", type=Path, help="folder of the yardsticks; default: none are measured")
    add("--data-dir", type=Path, default=Path("data"), help="default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu or cuda")
    add("--out", type=Path, default=Path("results"), help="folder; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.peers and not (args.peers / "plain_loop.py").is_file():
        parser.error(f"--peers {args.peers}: there is no plain_loop.py")

    found, failed = {}, []
    for name, command in steps_of(args, device):
        path = args.out / "speed" / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
            continue
        print(f"{name} ...", end=" ", flush=True)
        try:
            found[name] = run_step(name, command, args.out)
        except (RuntimeError, OSError, ValueError, LookupError, StopIteration) as error:
            print(f"failed: {error}", flush=True)
            failed.append(name)
            if name.startswith("check"):
                break  # figures of a wrong step are worth nothing
            continue
        print(f"{found[name]['seconds']:.0f} s", flush=True)
        write_atomically(path, json.dumps(found[name], indent=1) + "\n")

    cuda = device.type == "cuda"
    environment = describe_environment(device)
    fast_mode = choose_mode("auto", device, 10 * COMPILE_PAYS_FROM[device.type])
    rows = table_of(Figures(found), cuda, fast_mode)
    text = as_markdown(rows, environment)
    content = {"environment": environment, "table": rows, "failed": failed, "steps": found}
    write_atomically(args.out / "speed.json", json.dumps(content, indent=1) + "\n")
    write_atomically(args.out / "speed.md", text)
    print(text)
    return 1 if failed or any(r["met"] is False for r in rows) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    sys.exit(main())
