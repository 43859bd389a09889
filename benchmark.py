"""What a model costs: parameters, FLOPs, memory, and inference time in every mode.

    python benchmark.py                          # every model and mode, batches of 1 and 64
    python benchmark.py --models baseline se --modes eager --batch-sizes 64
    python benchmark.py --batch-sizes 1 64 1024 --out /tmp/sweep
    python benchmark.py --image 3x32x32 --classes 100       # as for CIFAR-100

Prints tables and writes --out/benchmark.json, and the gist of it as --out/benchmark.md.
Inference of float32 images that are already on the device, in evaluation mode, random weights: no
data loading, no pre-processing. The modes are those of modes.py. `eager` is PyTorch as it stands,
in fp32 the published way; the others also use the channels_last layout, and compiled models have
frozen weights and BatchNorm folded into the convolutions.
Before a mode is timed, its logits are compared with those of eager fp32: exit code 1 if they differ
by more than TOLERANCE. Each figure is the median over many batches after a warm-up, the device
synchronised at both ends of each batch; models and modes take turns, so a machine that slows down
slows them all. Batches of 64 of all models take four minutes on two CPU cores. Each batch size and
precision is written when it is measured: after a stop, --keep goes on with what is missing.
"""

import argparse
import copy
import functools
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import thop
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from kit.environment import choose_device, device_name, is_out_of_memory, source_hashes
from kit.files import write_atomically
from models import MODELS, build_model, count_parameters
from kit.modes import (
    MODES,
    PRECISIONS,
    Graphed,
    autocast,
    compiled,
    first_line,
    set_up_torch,
    why_not,
)

IMAGE = "1x28x28"  # channels, height, width: as published
CLASSES = 10
# The largest error of a logit, relative to the largest logit of eager fp32.
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}
NUMBERS = (
    "batch_size", "params", "flops", "flops_aten", "ms_per_image", "ms_per_image_p10",
    "ms_per_image_p90", "ms_per_image_p99", "images_per_second", "tflops", "share_of_ceiling",
)  # fmt: skip


def shape_of(image: str) -> tuple[int, int, int]:
    """(3, 32, 32) of "3x32x32". Raises ValueError."""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}x[1-9]\d{0,3}", image, re.ASCII):
        raise ValueError(image)
    channels, height, width = map(int, image.split("x"))
    return channels, height, width


def count_flops(model: nn.Module, image: str = IMAGE) -> tuple[int, int]:
    """(2 x the MACs that thop counts, FlopCounterMode's count) for one image.

    The first is the published convention: thop counts modules, BatchNorm and pooling among them,
    but nothing that is called as a function. FlopCounterMode counts every convolution and matrix
    product exactly, and nothing else. thop writes counters into what it profiles: it gets a copy.
    """
    model = copy.deepcopy(model).cpu().eval()
    zeros = torch.zeros(1, *shape_of(image))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(zeros)
    macs, _ = thop.profile(model, (zeros,), verbose=False)
    return round(2 * macs), counter.get_total_flops()


@functools.cache
def size_of(name: str, width: int, image: str, classes: int) -> dict[str, int]:
    """Parameters and FLOPs of a model."""
    model = build(name, width, image, classes)
    flops, flops_aten = count_flops(model, image)
    return {"params": count_parameters(model), "flops": flops, "flops_aten": flops_aten}


def build(name: str, width: int, image: str = IMAGE, classes: int = CLASSES) -> nn.Module:
    """The model in evaluation mode, its BatchNorms and what starts at 0 as if trained.

    As they start they pass on what they get, and stop CBAM's spatial gate and all of GC: a mode
    that got them wrong would go unseen.
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


def make_forward(model: nn.Module, mode: str, precision: str, images: torch.Tensor) -> Callable:
    """images -> float32 logits in a mode and precision, of images of this shape only."""
    if mode != "eager":  # eager is as published, in the layout that PyTorch has by default
        model = model.to(memory_format=torch.channels_last)

    def forward(images):
        with autocast(precision, images.device):
            return model(images).float()

    if "compile" in mode:
        forward = compiled(forward, options={"freezing": True})
    return Graphed(forward, images) if "graph" in mode else forward


def set_up(model: nn.Module, mode: str, precision: str, images: torch.Tensor) -> dict:
    """The forward pass, warm, and what was found on the way.

    Peak memory: weights, activations and workspace of one batch, as PyTorch's allocator saw them.
    Of eager mode alone: that of compiling and capturing is another matter.
    """
    cuda = images.device.type == "cuda"
    set_up_torch("fp32")
    expected = copy.deepcopy(model).to(images.device)(images)
    set_up_torch(precision)
    if cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
    model = model.to(images.device)
    start = time.perf_counter()
    forward = make_forward(model, mode, precision, images)
    error = (forward(images) - expected).abs().max() / expected.abs().max()
    error = error.item()  # waits
    seconds = time.perf_counter() - start
    for _ in range(10 if cuda else 2):
        forward(images)
    peak = None
    if cuda and mode == "eager":
        peak = (torch.cuda.max_memory_allocated(images.device) - before) / 1e6
    return {
        "forward": forward,
        "logit_error": error,
        "set_up_seconds": None if mode == "eager" else seconds,
        "peak_memory_mb": peak,
    }


def seconds_per_call(function: Callable, argument: torch.Tensor) -> float:
    """Wall time of function(argument); work that was queued before is waited for first."""
    cuda = argument.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(argument.device)
    start = time.perf_counter()
    function(argument)
    if cuda:
        torch.cuda.synchronize(argument.device)
    return time.perf_counter() - start


@torch.no_grad()
def ceiling_tflops(precision: str, device: torch.device) -> float:
    """What the device reaches at most: the better of a large matrix product and convolution.

    (Of the two, because PyTorch's matrix product is slow on some CPUs.)
    """
    set_up_torch(precision)
    n, images, channels, size = (8192 if device.type == "cuda" else 2048), 16, 256, 14
    images *= 64 if device.type == "cuda" else 1
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.randn(n, n, dtype=dtype, device=device)
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=dtype, device=device)
    maps = torch.randn(images, channels, size, size, dtype=dtype, device=device)
    layer, maps = (x.to(memory_format=torch.channels_last) for x in (layer, maps))
    product = [seconds_per_call(lambda m: m @ m, matrix) for _ in range(13)]
    convolution = [seconds_per_call(layer, maps) for _ in range(13)]
    return max(
        2 * n**3 / min(product),
        2 * 9 * channels**2 * images * size**2 / min(convolution),
    ) / 1e12  # fmt: skip


@torch.no_grad()
def measure(
    variants: list[tuple[str, str]], settings: dict, repeats: int, ceiling: float, device
) -> list[dict]:
    """The rows of benchmark.json of all (model, mode) in `variants`, at one batch size.

    A mode that does not run here is left out, with a note on stderr.
    """
    shape = {key: settings[key] for key in ("width", "image", "classes")}
    images = torch.rand(settings["batch_size"], *shape_of(settings["image"]), device=device)
    ready = {}
    for name, mode in variants:
        try:
            model = build(name, **shape)
            ready[name, mode] = set_up(model, mode, settings["precision"], images)
        except Exception as error:  # compilers and drivers raise what they like
            if mode == "eager" or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
                raise  # eager mode has neither: it would be a bug
            print(f"note: {name}, mode {mode} left out: {first_line(error)}", file=sys.stderr)

    seconds = {variant: [] for variant in ready}
    for _ in range(repeats):
        for variant, found in ready.items():
            seconds[variant].append(seconds_per_call(found["forward"], images))

    rows = []
    for (name, mode), found in ready.items():
        ms_per_image = 1e3 * np.array(seconds[name, mode]) / settings["batch_size"]
        size = size_of(name, **shape)
        images_per_second = float(1e3 / np.median(ms_per_image))
        tflops = size["flops_aten"] * images_per_second / 1e12
        rows.append({
            "model": name,
            "mode": mode,
            **size,
            **settings,
            "ms_per_image": float(np.median(ms_per_image)),
            "ms_per_image_p10": float(np.percentile(ms_per_image, 10)),
            "ms_per_image_p90": float(np.percentile(ms_per_image, 90)),
            "ms_per_image_p99": float(np.percentile(ms_per_image, 99)),
            "images_per_second": images_per_second,
            "tflops": tflops,
            "share_of_ceiling": tflops / ceiling,
            **{key: value for key, value in found.items() if key != "forward"},
            "repeats": repeats,
        })  # fmt: skip
    return rows


def rows_kept(path: Path, settings: dict) -> list[dict]:
    """The rows in `path` that were measured with `settings`."""
    try:
        rows = [row for row in json.loads(path.read_text()) if is_whole(row)]
        return [row for row in rows if settings.items() <= row.items()]
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return []  # nothing there that could be kept: everything is measured


def is_whole(row: dict) -> bool:
    """Whether the tables can be made of it. Raises KeyError or TypeError if it is far from that."""
    numbers = [row[key] for key in NUMBERS]
    place_of(row)  # raises ValueError for a name of another version
    return all(isinstance(number, (int, float)) for number in numbers)


def key_of(row: dict) -> tuple:
    return row["batch_size"], row["precision"], row["model"], row["mode"]


def place_of(row: dict) -> tuple:
    """Its place in the table."""
    size, precision, model, mode = key_of(row)
    order = (PRECISIONS.index(precision), list(MODELS).index(model), MODES.index(mode))
    return size, *order


def default_repeats(batch_size: int, device: torch.device) -> int:
    """Enough of single images for the p99 of their latency."""
    if device.type == "cuda":
        return 1000 if batch_size == 1 else 200
    return 200 if batch_size == 1 else 10


def print_tables(rows: list[dict]) -> None:
    """A line a model with its size, then a line a row; times in ms per image."""
    print(f"\n{'model':19s} {'parameters':>11s} {'MFLOPs':>9s} {'GFLOPs as published':>20s}")
    for row in {row["model"]: row for row in rows}.values():
        print(f"{row['model']:19s} {row['params']:11,} {row['flops_aten'] / 1e6:9,.1f} "
              f"{row['flops'] / 1e9:20.2f}")  # fmt: skip
    columns = "{:>5s} {:9s} {:19s} {:13s} {:>9s} {:>15s} {:>8s} {:>9s} {:>8s} {:>9s} {:>8s} {:>7s}"
    print("\n" + columns.format(
        "batch", "precision", "model", "mode", "ms/image", "p10-p90", "p99", "images/s", "TFLOP/s",
        "share", "memory", "set-up",
    ))  # fmt: skip
    for row in rows:
        memory, set_up_seconds = row["peak_memory_mb"], row["set_up_seconds"]
        print(columns.format(
            str(row["batch_size"]), row["precision"], row["model"], row["mode"],
            f"{row['ms_per_image']:.4f}",
            f"{row['ms_per_image_p10']:.4f}-{row['ms_per_image_p90']:.4f}",
            f"{row['ms_per_image_p99']:.4f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['tflops']:.3f}",
            f"{100 * row['share_of_ceiling']:.0f} %",
            "-" if memory is None else f"{memory:,.0f} MB",
            "-" if set_up_seconds is None else f"{set_up_seconds:.1f} s",
        ))  # fmt: skip


def markdown(rows: list[dict]) -> str:
    """benchmark.md: for each batch size and precision a line a model, times beside the baseline."""
    lines = [
        f"{rows[0]['device']}, torch {rows[0]['torch']}, width {rows[0]['width']}, images "
        f"{rows[0]['image']}, {rows[0]['classes']} classes."
    ]
    for size, precision in sorted({(row["batch_size"], row["precision"]) for row in rows}):
        times = {
            (row["model"], row["mode"]): row
            for row in rows
            if (row["batch_size"], row["precision"]) == (size, precision)
        }
        modes = [mode for mode in MODES if any(mode == m for _, m in times)]
        columns = ["model", "parameters", "MFLOPs", "GFLOPs as published"]
        columns += [f"{mode}, ms/image" for mode in modes]
        lines += [
            "",
            f"Batches of {size}, {precision}; in brackets beside the baseline:",
            "",
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
        ]
        for model in dict.fromkeys(model for model, _ in times):
            row = next(row for (name, _), row in times.items() if name == model)
            cells = [f"`{model}`", f"{row['params']:,}", f"{row['flops_aten'] / 1e6:,.1f}"]
            cells.append(f"{row['flops'] / 1e9:.2f}")
            for mode in modes:
                ms, of_baseline = (
                    times.get((name, mode), {}).get("ms_per_image") for name in (model, "baseline")
                )
                ratio = f" ({ms / of_baseline:.2f})" if ms and of_baseline else ""
                cells.append(f"{ms:#.3g}{ratio}" if ms else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(path: Path, rows: Iterable[dict]) -> list[dict]:
    """Writes benchmark.json and benchmark.md; the rows, sorted. Raises OSError."""
    rows = sorted(rows, key=place_of)
    write_atomically(path, json.dumps(rows, indent=2) + "\n")
    if rows:
        write_atomically(path.with_suffix(".md"), markdown(rows))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings; device, modes and precisions as they are to be measured. Exits with 2."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL",
        help="default: all")  # fmt: skip
    add("--batch-sizes", nargs="+", type=int, default=[1, 64], metavar="N", help="default: 1 64")
    add("--modes", nargs="+", choices=MODES, metavar="MODE",
        help=f"of {', '.join(MODES)}; default: all that the device can run")  # fmt: skip
    add("--precisions", nargs="+", choices=PRECISIONS, metavar="PRECISION",
        help=f"of {', '.join(PRECISIONS)}; default: fp32, and bf16 on a GPU")  # fmt: skip
    add("--repeats", type=int, help="timed batches a row; default: 200, or 1000 of one image, on a "
        "GPU; 10, or 200 of one image, on a CPU")  # fmt: skip
    add("--width", type=int, default=64, help="channels of the first stage; default: %(default)s")
    add("--image", default=IMAGE, help="channels x height x width; default: %(default)s")
    add("--classes", type=int, default=CLASSES, help="default: %(default)s")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help="folder; default: %(default)s")
    add("--keep", action="store_true", help="keep rows that benchmark.json has of this device, "
        "torch, width and models.py, measure the others")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    args.modes = args.modes or [mode for mode in MODES if not why_not(mode, "fp32", args.device)]
    fast = ["bf16"] if args.device.type == "cuda" else []
    args.precisions = args.precisions or ["fp32", *fast]
    for mode in args.modes:
        for precision in args.precisions:
            if impossible := why_not(mode, precision, args.device):
                parser.error(impossible)
    if max(args.batch_sizes) > 10**9:
        parser.error("--batch-sizes must be at most 10^9")
    numbers = (*args.batch_sizes, args.width, args.classes, args.repeats or 1)
    if min(numbers) < 1 or args.repeats == 0:
        parser.error("--batch-sizes, --repeats, --width and --classes must be at least 1")
    try:
        shape_of(args.image)
    except ValueError:
        parser.error(f"--image {args.image}: give channels x height x width, such as {IMAGE}")
    return args


def measure_all(args: argparse.Namespace) -> tuple[list[dict], list[str], int]:
    """(all rows of benchmark.json, what was left out and why, how many were kept).

    Writes benchmark.json after each precision and batch size. Raises OSError.
    """
    path, device = args.out / "benchmark.json", args.device
    common = {
        "device": device_name(device),
        "torch": torch.__version__,
        "width": args.width,
        "image": args.image,
        "classes": args.classes,
        # An edited model is another model, an edited mode another mode.
        "models_sha256": source_hashes()["models.py"],
        "attention_sha256": source_hashes()["attention.py"],
        "modes_sha256": source_hashes()["modes.py"],
    }
    rows = {key_of(row): row for row in rows_kept(path, common)} if args.keep else {}
    kept, left_out = len(rows), []
    missing = {
        (precision, size): [
            (name, mode)
            for name in args.models
            for mode in args.modes
            if (size, precision, name, mode) not in rows
        ]
        for precision in args.precisions
        for size in args.batch_sizes
    }
    to_measure = {precision for (precision, _), variants in missing.items() if variants}
    # All of them now, before compilers are at work.
    ceilings = {precision: ceiling_tflops(precision, device) for precision in to_measure}
    for (precision, size), variants in missing.items():
        if variants:
            settings = common | {"batch_size": size, "precision": precision}
            repeats = args.repeats or default_repeats(size, device)
            try:
                measured = measure(variants, settings, repeats, ceilings[precision], device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                left_out.append(
                    f"out of memory on {device_name(device)} with --batch-sizes {size} and --width "
                    f"{args.width}, {precision}: try a smaller one"
                )
                continue
            for row in measured:
                if row["logit_error"] <= TOLERANCE[precision]:
                    rows[key_of(row)] = row
                else:
                    left_out.append(
                        f"{row['model']}, mode {row['mode']}, {precision}, batch {size}: logits "
                        f"differ from those of eager fp32 by {row['logit_error']:.1e}, relatively; "
                        "left out"
                    )
            write(path, rows.values())
    return write(path, rows.values()), left_out, kept


def main(argv: list[str] | None = None) -> int:
    """The script, with `argv` in place of the command line; the exit code."""
    args = parse(argv)
    try:
        rows, left_out, kept = measure_all(args)
    except torch.OutOfMemoryError:  # before anything is measured
        print(f"error: out of memory on {device_name(args.device)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{device_name(args.device)}, torch {torch.__version__}; medians"
        + (f"; {kept} rows kept" if kept else "")
    )
    print_tables(rows)
    print(
        "\nMFLOPs: convolutions and matrix products, exactly. GFLOPs: 2 x thop's MACs. TFLOP/s: "
        "MFLOPs x images/s.\nShare: of what one large product or convolution reaches here. Set-up: "
        f"compiling, capturing, first call.\nWritten to {args.out / 'benchmark.json'}"
    )
    for what in left_out:
        print(f"error: {what}", file=sys.stderr)
    return 1 if left_out or not rows else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    sys.exit(main())
