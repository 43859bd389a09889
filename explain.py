"""What a trained model looks at: Grad-CAM, the gates of its attention, and what they are worth.

    python explain.py --run runs/fashion_mnist/published/se/seed0
    python explain.py --checkpoint PATH/best.pt --images 3 17 42 --out results
    python explain.py --compare RUN RUN RUN           # models side by side on the same images

Writes OUT/explain.json, which becomes a section of the report, and pictures: Grad-CAM of the
predicted class, gates that depend on the position, and each channel's mean gate by class. They show
--images, by default for each class the first that the (first) model gets right, and wrong. Half a
minute for a model of full width on two CPU cores.

Numbers, over --limit-test images: mean, spread and saturation of the gates, and the accuracy with
every gate replaced by its mean over the images (gate ablation); over --limit-cam: deletion and
insertion scores of Grad-CAM compared with random maps of the same resolution, and how similar the
maps are when the weights are random.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import data
from kit import attribution
from kit.checkpoint import load_weights
from kit.command_line import UserError, exit_code, make_parser
from kit.environment import choose_device
from kit.fast import set_up_torch
from kit.files import check_writable, write_atomically
from kit.pictures import Explained, draw_comparison, draw_model
from models import build_model

LIMIT_TEST = 2000
CLASSES_SHOWN = 10
OTHER_SEED = 10**6  # of the random weights
# What is used of a config.json, and what older ones lack.
KINDS = {"model": str, "dataset": str, "data_dir": str, "width": int, "seed": int}
KINDS |= {"base_model": str, "limit_test": int | None}
DEFAULTS = {"limit_test": None, "recipe": None, "overrides": {}, "quick": False}


def read_config(path: Path) -> dict:
    """The settings of the run that the checkpoint `path` belongs to. Raises UserError."""
    try:
        config = json.loads((path.parent / "config.json").read_text())
        config = DEFAULTS | {"base_model": config["model"]} | config
        for key, kind in KINDS.items():
            if not isinstance(config[key], kind):
                raise TypeError(f"{key} is {config[key]}")
        if config["width"] < 1 or not config["model"].isidentifier():  # it names the pictures
            raise ValueError(f"no model {config['model']} has width {config['width']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path.parent} is not the folder of a run: config.json: {error}") from None
    return config


def load_dataset(configs: list[dict], args) -> data.ImageData:
    """What all the runs were trained on, with the test images that are used. Raises UserError."""
    first = configs[0]
    names = {(config["dataset"], config.get("image_size")) for config in configs}
    digests = {config.get("data") for config in configs} - {None}  # some older runs have none
    if len(names) > 1 or len(digests) > 1:
        raise UserError("the runs were trained on different data: compare like with like")
    folder = args.data_dir or Path(first["data_dir"])
    dataset = data.load_dataset(first["dataset"], folder, first.get("image_size"))
    limits = [config["limit_test"] or LIMIT_TEST for config in configs]
    n = min(args.limit_test or min(LIMIT_TEST, *limits), len(dataset.test_images))
    if args.images and not 0 <= min(args.images) <= max(args.images) < n:
        raise UserError(f"--images must be from 0 to {n - 1}, or --limit-test higher")
    dataset.test_images, dataset.test_labels = dataset.test_images[:n], dataset.test_labels[:n]
    return dataset


def names_of(configs: list[dict]) -> list[str]:
    """For each run "se_seed0", say, with more where two would have the same name."""
    names = [f"{config['model']}_seed{config['seed']}" for config in configs]
    for more in ([config.get("recipe") for config in configs], range(1, len(configs) + 1)):
        pairs = zip(names, more, strict=True)
        names = [f"{name}_{m}" if names.count(name) > 1 else name for name, m in pairs]
    return names


def load_model(path: Path, config: dict, dataset: data.ImageData, seed=None) -> nn.Module:
    """The model with the weights in `path`, or with random ones of a seed. Raises UserError."""
    try:
        position = config.get("position") or config.get("place")  # as older runs call it
        shape = len(dataset.classes), dataset.test_images.shape[1], config["width"]
        model = build_model(config["base_model"], *shape, seed, position, config.get("reduction"))
        if seed is None:
            model.load_state_dict(load_weights(path))
    except Exception as error:  # damaged files raise what they like
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(
            f"{path} does not load as {config['model']} ({reason}): train it (Git keeps no weights)"
        ) from None
    return model.to(memory_format=torch.channels_last).eval()


def explain(name: str, path: Path, config: dict, dataset: data.ImageData, args):
    """(an entry of explain.json, what is drawn). Fills in args.images where it is None.

    Raises UserError.
    """
    model, random_model = (
        load_model(path, config, dataset, seed).to(args.device) for seed in (None, OTHER_SEED)
    )
    labels = dataset.test_labels.to(args.device)
    mean_and_std = dataset.mean_and_std(config.get("normalize"), args.device)
    images = data.normalize(dataset.test_images.to(args.device), *mean_and_std)
    images = images.contiguous(memory_format=torch.channels_last)
    probabilities, gates, means = attribution.gates_of(model, images)
    if not probabilities.isfinite().all():
        raise UserError(f"{path}: its outputs are not all finite, there is nothing to explain")
    predictions = probabilities.argmax(1)
    args.images = args.images or chosen(labels, predictions)  # other models are shown the same
    few = images[: args.limit_cam], predictions[: args.limit_cam]
    numbers = {
        "model": config["model"],
        "dataset": data.resolve(config["dataset"], config.get("image_size"))[1],
        **{key: config[key] for key in ("recipe", "overrides", "quick", "seed")},
        "test_images": len(labels),
        **ablation(model, images, labels, predictions, means),
        "gates": attribution.gate_numbers(gates),
        **attribution.faithfulness(model, random_model, *few),
        "images": args.images,
        "picture": f"explain_{name}.png",
        "asked": asked(config, args),
    }
    at, size = torch.tensor(args.images, device=args.device), images.shape[2:]
    cams = attribution.grad_cam(model, images[at], predictions[at])
    words = f"{config['model']}, {name.removeprefix(config['model'] + '_').replace('_', ', ')}"
    return numbers, Explained(
        name=words + ", smoke test" * bool(numbers["quick"]),
        classes=dataset.classes,
        pixels=dataset.test_images[args.images],
        labels=labels[at].tolist(),
        predictions=predictions[at].tolist(),
        probabilities=probabilities[at].amax(1).tolist(),
        cams={k: attribution.enlarged(attribution.scaled(m), size).cpu() for k, m in cams.items()},
        gate_maps=attribution.gate_maps_of(model, images[at]),
        gates_by_class=attribution.gates_by_class(gates, dataset.test_labels, len(dataset.classes)),
    )


def chosen(labels: torch.Tensor, predictions: torch.Tensor) -> list[int]:
    """For each of the first classes the first image that is right, then the first that is wrong."""
    right = predictions == labels
    found = [
        (labels == label) & (right == wanted)
        for wanted in (True, False)
        for label in labels.unique()[:CLASSES_SHOWN]
    ]
    return [i for images in found for i in images.nonzero().flatten()[:1].tolist()]


def ablation(model, images, labels, predictions, means: dict[str, nn.Module]) -> dict:
    """Do the gates carry accuracy? Each is replaced by its mean; `lost` and `won` count images."""
    right = still_right = predictions == labels
    if means:
        replaced = attribution.replaced(model, means)
        still_right = attribution.predict(replaced, images).argmax(1) == labels
    return {
        "test_acc": 100 * right.double().mean().item(),
        "test_acc_gates_fixed": 100 * still_right.double().mean().item() if means else None,
        "lost": (right & ~still_right).sum().item(),
        "won": (~right & still_right).sum().item(),
    }


def asked(config: dict, args) -> dict:
    """What an entry of explain.json was asked for."""
    keys = ("model", "dataset", "data", "recipe", "overrides", "seed")
    own = {"limit_test": args.limit_test, "limit_cam": args.limit_cam}
    return {key: config.get(key) for key in keys} | own


def is_kept(paths: list[Path], configs: list[dict], args) -> bool:
    """Whether explain.json has these runs in this order and is newer than their weights, if any.

    (Results that were committed and cloned have none.)
    """
    path = args.out / "explain.json"
    try:
        rows, written = json.loads(path.read_text()), path.stat().st_mtime
        return (
            [row["asked"] for row in rows] == [asked(config, args) for config in configs]
            and args.images in (None, rows[0]["images"])
            and all((args.out / row["picture"]).is_file() for row in rows)
            and all(path.stat().st_mtime < written for path in paths if path.exists())
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings, the device resolved. Exits with 2 on wrong usage."""
    parser = make_parser(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, nargs=1, dest="runs", help="a run's folder")
    which.add_argument("--checkpoint", type=Path, help="a best.pt, in its run's folder")
    which.add_argument("--compare", type=Path, nargs="+", dest="runs", metavar="RUN",
        help="runs' folders")  # fmt: skip
    add("--images", type=int, nargs="+", metavar="I", help="to show: of the test set, from 0")
    add("--limit-test", type=int, help=f"test images; default: the run's, up to {LIMIT_TEST:,}")
    add("--limit-cam", type=int, default=100, help=f"of these, images for Grad-CAM; {default}")
    add("--data-dir", type=Path, help="default: the run's")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help=f"folder; {default}")
    add("--keep", action="store_true", help="do nothing if OUT/explain.json has these runs")
    args = parser.parse_args(argv)
    if min(args.limit_cam, 1 if args.limit_test is None else args.limit_test) < 1:
        parser.error("--limit-test and --limit-cam must be at least 1")
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


@exit_code
def main(argv: list[str] | None = None) -> None:
    """The script, with `argv` in place of the command line."""
    args = parse(argv)
    set_up_torch("fp32")
    paths = [folder / "best.pt" for folder in args.runs or []] or [args.checkpoint]
    configs = [read_config(path) for path in paths]
    if args.keep and is_kept(paths, configs, args):
        print(f"kept: {args.out / 'explain.json'}")
        return
    dataset = load_dataset(configs, args)
    check_writable(args.out)
    runs = list(zip(names_of(configs), paths, configs, strict=True))
    found = [explain(*run, dataset, args) for run in tqdm(runs, disable=None, leave=False)]
    rows, drawn = zip(*found, strict=True)
    for row, explained in found:
        draw_model(explained, args.out / row["picture"])
        print(
            f"{explained.name}: {row['test_acc']:.2f}% of {row['test_images']:,} images; "
            f"gates replaced by their mean: {row['lost']} lost, {row['won']} won"
        )
    if len(runs) > 1:
        draw_comparison(drawn, args.out / "explain_compare.png")
    write_atomically(args.out / "explain.json", json.dumps(rows, indent=2, allow_nan=False) + "\n")
    print(f"written: {args.out / 'explain.json'} and its pictures")


if __name__ == "__main__":
    sys.exit(main())
