"""What a trained model looks at: Grad-CAM, the gates of its attention, and what they are worth.

    python explain.py --run runs/fashion_mnist/published/se/seed0
    python explain.py --checkpoint PATH/best.pt --images 3 17 42 --out results
    python explain.py --compare RUN RUN RUN           # models side by side on the same images

Writes OUT/explain_<model>_seed<k>.png for each run, OUT/explain_compare.png for several, and
OUT/explain.json, from which report.py makes a section of the report. By default it shows of every
class (of the first ten) the first test image that the (first) model gets right and the first that
it gets wrong. One model of full width takes half a minute on two CPU cores.

A picture has Grad-CAM at the ends of stages 3 and 4 for the predicted class (grad_cam.py); where
gates tell positions apart, those of the last block of each stage (gates.py); and below, for each
class, the mean gate of every channel.

Beside the pictures, over --limit-test images: mean, spread and saturation of the gates, how many
hardly vary from image to image; the accuracy with every gate fixed at its mean over the images
(gate ablation); and over --limit-cam of them: deletion and insertion scores of Grad-CAM and of
random maps as coarse, and how much the maps change when the weights are random.
"""

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path

import torch
import torch.nn as nn

from kit import checkpoint
import data
from kit import run_folder
from kit.environment import choose_device
from kit.pictures import Explained, draw_comparison, draw_model
from kit.files import check_writable, write_atomically
from kit.gates import gate_maps_of, gate_numbers, gates_of, replaced, stage_of
from kit.grad_cam import (
    LAYERS,
    correlation,
    deletion_and_insertion,
    enlarged,
    grad_cam,
    predict,
    scaled,
)
from models import MODELS, build_model
from kit.modes import set_up_torch
from kit.training_step import halves

LIMIT_TEST = 2000
CLASSES_SHOWN = 10
OTHER_SEED = 10**6  # of the random weights


class ExplainError(RuntimeError):
    """There is nothing to explain. The message says in one line why and what to do."""


# --- Runs -----------------------------------------------------------------------------------------


def read_config(path: Path) -> dict:
    """The settings of the run that the checkpoint `path` is of."""
    if not path.parent.is_dir():
        raise ExplainError(f"{path.parent} is no folder: name a run's folder, or its --checkpoint")
    kinds = dict(model=str, dataset=str, data_dir=str, width=int, seed=int)
    config = run_folder.read_json(path.parent / "config.json", "name the folder of a run", **kinds)
    base, limit = config.setdefault("base_model", config["model"]), config.get("limit_test")
    if config["width"] < 1 or base not in list(MODELS) or not config["model"].isidentifier():
        raise ExplainError(
            f"{path.parent / 'config.json'}: there is no model {base} of width {config['width']}"
        )
    if not (limit is None or (isinstance(limit, int) and limit > 0)):
        raise ExplainError(f"{path.parent / 'config.json'}: limit_test is {limit}")
    return config


def load_dataset(configs: list[dict], paths: list[Path], args) -> data.ImageData:
    """What all the runs were trained on."""
    for path, config in zip(paths, configs, strict=True):
        if any(config.get(key) != configs[0].get(key) for key in ("dataset", "data", "image_size")):
            raise ExplainError(f"{path} is of other data than {paths[0]}: compare like with like")
    place = args.data_dir or Path(configs[0]["data_dir"])
    dataset = data.load_dataset(configs[0]["dataset"], place, configs[0].get("image_size"))
    limits = [config.get("limit_test") or LIMIT_TEST for config in configs]
    n = min(args.limit_test or min(LIMIT_TEST, *limits), len(dataset.test_images))
    if args.images and not 0 <= min(args.images) <= max(args.images) < n:
        raise ExplainError(
            f"--images must be from 0 to {n - 1}, the test images that are looked at: see "
            "--limit-test"
        )
    return dataclasses.replace(
        dataset, test_images=dataset.test_images[:n], test_labels=dataset.test_labels[:n]
    )


def names_of(configs: list[dict]) -> list[str]:
    """Of each run: se_seed0, say, and more where another has that name, too."""
    names = [f"{config['model']}_seed{config['seed']}" for config in configs]
    for more in (lambda i: configs[i].get("recipe"), lambda i: i + 1):
        names = [
            f"{name}_{more(i)}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]
    return names


def load_model(path: Path, config: dict, dataset: data.ImageData, seed=None) -> nn.Module:
    """The model with the weights in `path`, or, with a seed, with weights of that seed."""
    try:
        model = build_model(
            config["base_model"],
            place=config.get("place"),
            reduction=config.get("reduction"),
            num_classes=len(dataset.classes),
            in_channels=dataset.test_images.shape[1],
            width=config["width"],
            seed=seed,
        )
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = str(error).split("\n")[0]
        raise ExplainError(f"{path.parent / 'config.json'}: {reason}") from None
    if seed is None:
        try:
            weights = checkpoint.load_weights(path)
        except FileNotFoundError:
            raise ExplainError(
                f"{path} is not there: train the run to its end first (or again, with --overwrite: "
                "Git keeps no weights)"
            ) from None
        except Exception as error:  # damaged files raise what they like
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ExplainError(f"{path} cannot be read: {reason}") from None
        try:
            model.load_state_dict(weights)
        except (
            RuntimeError,
            TypeError,
            AttributeError,
        ) as error:
            reason = " ".join(str(error).split())[:150]
            raise ExplainError(f"{path} is not of {config['model']}: {reason}") from None
    return model.to(memory_format=torch.channels_last).eval()


def chosen(labels: torch.Tensor, predictions: torch.Tensor) -> list[int]:
    """Of each of the first classes the first image that is right, then the first that is wrong."""
    picked = []
    for right in (True, False):
        for label in labels.unique().tolist()[:CLASSES_SHOWN]:
            found = ((labels == label) & ((predictions == labels) == right)).nonzero().flatten()
            picked += found[:1].tolist()
    return picked


def explain(
    name: str, path: Path, dataset: data.ImageData, config: dict, args
) -> tuple[dict, Explained]:
    """(an entry of explain.json, what is drawn). Fills in args.images where it is None."""
    device = args.device
    by_data = config.get("normalize") == "data"
    moments = dataset.moments_on(device) if by_data else halves(device)
    model = load_model(path, config, dataset).to(device)
    labels = dataset.test_labels.to(device)
    images = data.normalize(dataset.test_images.to(device), *moments)
    images = images.contiguous(memory_format=torch.channels_last)
    probabilities, gates, fixed = gates_of(model, images)
    if not probabilities.isfinite().all():
        raise ExplainError(f"{path}: not all that it gives is finite, there is nothing to explain")
    predictions = probabilities.argmax(1)
    if args.images is None:
        args.images = chosen(labels, predictions)  # other models are then shown the same
        args.choice = (
            f"Images: of each class the first that {config['model']} gets right, then the first "
            "that it gets wrong."
        )

    def accuracy(classes):
        return 100 * (classes == labels).double().mean().item()

    # Do the gates carry accuracy? Each is fixed at its mean.
    predictions_fixed = predictions
    if fixed:
        with replaced(model, fixed):
            predictions_fixed = predict(model, images).argmax(1)
    right, right_fixed = predictions == labels, predictions_fixed == labels

    # Is Grad-CAM faithful? Beside random maps as coarse, and beside those of random weights.
    few, classes = images[: args.limit_cam], predictions[: args.limit_cam]
    maps = grad_cam(model, few, classes)
    size = tuple(images.shape[2:])
    guide = enlarged(maps["layer4"], size)
    random_maps = torch.rand(maps["layer4"].shape, generator=torch.Generator().manual_seed(0))
    random_maps = enlarged(random_maps, size).to(device)
    deletion, insertion = deletion_and_insertion(model, few, classes, guide)
    deletion_random, insertion_random = deletion_and_insertion(model, few, classes, random_maps)
    random_model = load_model(path, config, dataset, seed=OTHER_SEED).to(device)
    random_cams = grad_cam(random_model, few, classes)

    numbers = {
        "model": config["model"],
        "dataset": data.name_of(config["dataset"]),
        "recipe": config.get("recipe"),
        "overrides": config.get("overrides", {}),
        "quick": config.get("quick", False),
        "seed": config["seed"],
        "test_images": len(labels),
        "test_acc": accuracy(predictions),
        "test_acc_gates_fixed": accuracy(predictions_fixed) if fixed else None,
        "lost": (right & ~right_fixed).sum().item(),  # images, with gates fixed
        "won": (~right & right_fixed).sum().item(),
        "gates": gate_numbers(gates),
        "cam_images": len(few),
        "empty_maps": {k: (m.amax((1, 2)) <= 0).double().mean().item() for k, m in maps.items()},
        "deletion": deletion,
        "insertion": insertion,
        "deletion_random": deletion_random,
        "insertion_random": insertion_random,
        "correlation_with_random_weights": {
            layer: correlation(maps[layer], random_cams[layer]) for layer in LAYERS
        },
        "images": args.images,
        "picture": f"explain_{name}.png",
        "asked": asked(config, args),
    }
    at = torch.tensor(args.images, device=device)
    cams = grad_cam(model, images[at], predictions[at])
    last_of_stage = {stage_of(name): of_module.float() for name, of_module in gates.items()}
    by_class = {
        stage: torch.stack([
            of_stage[dataset.test_labels == label].nanmean(0)
            for label in range(len(dataset.classes))
        ])
        for stage, of_stage in last_of_stage.items()
        if not of_stage.isnan().all()
    }  # fmt: skip
    return numbers, Explained(
        name=name.replace("_seed", ", seed "),
        choice=args.choice,
        quick=bool(numbers["quick"]),
        classes=dataset.classes,
        pixels=dataset.test_images[args.images],
        labels=labels[at].tolist(),
        predictions=predictions[at].tolist(),
        probabilities=probabilities[at].amax(1).tolist(),
        cams={layer: enlarged(scaled(m), size).cpu() for layer, m in cams.items()},
        gate_maps={stage: m.cpu() for stage, m in gate_maps_of(model, images[at]).items()},
        gates_by_class=by_class,
    )


def asked(config: dict, args) -> dict:
    """What an entry of explain.json was asked for."""
    keys = ("model", "dataset", "data", "recipe", "overrides", "seed")
    own = {"limit_test": args.limit_test, "limit_cam": args.limit_cam}
    return {key: config.get(key) for key in keys} | own


def is_kept(paths: list[Path], configs: list[dict], args) -> bool:
    """Whether explain.json is of these runs, in this order, and younger than their weights.

    Weights may be gone: results that were committed and cloned have none.
    """
    try:
        written = (args.out / "explain.json").stat().st_mtime
        rows = json.loads((args.out / "explain.json").read_text())
        return (
            [row["asked"] for row in rows] == [asked(config, args) for config in configs]
            and args.images in (None, rows[0]["images"])
            and all((args.out / row["picture"]).is_file() for row in rows)
            and all(path.stat().st_mtime < written for path in paths if path.exists())
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False  # it is then made anew


# --- Command line ---------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings, the device resolved. Exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="a run's folder")
    which.add_argument("--checkpoint", type=Path, help="a best.pt, in its run's folder")
    which.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    add("--images", type=int, nargs="+", metavar="I", help="of the test set, counted from 0")
    limit = f"test images that the numbers are of; default: the run's, up to {LIMIT_TEST:,}"
    add("--limit-test", type=int, help=limit)
    add("--limit-cam", type=int, default=100,
        help="of these, images that Grad-CAM is judged on; default: %(default)s")  # fmt: skip
    add("--data-dir", type=Path, help="default: the run's")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help="folder; default: %(default)s")
    add("--keep", action="store_true", help="do nothing where OUT/explain.json is of these runs")
    parser.set_defaults(choice="")  # how --images were chosen, where that was not the user
    args = parser.parse_args(argv)
    if min(args.limit_cam, 1 if args.limit_test is None else args.limit_test) < 1:
        parser.error("--limit-test and --limit-cam must be at least 1")
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """The script, with `argv` in place of the command line; the exit code."""
    args = parse(argv)
    set_up_torch("fp32")
    folders = args.compare or ([args.run] if args.run else [])
    paths = [folder / "best.pt" for folder in folders] or [args.checkpoint]
    try:
        configs = [read_config(path) for path in paths]
        if args.keep and is_kept(paths, configs, args):
            print(f"kept: {args.out / 'explain.json'}")
            return 0
        dataset = load_dataset(configs, paths, args)
        check_writable(args.out)
        rows, drawn = [], []
        for name, path, config in zip(names_of(configs), paths, configs, strict=True):
            numbers, explained = explain(name, path, dataset, config, args)
            picture = args.out / numbers["picture"]
            draw_model(explained, picture)
            rows.append(numbers)
            drawn.append(explained)
            print_numbers(numbers, picture)
        if len(drawn) > 1:
            draw_comparison(drawn, args.out / "explain_compare.png")
            print(f"written: {args.out / 'explain_compare.png'}")
        body = json.dumps(rows, indent=2, allow_nan=False)
        write_atomically(args.out / "explain.json", body + "\n")
    except (data.DataError, ExplainError, run_folder.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {args.out / 'explain.json'}")
    return 0


def print_numbers(row: dict, picture: Path) -> None:
    """The gist of one entry of explain.json."""
    print(f"{row['model']}, seed {row['seed']}: {row['test_acc']:.2f} % of {row['test_images']:,}")
    if row["test_acc_gates_fixed"] is not None:
        print(f"  with every gate fixed at its mean: {row['test_acc_gates_fixed']:.2f} %")
    for stage, g in row["gates"].items():
        print(
            f"  gates, {stage:10s} mean {g['mean']:.3f}, spread over channels "
            f"{g['spread_over_channels']:.3f}, over images {g['spread_over_images']:.3f}, "
            f"hardly vary {g['hardly_vary']:.0%}"
        )
    print(
        f"  Grad-CAM, {row['cam_images']} images: deletion {row['deletion']:.3f} (random maps "
        f"{row['deletion_random']:.3f}), insertion {row['insertion']:.3f} "
        f"({row['insertion_random']:.3f})\nwritten: {picture}",
        flush=True,
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    sys.exit(main())
