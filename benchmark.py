"""What a model costs: parameters, FLOPs, memory, and inference time in every mode.

    python benchmark.py                          # every model and mode, batch sizes 1 and 64
    python benchmark.py --models baseline se --modes eager --batch-sizes 64
    python benchmark.py --batch-sizes 1 64 1024 --out /tmp/sweep
    python benchmark.py --image 3x32x32 --classes 100       # for CIFAR-100
    python benchmark.py --like runs/cifar100/published/se/seed0         # shapes of a finished run
    python benchmark.py --train --models baseline se        # training steps against a plain loop's

Writes OUT/benchmark.json and a summary, OUT/benchmark.md, after each batch size and precision:
--keep resumes a stopped benchmark. Existing rows of other cases are kept. Batch size 64 takes four
minutes for all models on two CPU cores.

Inference is timed in evaluation mode with random weights, on float32 images already on the device:
no data loading, no preprocessing. The modes are those of kit/fast.py. `eager` in precision
`default` is as published (PyTorch's own flags: TF32 convolutions; fp32 on a CPU). The other modes
use the channels_last layout; compiled models have frozen weights and BatchNorm folded into the
convolutions. Times are medians over many batches after a warm-up, with the device synchronised
before and after each; compilation and graph capture are not timed. Models and modes take turns, so
a slowdown of the machine affects them all. If a mode's logits differ from those of eager fp32 by
more than TOLERANCE, it is left out and the exit code is 1.

--train writes OUT/benchmark_train.json and .md instead, after every turn: kit/training_speed.py.
"""

import argparse
import copy
import functools
import itertools
import re
import sys
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from kit import fast, training_speed
from kit.command_line import (
    UserError,
    exit_code,
    in_one_line,
    is_out_of_memory,
    make_parser,
    table,
)
from kit.environment import device_name, own_modules, source_hashes
from kit.files import check_writable, locked, write_atomically, write_json
from kit.preflight import choose_device, preflight
from kit.results import read_rows
from kit.runs import read_run
from kit.settings import number
from models import MODELS, build_model, count_parameters

import numpy as np
import thop
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

IMAGE = "1x28x28"  # channels, height, width, as published
CLASSES = 10
PRECISIONS = (fast.DEFAULT, *fast.PRECISIONS)
# Largest error of a logit, relative to the largest logit.
TOLERANCE = {"default": 2e-2, "fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}
REPEATS = {"cuda": (1000, 200), "cpu": (200, 10)}  # batch size 1 (enough for a p99), larger
SOURCES = ("models.py", "kit/attention.py", "kit/fast.py")  # editing one changes a model or mode
SETTING = ("device", "torch", "width", "image", "classes")  # what rows of one table share
# A row's key: a new row replaces the old one with the same key.
place = itemgetter(*SETTING, "batch_size", "precision", "model", "mode")
PERCENTILES = {"_p10": 10, "": 50, "_p90": 90, "_p99": 99}


def shape_of(image: str) -> tuple[int, int, int]:
    """(3, 32, 32) from "3x32x32". Raises ValueError (one line)."""
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", image, re.ASCII):
        raise ValueError(f"--image {image}: give channels x height x width, such as {IMAGE}")
    return tuple(map(int, image.split("x")))


@functools.cache
def count(name: str, width: int = 64, image: str = IMAGE, classes: int = CLASSES) -> dict[str, int]:
    """Parameters, and FLOPs per image by two conventions.

    `flops` is as published, 2 x thop's MACs: modules, including BatchNorm and pooling, but no
    functional calls. `flops_aten`: exact for convolutions and matrix products, nothing else.
    """
    model = build(name, width, image, classes)
    zeros = torch.zeros(1, *shape_of(image))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(zeros)
    macs, exact = thop.profile(model, (zeros,), verbose=False)[0], counter.get_total_flops()
    return {"params": count_parameters(model), "flops": round(2 * macs), "flops_aten": exact}


def build(name: str, width: int, image: str = IMAGE, classes: int = CLASSES) -> nn.Module:
    """The model in evaluation mode, with BatchNorms and all-zero parameters randomised.

    Initially BatchNorms are the identity, and CBAM's spatial gate and GC are constant: the logits
    would not reveal a mode that computes them wrongly.
    """
    model = build_model(name, classes, shape_of(image)[0], width, seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def prepare(case: dict, images: torch.Tensor) -> tuple[dict, Callable]:
    """(row of benchmark.json without times, function: images of this shape -> float32 logits).

    The function is compiled, captured and warmed up. Raises UserError if the logits are wrong, and
    whatever compilers and drivers raise. Peak memory: weights, activations and workspace of one
    batch in PyTorch's allocator; eager mode only, since compilation and capture need more.
    """
    mode, precision, device = case["mode"], case["precision"], images.device
    cuda, eager = device.type == "cuda", mode == "eager"
    shape = case["model"], case["width"], case["image"], case["classes"]
    model = build(*shape)
    fast.set_up_torch("fp32")
    expected = copy.deepcopy(model).to(device)(images)
    fast.set_up_torch(precision)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    model.to(device)
    if not eager:  # eager is as published: in PyTorch's default layout
        fast.channels_last(model)

    def forward(images):
        with fast.autocast(precision, device):
            return model(images).float()

    if "compile" in mode:
        forward = fast.compiled(forward, device, options={"freezing": True})
    if "graph" in mode:
        forward = fast.Graphed(forward, images)
    error = ((forward(images) - expected).abs().max() / expected.abs().max()).item()  # synchronises
    seconds = time.perf_counter() - start
    if not error <= TOLERANCE[precision]:
        raise UserError(f"logits differ from those of eager fp32, relative error {error:.1e}")
    for _ in range(10 if cuda else 2):
        forward(images)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if cuda and eager else None
    measured = {"logit_error": error, "peak_memory_mb": peak}
    measured["set_up_seconds"] = None if eager else seconds
    return case | count(*shape) | measured, forward


def seconds_per_call(function: Callable, argument: torch.Tensor) -> float:
    """Wall time of function(argument), synchronised before and after."""
    wait = torch.cuda.synchronize if argument.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    function(argument)
    wait()
    return time.perf_counter() - start


@torch.no_grad()
def measure(cases: list[dict], args: argparse.Namespace) -> tuple[list[dict], bool]:
    """(rows, whether anything failed) for one batch size and precision.

    Cases that do not run, run out of memory or give wrong logits are left out and named on stderr.
    """
    size, precision, repeats = (cases[0][key] for key in ("batch_size", "precision", "repeats"))
    about, bar = f"{precision}, batch {size}", functools.partial(tqdm, disable=None, leave=False)
    if not sys.stderr.isatty():  # where tqdm shows nothing
        print(about, flush=True)
    images = torch.rand(size, *shape_of(args.image), device=args.device)
    ready, failed = [], False
    for case in bar(cases, f"{about}: setting up"):
        try:
            ready.append((*prepare(case, images), []))
        except Exception as error:  # compilers and drivers can raise anything
            wrong = isinstance(error, UserError) or is_out_of_memory(error)
            if case["mode"] == "eager" and not wrong:
                raise  # eager mode uses neither: this is a bug
            kind = "error" if wrong else "note"
            line = f"{kind}: {case['model']}, mode {case['mode']}, {about} left out: "
            tqdm.write(line + in_one_line(error), file=sys.stderr)  # above the progress bar
            failed |= wrong
    fast.set_up_torch(precision)  # a failed case may have changed the flags
    for _ in bar(range(repeats), f"{about}: timing"):
        for _, forward, seconds in ready:
            seconds.append(seconds_per_call(forward, images))
    for row, _, seconds in ready:
        ms = 1e3 / size * np.array(seconds)
        row |= {f"ms_per_image{p}": float(np.percentile(ms, q)) for p, q in PERCENTILES.items()}
        row["images_per_second"] = 1e3 / row["ms_per_image"]
    return [row for row, *_ in ready], failed


def save(path: Path, rows: list[dict], markdown: Callable) -> str:
    """Writes PATH.json and a summary, PATH.md, which it returns."""
    write_json(path.with_suffix(".json"), rows)
    write_atomically(path.with_suffix(".md"), text := markdown(rows))
    return text


def order(row: dict) -> tuple:
    """Sort key in benchmark.json."""
    known = [*PRECISIONS, *MODELS, *fast.MODES]
    names = [row[key] for key in ("precision", "model", "mode")]
    ranks = [known.index(name) if name in known else len(known) for name in names]
    return [str(row[key]) for key in SETTING], row["batch_size"], ranks, names


def markdown(rows: list[dict]) -> str:
    """benchmark.md: a table per batch size and precision, with a line per model."""
    about = "{}, torch {}, width {}, images {}, {} classes.\n"
    costs, text, setting = itemgetter("model", "params", "flops_aten", "flops"), "", None
    for key, group in itertools.groupby(rows, itemgetter(*SETTING, "batch_size", "precision")):
        *here, size, precision = key
        if here != setting:
            text += "\n\n" * bool(text) + about.format(*here)
            setting = here
        models = {}  # (what all modes share) -> mode -> milliseconds
        for row in group:
            models.setdefault(costs(row), {})[row["mode"]] = row["ms_per_image"]
        base = next((times for (name, *_), times in models.items() if name == "baseline"), {})
        modes = [mode for mode in fast.MODES if any(mode in times for times in models.values())]
        lines = [["model", "parameters", "MFLOPs", "GFLOPs as published"]]
        lines[0] += [f"{mode}, ms/image" for mode in modes]
        for (name, params, exact, published), times in models.items():
            cells = {mode: f"{ms:#.3g}" for mode, ms in times.items()}
            for mode in times.keys() & base.keys():
                cells[mode] += f" ({times[mode] / base[mode]:.2f})"
            line = [f"`{name}`", f"{params:,}", f"{exact / 1e6:,.1f}", f"{published / 1e9:.2f}"]
            lines.append([*line, *(cells.get(mode, "-") for mode in modes)])
        text += f"\nBatches of {size}, {precision}; in brackets relative to the baseline:\n\n"
        text += table(lines)
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Settings with resolved device, modes and precisions. Exits with 2 on wrong usage."""
    parser = make_parser(__doc__)
    add, default, size = parser.add_argument, "default: %(default)s", number(int, 1, 1e9)
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help="or all")
    add("--train", action="store_true", help="time training steps, compared with a plain loop's")
    add("--batch-sizes", nargs="+", type=size, metavar="N", help="default: 1 64; with --train 64")
    add("--modes", nargs="+", choices=fast.MODES, metavar="MODE",
        help=f"of {', '.join(fast.MODES)}; default: all that the device can run")  # fmt: skip
    add("--precisions", nargs="+", choices=PRECISIONS, metavar="PRECISION",
        help=f"of {', '.join(PRECISIONS)}; default: fp32, on a GPU also default, bf16")  # fmt: skip
    add("--repeats", type=size,
        help="timed batches; default: 10 (GPU: 200), of one image 200 (1000); --train: turns, 7"
    )  # fmt: skip
    add("--width", type=size, default=64, help=f"channels of the first stage; {default}")
    add("--image", default=IMAGE, help=f"channels x height x width; {default}")
    add("--classes", type=size, default=CLASSES, help=default)
    add("--like", type=Path, metavar="RUN", help="these three from a finished run")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help=f"folder; {default}")
    add("--keep", action="store_true", help="skip what this code has measured here already")
    args = parser.parse_args(argv)
    try:
        if args.like:
            if (args.width, args.image, args.classes) != (64, IMAGE, CLASSES):
                parser.error("--like sets --width, --image and --classes: do not give both")
            run = read_run(args.like).result
            args.width, args.classes = run["width"], len(run["classes"])
            args.image = "x".join(map(str, run["image"]))
        args.device, _ = choose_device(args.device), shape_of(args.image)
    except ValueError as error:
        parser.error(str(error))
    args.batch_sizes = args.batch_sizes or ([64] if args.train else [1, 64])
    others = args.keep or (args.image, args.classes) != (IMAGE, CLASSES)
    if args.train and (others or fast.DEFAULT in (args.precisions or [])):
        parser.error("--train cannot have --keep, --image, --classes or the default precision")
    if not args.modes:
        args.modes = [mode for mode in fast.MODES if not fast.why_not(mode, "fp32", args.device)]
        if missing := fast.why_no_compiler(args.device):
            print(f"note: {missing}; compiled modes left out", file=sys.stderr)
            args.modes = [mode for mode in args.modes if "compile" not in mode]
    args.precisions = args.precisions or [
        precision
        for precision in (fast.PRECISIONS if args.train else (fast.DEFAULT, "fp32", "bf16"))
        if not fast.why_not("eager", precision, args.device)
        and (args.device.type, precision) != ("cpu", "bf16")  # slower on most, so only on request
    ]  # fmt: skip
    for mode, precision in itertools.product(args.modes, args.precisions):
        if impossible := fast.why_not(mode, precision, args.device):
            parser.error(impossible)
    return args


@exit_code
def main(argv: list[str] | None = None) -> int:
    """Runs the script with `argv` as its command line; the exit code."""
    args = parse(argv)
    check_writable(args.out)
    preflight(args.device, args.out)
    common = {"device": device_name(args.device), "torch": torch.__version__}
    common |= {"width": args.width, "image": args.image, "classes": args.classes}
    if args.train:
        common["sha256"] = source_hashes()
        for rows in training_speed.measure(args, common):
            with locked(args.out, "benchmark_train*"):
                text = save(args.out / "benchmark_train", rows, training_speed.markdown)
        print(text)
        return 0
    sources = (*SOURCES, *own_modules())
    common |= {"sha256": source_hashes(sources), "timed_by": source_hashes(["benchmark.py"])}
    axes = map(dict.fromkeys, (args.precisions, args.batch_sizes, args.models, args.modes))
    cases = [
        {"precision": precision, "batch_size": size, "model": model, "mode": mode}
        | common | {"repeats": args.repeats or REPEATS[args.device.type][size > 1]}
        for precision, size, model, mode in itertools.product(*axes)
    ]  # fmt: skip
    with locked(args.out, "benchmark*"):
        there, problems = read_rows(args.out / "benchmark.json")
        for problem in problems:  # its rows would be lost
            raise UserError(problem.words)
        rows, new, failed = sorted(there, key=order), 0, False
        if args.keep:  # skip what this code has measured as often
            cases = [c for c in cases if not any(c.items() <= row.items() for row in rows)]
        for _, group in itertools.groupby(cases, itemgetter("precision", "batch_size")):
            group = list(group)
            found, wrong = measure(group, args)
            failed, new = failed | wrong, new + len(found)
            again = set(map(place, group))  # a case that fails now loses its old row too
            rows = sorted([*found, *(r for r in rows if place(r) not in again)], key=order)
            save(args.out / "benchmark", rows, markdown)  # so that --keep can resume
        print(save(args.out / "benchmark", rows, markdown))
    print("MFLOPs: exact for convolutions and matrix products. GFLOPs: 2 x thop's MACs.")
    print(f"Written to {args.out / 'benchmark.json'}: {new} of {len(rows)} rows are new.")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
