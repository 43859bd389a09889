"""What a trained model looks at: Grad-CAM, the gates of its attention, and what they are worth.

    python explain.py --run runs/fashion_mnist/published/se/seed0
    python explain.py --checkpoint PATH/best.pt --images 3 17 42 --out results
    python explain.py --compare RUN RUN RUN           # models side by side on the same images

Writes OUT/explain_<model>_seed<k>.png for each run, OUT/explain_compare.png for several, and
OUT/explain.json, from which report.py makes a section of the report. By default it shows of every
class the first test image that the (first) model gets right and the first that it gets wrong. One
model of full width takes half a minute on two CPU cores.

A picture has Grad-CAM at the ends of stages 3 and 4 for the predicted class (grad_cam.py), the gate
of every position in the last block of each stage (gates.py), and below, for each class, the mean
gate of every channel.

Beside the pictures, over --limit-test images: mean, spread and saturation of the gates, how many
hardly vary from image to image; the accuracy with every gate fixed at its mean (gate ablation);
and over --limit-cam of them: deletion and insertion scores of Grad-CAM and of random maps, and how
much the maps change when the weights are random.
"""

import argparse
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn

import checkpoint
import data
from environment import choose_device
from files import write_atomically
from gates import gate_maps_of, gate_numbers, gates_of, replaced, stage_of
from grad_cam import (
    LAYERS,
    correlation,
    deletion_and_insertion,
    enlarged,
    grad_cam,
    predict,
    scaled,
)
from models import build_model

matplotlib.use("Agg")  # the figures never go to a window
import matplotlib.pyplot as plt

LIMIT_TEST = 2000
OTHER_SEED = 10**6  # of the random weights


class ExplainError(RuntimeError):
    """There is nothing to explain. The message says in one line why and what to do."""


# --- Runs -----------------------------------------------------------------------------------------


def read_config(path: Path) -> dict:
    """The settings of the run that the checkpoint `path` is of."""
    config_path = path.parent / "config.json"
    try:
        config = json.loads(config_path.read_text())
        for key in ("model", "dataset", "width", "seed", "data_dir"):
            config[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExplainError(
            f"{config_path}, which says what model it is, cannot be read ({error})"
        ) from None
    return config


def load_model(path: Path, config: dict, dataset: data.ImageData, seed=None) -> nn.Module:
    """The model with the weights in `path`, or, with a seed, with weights of that seed."""
    try:
        model = build_model(
            config.get("base_model") or config["model"],
            place=config.get("place"),
            reduction=config.get("reduction"),
            num_classes=len(dataset.classes),
            in_channels=dataset.test_images.shape[1],
            width=config["width"],
            seed=seed,
        )
    except ValueError as error:
        raise ExplainError(f"{path.parent / 'config.json'}: {error}") from None
    if seed is None:
        try:
            model.load_state_dict(checkpoint.load_weights(path))
        except FileNotFoundError:
            raise ExplainError(f"{path} is not there: train the run to its end first") from None
        except Exception as error:  # damaged files raise what they like
            reason = str(error).strip().split("\n")[0]
            raise ExplainError(f"{path} is not of {config['model']}: {reason}") from None
    return model.to(memory_format=torch.channels_last).eval()


def chosen(labels: torch.Tensor, predictions: torch.Tensor) -> list[int]:
    """Of every class the first image that is right, and then the first that is wrong."""
    picked = []
    for right in (True, False):
        for label in labels.unique().tolist():
            found = ((labels == label) & ((predictions == labels) == right)).nonzero().flatten()
            picked += found[:1].tolist()
    return picked


@dataclass
class Explained:
    """What is drawn of one model. Everything is on the CPU."""

    name: str
    classes: list[str]
    pixels: torch.Tensor  # uint8 (n, C, H, W), the images shown
    labels: list[int]
    predictions: list[int]
    probabilities: list[float]  # of the predicted classes
    cams: dict[str, torch.Tensor]  # layer -> maps (n, H, W), each from 0 to 1
    gate_maps: dict[str, torch.Tensor]  # stage -> (n, h, w)
    gates_by_class: dict[str, torch.Tensor]  # stage -> mean gates (classes, C)


def explain(path: Path, dataset: data.ImageData, config: dict, args) -> tuple[dict, Explained]:
    """(an entry of explain.json, what is drawn). args.images is filled in where it is None."""
    device = args.device
    mean, std = dataset.moments_on(device)
    if config.get("normalize") != "data":
        mean, std = torch.full_like(mean, 0.5), torch.full_like(std, 0.5)
    model = load_model(path, config, dataset).to(device)
    test = dataset.test_images[: limit_of(config, args)]
    labels = dataset.test_labels[: len(test)].to(device)
    images = data.normalize(test.to(device), mean, std)
    images = images.contiguous(memory_format=torch.channels_last)
    probabilities, gates, fixed = gates_of(model, images)
    predictions = probabilities.argmax(1)
    if args.images is None:
        args.images = chosen(labels, predictions)  # other models are then shown the same

    def accuracy(classes):
        return 100 * (classes == labels).double().mean().item()

    # Do the gates carry accuracy? Each is fixed at its mean.
    predictions_fixed = predictions
    if gates:
        with replaced(model, fixed):
            predictions_fixed = predict(model, images).argmax(1)
    right, right_fixed = predictions == labels, predictions_fixed == labels

    # Is Grad-CAM faithful? Beside random maps, and beside those of random weights.
    few, classes = images[: args.limit_cam], predictions[: args.limit_cam]
    maps = grad_cam(model, few, classes)
    size = tuple(images.shape[2:])
    guide = enlarged(maps["layer4"], size)
    random_maps = torch.rand(guide.shape, generator=torch.Generator().manual_seed(0)).to(device)
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
        "test_acc_gates_fixed": accuracy(predictions_fixed) if gates else None,
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
    }
    at = torch.tensor(args.images, device=device)
    cams = grad_cam(model, images[at], predictions[at])
    last_of_stage = {stage_of(name): of_module.float() for name, of_module in gates.items()}
    on_cpu = labels.cpu()
    by_class = {
        stage: torch.stack([of_stage[on_cpu == label].mean(0) for label in on_cpu.unique()])
        for stage, of_stage in last_of_stage.items()
    }
    return numbers, Explained(
        name=f"{config['model']}, seed {config['seed']}" + ", quick run" * numbers["quick"],
        classes=dataset.classes,
        pixels=test[args.images],
        labels=labels[at].tolist(),
        predictions=predictions[at].tolist(),
        probabilities=probabilities[at].amax(1).tolist(),
        cams={layer: enlarged(scaled(m), size).cpu() for layer, m in cams.items()},
        gate_maps={stage: m.cpu() for stage, m in gate_maps_of(model, images[at]).items()},
        gates_by_class=by_class,
    )


def is_kept(paths: list[Path], out: Path) -> bool:
    """Whether explain.json is of these runs, in this order, and younger than their weights."""
    try:
        rows = json.loads((out / "explain.json").read_text())
        found = [[row[key] for key in ("model", "recipe", "overrides", "seed")] for row in rows]
        configs = [read_config(path) for path in paths]
        wanted = [
            [config[key] for key in ("model", "recipe", "overrides", "seed")] for config in configs
        ]
        written = (out / "explain.json").stat().st_mtime
        return found == wanted and all(path.stat().st_mtime < written for path in paths)
    except (OSError, ValueError, LookupError, TypeError):
        return False  # it is then made anew


def limit_of(config: dict, args) -> int:
    """How many test images: --limit-test, or else as many as the run has, up to LIMIT_TEST."""
    return args.limit_test or min(config.get("limit_test") or LIMIT_TEST, LIMIT_TEST)


# --- Pictures -------------------------------------------------------------------------------------

INCH = dict(tile=0.68, caption=0.26, gap=0.05, between=0.3, top=0.6, strip=1.3, side=1.0)


def draw_model(e: Explained, path: Path) -> None:
    """Every image, its Grad-CAM and gate maps, and the channels' gates of each class."""
    headings, tiles = ["image"], []
    for i, label in enumerate(e.labels):
        said = verdict(e, i).replace("\n", " ")  # of one that is right, the probability is enough
        said = said if said.startswith("✗") else f"{e.probabilities[i]:.0%}"
        tiles.append([image_tile(e, i, f"{short(e.classes[label])}\n{said}")])
    for layer, maps in e.cams.items():
        headings.append(f"Grad-CAM\n{layer}")
        for i, row in enumerate(tiles):
            row.append(cam_tile(e, i, maps[i]))
    for stage, maps in e.gate_maps.items():
        low, high = maps.min().item(), maps.max().item()
        headings.append(f"gate, {stage}\n{low:.2f} to {high:.2f}")
        for i, row in enumerate(tiles):
            row.append([dict(X=maps[i].numpy(), cmap="cividis", vmin=low, vmax=high), ""])
    draw(e.name, headings, tiles, e.gates_by_class, e.classes, path)


def draw_comparison(models: list[Explained], path: Path) -> None:
    """Every image, and where each model looks for what it takes it for."""
    first = models[0]
    headings = ["image"]
    tiles = [[image_tile(first, i, short(first.classes[first.labels[i]]))]
             for i in range(len(first.labels))]  # fmt: skip
    for e in models:
        headings.append(e.name.replace(", quick run", "").replace(", ", "\n"))
        for i, row in enumerate(tiles):
            heat, _ = cam_tile(e, i, e.cams["layer4"][i])
            row.append([heat, verdict(e, i)])
    title = "Grad-CAM at layer4" + ", quick runs" * any("quick" in e.name for e in models)
    draw(title, headings, tiles, {}, first.classes, path)


def image_tile(e: Explained, i: int, caption: str) -> list:
    return [dict(X=e.pixels[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255), caption]


def cam_tile(e: Explained, i: int, heat: torch.Tensor) -> list:
    """The map over the grey image; empty where nothing speaks for the class."""
    if not heat.max() > 0:
        return [None, "empty map"]
    grey = e.pixels[i].float().mean(0).numpy() / 255
    colours = matplotlib.colormaps["cividis"](heat.numpy())[..., :3]
    return [dict(X=0.35 * grey[..., None] + 0.65 * colours), ""]


def verdict(e: Explained, i: int) -> str:
    """The predicted class; one that is wrong begins with a cross."""
    label, predicted = e.labels[i], e.predictions[i]
    if label == predicted:
        return f"{short(e.classes[label])}\n{e.probabilities[i]:.0%}"
    return f"✗ {short(e.classes[predicted])}\n{e.probabilities[i]:.0%}"


def short(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "…"


def draw(title, headings, tiles, gates_by_class, classes, path) -> None:
    """Two images a row, each with its tiles; below, a strip of channel gates for each stage.

    tiles: for each image a list of [arguments of imshow or None, caption].
    """
    inch, n = INCH, len(tiles)
    blocks = min(n, 2)
    rows = -(-n // 2)
    step = inch["tile"] + inch["gap"]
    block = len(headings) * step
    width = max(blocks * block + (blocks - 1) * inch["between"] + 2 * inch["gap"], 4.0)
    row_height = inch["tile"] + inch["caption"]
    height = inch["top"] + rows * row_height
    strips = inch["strip"] + 0.45 if gates_by_class else 0
    figure = plt.figure(figsize=(width, height + strips))

    def place(left, top, wide, high):  # in inches from the upper left corner
        total = height + strips
        axes = figure.add_axes([left / width, 1 - (top + high) / total, wide / width, high / total])
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    figure.text(0.5, 1 - 0.15 / (height + strips), title, ha="center", va="center", fontsize=10)
    for i, of_image in enumerate(tiles):
        left = inch["gap"] + i // rows * (block + inch["between"])
        top = inch["top"] + i % rows * row_height
        for j, (shown, caption) in enumerate(of_image):
            axes = place(left + j * step, top, inch["tile"], inch["tile"])
            if shown:
                axes.imshow(**shown, aspect="auto")
            else:
                axes.spines[:].set_color("0.7")
            wrong = "✗" in caption
            axes.set_xlabel(caption, fontsize=5.5, labelpad=1.5, linespacing=1.0, parse_math=False,
                            weight="bold" if wrong else "normal")  # fmt: skip
            if i % rows == 0:
                axes.set_title(headings[j], fontsize=5.5, pad=3)
    margin, stages = inch["side"], list(gates_by_class)
    for k, stage in enumerate(stages):
        gates = gates_by_class[stage]
        gates = gates[:, gates.mean(0).argsort()].numpy()
        wide = (width - margin - 0.1) / len(stages)
        axes = place(margin + k * wide, height + 0.35, wide - 0.1, inch["strip"] - 0.05)
        low, high = gates.min(), gates.max()
        axes.imshow(gates, cmap="cividis", aspect="auto", vmin=low, vmax=high)
        axes.set_title(f"channel gates, {stage}: {low:.2f} to {high:.2f}", fontsize=5.5, pad=3)
        axes.set_xlabel("channels, by mean gate", fontsize=5.5, labelpad=1.5)
        if k == 0 and len(gates) <= 20:
            axes.set_yticks(range(len(gates)), [short(name) for name in classes[: len(gates)]],
                            fontsize=5.5, parse_math=False)  # fmt: skip
            axes.tick_params(length=0, pad=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())


# --- Command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
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
    args = parser.parse_args(argv)
    if min(args.limit_cam, 1 if args.limit_test is None else args.limit_test) < 1:
        parser.error("--limit-test and --limit-cam must be at least 1")
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    folders = args.compare or ([args.run] if args.run else [])
    paths = [folder / "best.pt" for folder in folders] or [args.checkpoint]
    if args.keep and is_kept(paths, args.out):
        print(f"kept: {args.out / 'explain.json'}")
        return 0
    try:
        rows, drawn = [], []
        configs = [read_config(path) for path in paths]
        check_writable(args.out)  # before the work, not after
        for path, config in zip(paths, configs, strict=True):
            place = args.data_dir or Path(config["data_dir"])
            dataset = data.load_dataset(config["dataset"], place, config.get("image_size"))
            n = len(dataset.test_images[: limit_of(config, args)])
            if args.images and not 0 <= min(args.images) <= max(args.images) < n:
                raise ExplainError(
                    f"--images must be from 0 to {n - 1}, the test images that are looked at: see "
                    "--limit-test"
                )
            if drawn and dataset.classes != drawn[0].classes:
                raise ExplainError(f"{path} has other classes than {paths[0]}: compare like models")
            numbers, explained = explain(path, dataset, config, args)
            picture = args.out / f"explain_{config['model']}_seed{config['seed']}.png"
            draw_model(explained, picture)
            rows.append(numbers)
            drawn.append(explained)
            print_numbers(numbers, picture)
        if len(drawn) > 1:
            draw_comparison(drawn, args.out / "explain_compare.png")
            print(f"written: {args.out / 'explain_compare.png'}")
        write_atomically(args.out / "explain.json", json.dumps(rows, indent=2) + "\n")
    except (data.DataError, ExplainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {args.out / 'explain.json'}")
    return 0


def check_writable(folder: Path) -> None:
    """Makes the folder where there is none. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: choose another --out")


def print_numbers(row: dict, picture: Path) -> None:
    """The gist of one entry of explain.json."""
    print(f"{row['model']}, seed {row['seed']}: {row['test_acc']:.2f} % of {row['test_images']:,}")
    if row["test_acc_gates_fixed"] is not None:
        print(f"  with every gate fixed at its mean: {row['test_acc_gates_fixed']:.2f} %")
    for stage, g in row["gates"].items():
        print(
            f"  gates, {stage:10s} mean {g['mean']:.3f}, spread over channels "
            f"{g['spread_over_channels']:.3f}, over images {g['spread_over_images']:.3f}, "
            f"saturated {g['saturated']:.0%}, hardly vary {g['hardly_vary']:.0%}"
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
