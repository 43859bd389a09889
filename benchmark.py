"""What a model costs: parameters, FLOPs, inference time, throughput, memory.

    python benchmark.py                          # every model at batch 64
    python benchmark.py --models baseline se --batch-size 1 --out /tmp/latency

Prints a table and writes --out/benchmark.json.
Inference of float32 images 1 x 28 x 28 that are already on the device, in evaluation mode, random
weights: no data loading, no pre-processing. Each figure is the median over --repeats batches after
a warm-up, with p10 and p90, the device synchronised at both ends of each batch; the models take
turns, so a machine that slows down slows them all. About 30 s on two CPU cores.
"""

import argparse
import copy
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import thop
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from environment import choose_device, device_name, is_out_of_memory, source_hashes
from files import write_atomically
from models import MODELS, build_model, count_parameters

IMAGE = (1, 28, 28)  # channels, height, width
COLUMNS = "{:16s} {:>11s} {:>9s} {:>11s} {:>9s} {:>17s} {:>9s} {:>9s}"


def count_flops(model: nn.Module) -> tuple[int, int]:
    """(2 x the MACs that thop counts, FlopCounterMode's count) for one image.

    The first is the published convention: thop counts modules, BatchNorm and pooling among them,
    but nothing that is called as a function. FlopCounterMode counts every convolution and matrix
    product exactly, and nothing else. thop writes counters into what it profiles: it gets a copy.
    """
    model = copy.deepcopy(model).cpu().eval()
    image = torch.zeros(1, *IMAGE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    macs, _ = thop.profile(model, (image,), verbose=False)
    return round(2 * macs), counter.get_total_flops()


def set_up(name: str, width: int, images: torch.Tensor) -> tuple[nn.Module, float | None]:
    """The model on the device of `images`, warm, and its peak memory in MB (None on a CPU).

    Peak memory: weights, activations and workspace of one batch, as PyTorch's allocator saw them.
    """
    cuda = images.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
    model = build_model(name, in_channels=IMAGE[0], width=width, seed=0).to(images.device).eval()
    for _ in range(10 if cuda else 2):
        model(images)
    if not cuda:
        return model, None
    torch.cuda.synchronize(images.device)
    return model, (torch.cuda.max_memory_allocated(images.device) - before) / 1e6


def seconds_per_batch(model: nn.Module, images: torch.Tensor) -> float:
    """Wall time of one batch; work that was queued before is waited for first."""
    cuda = images.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    model(images)
    if cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(names: list[str], settings: dict, repeats: int, device) -> dict[str, dict]:
    """{model: its row of benchmark.json}."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    images = torch.rand(settings["batch_size"], *IMAGE, device=device)
    ready = {name: set_up(name, settings["width"], images) for name in names}
    seconds = {name: [] for name in names}
    for _ in range(repeats):
        for name, (model, _) in ready.items():
            seconds[name].append(seconds_per_batch(model, images))

    rows = {}
    for name, (model, peak_memory_mb) in ready.items():
        ms_per_image = 1e3 * np.array(seconds[name]) / settings["batch_size"]
        flops, flops_aten = count_flops(model)
        rows[name] = {
            "model": name,
            "params": count_parameters(model),
            "flops": flops,
            "flops_aten": flops_aten,
            **settings,
            "ms_per_image": float(np.median(ms_per_image)),
            "ms_per_image_p10": float(np.percentile(ms_per_image, 10)),
            "ms_per_image_p90": float(np.percentile(ms_per_image, 90)),
            "images_per_second": float(1e3 / np.median(ms_per_image)),
            "peak_memory_mb": peak_memory_mb,
            "repeats": repeats,
        }
    return rows


def rows_kept(path: Path, settings: dict) -> dict[str, dict]:
    """{model: row} of the rows in `path` that were measured with `settings`."""
    try:
        rows = json.loads(path.read_text())
        return {row["model"]: row for row in rows if settings.items() <= row.items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # nothing there that could be kept: everything is measured


def print_table(rows: list[dict]) -> None:
    print(
        COLUMNS.format(
            "model", "params", "params M", "MFLOPs", "GFLOPs", "ms/image", "images/s", "memory"
        )
    )
    for row in rows:
        memory = row["peak_memory_mb"]
        print(
            COLUMNS.format(
                row["model"],
                f"{row['params']:,}",
                f"{row['params'] / 1e6:.2f}",
                f"{row['flops_aten'] / 1e6:,.1f}",
                f"{row['flops'] / 1e9:.2f}",
                f"{row['ms_per_image']:.4f} "
                f"({row['ms_per_image_p10']:.3f}-{row['ms_per_image_p90']:.3f})",
                f"{row['images_per_second']:,.0f}",
                "-" if memory is None else f"{memory:,.0f} MB",
            )
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL",
        help="default: all")  # fmt: skip
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--repeats", type=int, help="timed batches a model; default: 200 on a GPU, 10 on a CPU")
    add("--width", type=int, default=64, help="channels of the first stage; default: %(default)s")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help="folder; default: %(default)s")
    add("--keep", action="store_true", help="keep rows that benchmark.json has of this device and "
        "these settings, measure the others")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    repeats = args.repeats if args.repeats is not None else 200 if device.type == "cuda" else 10
    if min(args.batch_size, repeats, args.width) < 1:
        parser.error("--batch-size, --repeats and --width must be at least 1")

    path = args.out / "benchmark.json"
    settings = {
        "batch_size": args.batch_size,
        "precision": "fp32",
        "mode": "eager",
        "device": device_name(device),
        "torch": torch.__version__,
        "width": args.width,
        "models_sha256": source_hashes()["models.py"],  # an edited model is another model
    }
    try:
        kept = rows_kept(path, settings) if args.keep else {}
        missing = [name for name in args.models if name not in kept]
        measured = measure(missing, settings, repeats, device) if missing else {}
        rows = [(kept | measured)[name] for name in MODELS if name in kept | measured]
        write_atomically(path, json.dumps(rows, indent=2) + "\n")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory on {device_name(device)} with --batch-size {args.batch_size} "
            f"and --width {args.width}: try a smaller one",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{device_name(device)}, torch {torch.__version__}, fp32, eager, batch {args.batch_size}: "
        f"median time (p10-p90)" + (f", kept: {', '.join(kept)}" if kept else "")
    )
    print_table(rows)
    print(f"MFLOPs: FlopCounterMode's exact count of convolutions and matrix products. GFLOPs: 2 x "
          f"thop's MACs, as published. Written to {path}")  # fmt: skip
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    sys.exit(main())
