"""What a trained model looks at: Grad-CAM, its gates, and their effect on accuracy.

    python explain.py --run runs/fashion_mnist/published/se/seed0
    python explain.py --checkpoint PATH/best.pt --images 3 17 42
    python explain.py --compare RUN RUN RUN           # also compares models on the same images

Writes explain.json and explain.png into each run's folder, where report.py finds them; --compare
also writes OUT/explain_compare.png. The pictures show Grad-CAM of the predicted class and spatial
gates for --images (by default, per class, the first image that the first model classifies correctly
and the first that it misclassifies), and each channel's mean gate by class. Takes half a minute for
a full-width model on two CPU cores. The data folder named in config.json is only read.

Numbers, over --limit-test images: mean, spread and saturation of the gates, and the accuracy with
every gate replaced by its mean over the images (gate ablation). A run is explained with its own
weights and images, and refused if too many predictions differ from those it saved.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

import data
from kit import attribution, checkpoint
from kit.command_line import UserError, exit_code, in_one_line, make_parser, noted
from kit.fast import channels_last, set_up_torch
from kit.files import check_writable, write_json
from kit.pictures import Explained, draw_comparison, draw_model, rgb
from kit.plots import legible
from kit.preflight import choose_device, preflight
from kit.runs import FinishedRun, lock, read_run
from models import build_model

import torch
import torch.nn as nn
from tqdm import tqdm

CLASSES_SHOWN = 10
TOLERANCE = 0.01  # share of predictions that rounding may change: a run may have used bfloat16


def read_finished(folder: Path) -> FinishedRun:
    """The finished run in `folder`. Raises UserError."""
    try:
        return read_run(folder)
    except ValueError as error:
        reason = in_one_line(error)
        raise UserError(f"{folder} is not the folder of a finished run ({reason})") from None


def load_dataset(runs: list[FinishedRun], args) -> tuple[data.ImageData, torch.Tensor]:
    """(the runs' common data set, indices of the test images to use). Raises UserError."""
    config = runs[0].config
    name, folder = args.dataset or config["dataset"], args.data_dir or Path(config["data_dir"])
    try:
        # A config.json may name any folder: write nothing there.
        dataset = data.load_dataset(
            name, folder, config.get("image_size"), fetch=bool(args.data_dir)
        )
    except UserError as error:
        raise UserError(f"{error}; if the images moved, use --dataset and --data-dir") from None
    for run in runs:
        if run.config["data"] != dataset.digest:
            raise UserError(f"{run.folder} was not trained on the images and labels of {name}")
    n = min(args.limit_test, *(run.result["test_images"] for run in runs))
    return dataset, data.stratified(dataset.test_labels, n)


def load_model(run: FinishedRun, dataset: data.ImageData) -> nn.Module:
    """The model with its tested weights. Raises UserError."""
    config, path = run.config, run.folder / "best.pt"
    shape = len(dataset.classes), dataset.test_images.shape[1], config["width"]
    try:
        place = config.get("position"), config.get("reduction")
        model = build_model(config["base_model"], *shape, None, *place)
        model.load_state_dict(checkpoint.load(path))
    except Exception as error:  # damaged files can raise anything
        raise UserError(
            f"{path} does not load as {config['model']} ({in_one_line(error)}): restore the "
            "code that it was trained with, or train it again with --overwrite (Git has no weights)"
        ) from None
    return channels_last(model).eval()


def check_predictions(run: FinishedRun, dataset, idx, predictions) -> None:
    """Raises UserError if `predictions` of `idx` differ from the run's beyond TOLERANCE."""
    if run.predictions is None:
        note = "has no test_predictions.npy to compare with"
        return print(f"note: {run.folder} {note}", file=sys.stderr)
    own = data.stratified(dataset.test_labels, run.result["test_images"])
    differ = (run.predictions[torch.searchsorted(own, idx)] != predictions.cpu().numpy()).sum()
    if differ > max(1, TOLERANCE * len(idx)):
        raise UserError(
            f"{run.folder}: {differ:,} of {len(idx):,} predictions differ from the run's: "
            "weights, code or images have changed since it was trained, or the model is random"
        )
    if differ:
        print(f"note: {run.folder}: {differ:,} of {len(idx):,} predictions differ", file=sys.stderr)


def explain(run: FinishedRun, dataset: data.ImageData, idx, images: list[int] | None, device):
    """(content of explain.json, of its picture) over test images `idx`; images: those to draw.
    Raises UserError."""
    model = load_model(run, dataset).to(device)
    mean_and_std = dataset.mean_and_std(run.config.get("normalize"), device)

    def normalized(idx):
        return data.normalize(dataset.test_images[idx].to(device), *mean_and_std)

    labels, batch = dataset.test_labels[idx].to(device), normalized(idx)
    probabilities, gates, means = attribution.gates_of(model, batch)
    if not probabilities.isfinite().all():
        raise UserError(f"{run.folder}: the model outputs NaN or infinity")
    if unknown := len(attribution.attention_modules(model).keys() - means.keys()):
        what = f"{unknown} modules do not gate their input"
        print(f"note: {run.result['model']}: {what}: nothing is said of them", file=sys.stderr)
    predictions = probabilities.argmax(1)
    check_predictions(run, dataset, idx, predictions)
    right = predictions == labels
    images = images or idx[chosen(labels, right)].tolist()
    ablated = attribution.replaced(model, means)  # do the gates carry accuracy?
    fixed = attribution.predict(ablated, batch).argmax(1) == labels if means else right
    numbers = {
        "test_images": len(labels),
        "test_acc": 100 * right.double().mean().item(),
        "test_acc_gates_fixed": 100 * fixed.double().mean().item() if means else None,
        "lost": (right & ~fixed).sum().item(),
        "won": (~right & fixed).sum().item(),
        "gates": attribution.gate_numbers(gates),
        "images": images,
    }
    shown = normalized(images)
    probabilities = attribution.predict(model, shown)
    cams = attribution.grad_cam(model, shown, probabilities.argmax(1))
    smoke_test = ", smoke test" * run.result["quick"]
    return numbers, Explained(
        name=f"{run.result['model']}, seed {run.seed}{smoke_test}",
        classes=legible(dataset.classes),
        images=rgb(dataset.test_images[images]),
        labels=dataset.test_labels[images],
        probabilities=probabilities.cpu(),
        cams={layer: attribution.scaled(maps).cpu() for layer, maps in cams.items()},
        gate_maps=attribution.gate_maps_of(model, shown),
        gates_by_class=attribution.gates_by_class(gates, labels.cpu(), len(dataset.classes)),
    )


def chosen(labels: torch.Tensor, right: torch.Tensor) -> list[int]:
    """The first correct image of each class shown, then the first misclassified one of each."""
    return [
        i
        for group in (right, ~right)
        for label in labels.unique()[:CLASSES_SHOWN]
        for i in (group & (labels == label)).nonzero().flatten()[:1].tolist()
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Settings with resolved device. Exits with 2 on wrong usage."""
    parser = make_parser(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--run", type=Path, nargs=1, dest="runs", metavar="RUN", help="a run's folder"
    )
    checkpoint = {"type": lambda path: Path(path).parent, "nargs": 1, "dest": "runs"}
    which.add_argument("--checkpoint", metavar="PATH", help="the best.pt in it", **checkpoint)
    which.add_argument("--compare", type=Path, nargs="+", dest="runs", metavar="RUN", help="runs")
    add("--images", type=int, nargs="+", metavar="I", help="indices of test images to show, from 0")
    add("--limit-test", type=int, default=2000, help=f"test images, at most the run's; {default}")
    add("--dataset", help="a name or the images' folder; default: the run's")
    add("--data-dir", type=Path, help="default: the run's")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help=f"folder of the comparison; {default}")
    add("--keep", action="store_true", help="skip runs that are explained already")
    args = parser.parse_args(argv)
    if args.limit_test < 1 or min(args.images or [0]) < 0:
        parser.error("--limit-test must be at least 1, --images at least 0")
    args.compare = len(args.runs) > 1
    if len(set(map(Path.resolve, args.runs))) < len(args.runs):
        parser.error("--compare: a run is given twice")
    try:
        args.device = choose_device(args.device)
        data.resolve(args.dataset or "fashion_mnist")
    except ValueError as error:
        parser.error(str(error))
    return args


@exit_code
def main(argv: list[str] | None = None) -> None:
    """Runs the script with `argv` as its command line."""
    args = parse(argv)
    set_up_torch("fp32")
    runs = list(map(read_finished, args.runs))
    files = [run.folder / "explain.json" for run in runs]
    comparison = args.out / "explain_compare.png"
    if args.keep and all(path.is_file() for path in [*files, *[comparison] * args.compare]):
        return print(f"kept: {', '.join(map(str, files))}")
    with ExitStack() as stack:
        for run in runs:  # so that nobody retrains it meanwhile
            check_writable(run.folder, "copy the run to a folder of your own")
            lock(run.folder, stack)
        if args.compare:
            check_writable(args.out)
        preflight(args.device, args.out if args.compare else runs[0].folder)
        dataset, idx = load_dataset(runs, args)
        if args.images and max(args.images) >= len(dataset.test_labels):
            raise UserError(f"--images must be from 0 to {len(dataset.test_labels) - 1}")
        images, drawn = args.images, []
        for run, path in tqdm(list(zip(runs, files, strict=True)), disable=None, leave=False):
            numbers, explained = explain(run, dataset, idx, images, args.device)
            images = numbers["images"]  # the same for the other models
            drawn.append(explained)
            picture = path.with_suffix(".png")
            with noted(f"no {picture}"):
                draw_model(explained, drawn[0], picture)
            write_json(path, numbers)
            gates = f"gates replaced by their mean: {numbers['lost']} lost, {numbers['won']} won; "
            if numbers["test_acc_gates_fixed"] is None:
                gates = ""  # no gates, or none recognised
            print(
                f"{explained.name}: {numbers['test_acc']:.2f}% of {numbers['test_images']:,} "
                f"images; {gates}picture: {picture}"
            )
        if args.compare:
            with noted(f"no {comparison}"):
                draw_comparison(drawn, comparison)
            print(f"side by side: {comparison}")


if __name__ == "__main__":
    sys.exit(main())
