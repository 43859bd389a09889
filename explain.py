"""What a trained model looks at: Grad-CAM, the gates of its attention, and what they are worth.

    python explain.py --run runs/fashion_mnist/published/se/seed0
    python explain.py --checkpoint PATH/best.pt --images 3 17 42 --out results
    python explain.py --run RUN --run OTHER_RUN       # side by side, on the same images

Writes OUT/explain_<model>_seed<k>.png for each run, and OUT/explain.json. By default it shows of
every class the first test image that the (first) model gets right and the first that it gets wrong.

Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391), at the ends of stages 3 and 4: the maps
that speak for the predicted class, summed with the class score's mean gradients as weights.

The gate of a module is what it multiplies its input by: the least-squares factor g of output = g x
input, over the positions of each channel (one number a channel) or over the channels of each
position (a map). For SE and ECA the first is exact, for CBAM it is both gates together; of a module
that adds, such as GC, it says how much is added in the input's own direction.

Beside the pictures, over --limit-test images: mean, spread and saturation of the gates, how many
hardly vary from image to image; the accuracy with every gate fixed at its mean (gate ablation);
deletion and insertion scores of Grad-CAM and of random maps (Petsiuk et al., BMVC 2018, arXiv
1806.07421); and how much the maps change when the weights are random (Adebayo et al., NeurIPS 2018,
arXiv 1810.03292).
"""

import argparse
import contextlib
import io
import json
import signal
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from environment import choose_device
from files import write_atomically
from models import build_model

matplotlib.use("Agg")  # the figures never go to a window
import matplotlib.pyplot as plt

LAYERS = ("layer3", "layer4")
STAGES = ("layer1", "layer2", "layer3", "layer4", "classifier")
BATCH = 250
STEPS = 14  # of deletion and insertion


class ExplainError(RuntimeError):
    """There is nothing to explain. The message says in one line why and what to do."""


# --- Grad-CAM -------------------------------------------------------------------------------------


@contextlib.contextmanager
def captured(modules: dict[str, nn.Module]):
    """Within the block every forward pass leaves (input, output) of each module in a dict."""
    seen, hooks = {}, []
    for name, module in modules.items():
        hooks.append(
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output))
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def evaluation(model: nn.Module):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def grad_cam(
    model: nn.Module, images: torch.Tensor, classes: torch.Tensor, layers: tuple[str, ...] = LAYERS
) -> dict[str, torch.Tensor]:
    """{layer: maps (N, h, w)} of what speaks for `classes` (N,) in normalised images (N, C, H, W).

    relu(sum_k a_k A_k), a_k the mean of d score / d A_k over positions, the score a logit (eq. 1
    and 2). A map of zeros is empty: nothing there speaks for the class. The model is left in the
    mode it was in, without hooks and gradients.
    """
    with evaluation(model), torch.enable_grad():
        with captured({layer: getattr(model, layer) for layer in layers}) as seen:
            score = model(images).gather(1, classes[:, None]).sum()
        activations = [seen[layer][1] for layer in layers]
        gradients = torch.autograd.grad(score, activations)
    maps = {}
    for layer, activation, gradient in zip(layers, activations, gradients, strict=True):
        weights = gradient.mean((2, 3), keepdim=True)
        maps[layer] = F.relu((weights * activation).sum(1)).detach()
    return maps


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Each map from 0 to 1; an empty one stays 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


# --- Gates ----------------------------------------------------------------------------------------


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Those that gate: {"layer1.0.attention": module, ...}, without the empty places."""
    names = ("attention", "attention_before_bn2")
    return {
        name: module
        for name, module in model.named_modules()
        if name.split(".")[-1] in names and not isinstance(module, nn.Identity)
    }


def stage_of(name: str) -> str:
    return name.split(".")[0] if name.startswith("layer") else "classifier"


def factor(inputs: torch.Tensor, outputs: torch.Tensor, dims) -> torch.Tensor:
    """The g that makes |output - g x input| least, summed over `dims`; 1 where all inputs are 0."""
    squares = inputs.square().sum(dims)
    products = (inputs * outputs).sum(dims)
    return torch.where(squares > 0, products / squares.clamp(min=1e-30), 1.0)


class Fixed(nn.Module):
    """In place of a module: its gate, averaged over images, whatever the image."""

    def __init__(self, gate: torch.Tensor):
        super().__init__()
        self.gate = gate  # (C, H, W)

    def forward(self, x):
        return x * self.gate


@torch.no_grad()
def gates_of(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    """(probabilities (N, num_classes), {module: gates (N, C)}, {module: Fixed}), in one pass.

    images: normalised.
    """
    modules = attention_modules(model)
    probabilities, gates = [], {name: [] for name in modules}
    products, squares = {}, {}
    with evaluation(model), captured(modules) as seen:
        for batch in images.split(BATCH):
            probabilities.append(model(batch).softmax(1))
            for name, (inputs, outputs) in seen.items():
                gates[name].append(factor(inputs, outputs, (2, 3)).cpu())
                products[name] = products.get(name, 0) + (inputs * outputs).sum(0)
                squares[name] = squares.get(name, 0) + inputs.square().sum(0)
    fixed = {
        name: Fixed(torch.where(squares[name] > 0, products[name] / squares[name], 1.0))
        for name in modules
    }
    gates = {name: torch.cat(parts) for name, parts in gates.items()}
    return torch.cat(probabilities), gates, fixed


def gate_numbers(gates: dict[str, torch.Tensor]) -> dict[str, dict]:
    """{stage: numbers}, of gates (N, C) of each module. Spread: standard deviations."""
    numbers = {}
    for stage in STAGES:
        of_stage = [g for name, g in gates.items() if stage_of(name) == stage]
        if of_stage:
            every = torch.cat(of_stage, dim=1)
            over_images = every.std(0, correction=0)
            numbers[stage] = {
                "mean": every.mean().item(),
                "spread_over_channels": every.mean(0).std(correction=0).item(),
                "spread_over_images": over_images.mean().item(),
                "saturated": ((every < 0.05) | (every > 0.95)).float().mean().item(),
                "hardly_vary": (over_images < 0.01).float().mean().item(),
            }
    return numbers


@contextlib.contextmanager
def replaced(model: nn.Module, others: dict[str, nn.Module]):
    """Within the block the modules of these names are others."""
    own = {name: model.get_submodule(name) for name in others}

    def put(modules):
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)

    put(others)
    try:
        yield
    finally:
        put(own)


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, num_classes) of normalised images."""
    with evaluation(model):
        return torch.cat([model(batch).softmax(1) for batch in images.split(BATCH)])


# --- Is Grad-CAM faithful? ------------------------------------------------------------------------


def deletion_and_insertion(
    model: nn.Module, images: torch.Tensor, classes: torch.Tensor, maps: torch.Tensor
) -> tuple[float, float]:
    """Mean probability of `classes` while pixels go, and while they come, most important first.

    maps: (N, H, W). What is not there is 0 in normalised pixels. Of a good map deletion is low and
    insertion high.
    """
    n, _, height, width = images.shape
    rank = (
        maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    )  # 0: most important
    rank = rank.view(n, 1, height, width)
    scores = []
    for keep_first in (False, True):
        total = 0.0
        for step in range(STEPS + 1):
            first = rank < step * height * width / STEPS
            shown = images * (first if keep_first else ~first)
            total += predict(model, shown).gather(1, classes[:, None]).mean().item()
        scores.append(total / (STEPS + 1))
    return scores[0], scores[1]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The mean correlation of the maps (N, h, w) of a with those of b; None if all are constant."""
    a, b = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (a, b))
    norms = a.norm(dim=1) * b.norm(dim=1)
    if not (norms > 0).any():
        return None
    return ((a * b).sum(1)[norms > 0] / norms[norms > 0]).mean().item()


# --- Runs -----------------------------------------------------------------------------------------


def read_config(checkpoint: Path) -> dict:
    """The settings of the run that `checkpoint` is of."""
    path = checkpoint.parent / "config.json"
    try:
        config = json.loads(path.read_text())
        for key in ("model", "dataset", "width", "seed", "data_dir"):
            config[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExplainError(
            f"{path}, which says what model it is, cannot be read ({error})"
        ) from None
    return config


def load_model(checkpoint: Path, config: dict, dataset: data.ImageData, seed=None) -> nn.Module:
    """The model with the weights in `checkpoint`, or, with a seed, with weights of that seed."""
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
        raise ExplainError(f"{checkpoint.parent / 'config.json'}: {error}") from None
    if seed is not None:
        return model.eval()
    try:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise ExplainError(f"{checkpoint} is not there: train the run to its end first") from None
    except Exception as error:  # damaged files raise what they like
        reason = str(error).strip().split("\n")[0]
        raise ExplainError(f"{checkpoint} is not of {config['model']}: {reason}") from None
    return model.eval()


def chosen(labels: torch.Tensor, predictions: torch.Tensor) -> list[int]:
    """Of every class the first image that is right and the first that is wrong."""
    right = predictions == labels
    picked = []
    for label in labels.unique().tolist():
        for wanted in (True, False):
            found = ((labels == label) & (right == wanted)).nonzero().flatten()
            picked += found[:1].tolist()
    return picked


def explain(checkpoint: Path, dataset: data.ImageData, config: dict, args) -> tuple[dict, dict]:
    """(what goes into explain.json, what is drawn)."""
    device = args.device
    mean, std = dataset.moments_on(device)
    if config.get("normalize") != "data":
        mean, std = torch.full_like(mean, 0.5), torch.full_like(std, 0.5)
    model = load_model(checkpoint, config, dataset).to(device)
    test = dataset.test_images[: args.limit_test]
    labels = dataset.test_labels[: args.limit_test].to(device)
    images = data.normalize(test.to(device), mean, std)
    probabilities, gates, fixed = gates_of(model, images)
    predictions = probabilities.argmax(1)
    if args.images is None:
        args.images = chosen(labels, predictions)  # other models are then shown the same
    at = torch.tensor(args.images, device=device)

    fixed_predictions = predictions
    if gates:
        with replaced(model, fixed):
            fixed_predictions = predict(model, images).argmax(1)
    few = slice(0, args.limit_cam)
    maps = grad_cam(model, images[few], predictions[few])
    size = tuple(images.shape[2:])
    guide = enlarged(maps["layer4"], size)
    generator = torch.Generator().manual_seed(0)
    random_maps = torch.rand(guide.shape, generator=generator).to(device)
    random_model = load_model(checkpoint, config, dataset, seed=10**6).to(device)
    random_cams = grad_cam(random_model, images[few], predictions[few])
    scores = [
        deletion_and_insertion(model, images[few], predictions[few], m)
        for m in (guide, random_maps)
    ]

    def accuracy(classes):
        return 100 * (classes == labels).double().mean().item()

    numbers = {
        "model": config["model"],
        "dataset": data.name_of(config["dataset"]),
        "recipe": config.get("recipe"),
        "seed": config["seed"],
        "width": config["width"],
        "test_images": len(labels),
        "test_acc": accuracy(predictions),
        "test_acc_gates_fixed": accuracy(fixed_predictions) if gates else None,
        "gates": gate_numbers(gates),
        "cam_images": len(guide),
        "empty_maps": {k: (m.amax((1, 2)) <= 0).double().mean().item() for k, m in maps.items()},
        "deletion": scores[0][0],
        "insertion": scores[0][1],
        "deletion_random": scores[1][0],
        "insertion_random": scores[1][1],
        "correlation_with_random_weights": {
            layer: correlation(maps[layer], random_cams[layer]) for layer in LAYERS
        },
        "images": args.images,
    }
    modules = attention_modules(model)
    last_of_stage = {stage_of(name): name for name in modules}  # the last block of each
    with torch.no_grad(), captured(modules) as seen:
        model(images[at])
    shown_maps = {
        stage: factor(*seen[name], 1) for stage, name in last_of_stage.items()
        if seen[name][0].shape[2] > 1
    }  # fmt: skip
    drawn = {
        "title": f"{config['model']}, seed {config['seed']}, {numbers['dataset']}",
        "pixels": test[args.images],
        "labels": labels[at].tolist(),
        "predictions": predictions[at].tolist(),
        "probabilities": probabilities[at].amax(1).tolist(),
        "cams": {
            k: enlarged(scaled(m), size).cpu()
            for k, m in grad_cam(model, images[at], predictions[at]).items()
        },
        "gate_maps": {stage: maps.cpu() for stage, maps in shown_maps.items()},
        "gates": {stage: gates[name][args.images] for stage, name in last_of_stage.items()},
        "classes": dataset.classes,
    }
    return numbers, drawn


# --- Picture --------------------------------------------------------------------------------------


def draw(drawn: dict, path: Path) -> None:
    """A row for each image: itself, Grad-CAM, the gates' maps, and every channel's gate."""
    n = len(drawn["labels"])
    columns = ["image", *(f"Grad-CAM, {layer}" for layer in drawn["cams"])]
    columns += [f"gate map, {stage}" for stage in drawn["gate_maps"]]
    strips = list(drawn["gates"])
    widths = [1.0] * len(columns) + [1.6] * len(strips)
    columns += [f"channel gates, {stage}" for stage in strips]
    figure, grid = plt.subplots(
        n, len(columns), figsize=(1.15 * sum(widths) + 1.2, 1.2 * n + 0.9), squeeze=False,
        gridspec_kw={"width_ratios": widths}, layout="constrained",
    )  # fmt: skip
    limits = {stage: (g.min().item(), g.max().item()) for stage, g in drawn["gates"].items()}
    map_limits = {s: (m.min().item(), m.max().item()) for s, m in drawn["gate_maps"].items()}
    for row, axes in zip(range(n), grid, strict=True):
        pixels = drawn["pixels"][row].permute(1, 2, 0).numpy()
        grey = pixels.shape[2] == 1
        cells = iter(axes)
        for cell in axes:
            cell.set_xticks([])
            cell.set_yticks([])
        cell = next(cells)
        cell.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        true, predicted = (drawn["classes"][drawn[k][row]] for k in ("labels", "predictions"))
        right = drawn["labels"][row] == drawn["predictions"][row]
        verdict = "right" if right else f"taken for {predicted}"
        words = f"{true}\n{verdict}, {drawn['probabilities'][row]:.0%}"
        cell.set_ylabel(words, fontsize=7, rotation=0, ha="right", va="center", parse_math=False)
        for cam in drawn["cams"].values():
            cell = next(cells)
            cell.imshow(pixels if grey else pixels.mean(2), cmap="gray", vmin=0, vmax=255)
            if cam[row].max() > 0:
                cell.imshow(cam[row].numpy(), cmap="cividis", alpha=0.65, vmin=0, vmax=1)
            else:
                cell.text(0.5, 0.5, "empty map", transform=cell.transAxes, fontsize=7,
                          ha="center", va="center", color="white")  # fmt: skip
        for stage, gate_map in drawn["gate_maps"].items():
            low, high = map_limits[stage]
            next(cells).imshow(gate_map[row].numpy(), cmap="cividis", vmin=low, vmax=high)
        for stage, gates in drawn["gates"].items():
            low, high = limits[stage]
            strip = gates[row][None].numpy()
            next(cells).imshow(strip, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for cell, name in zip(grid[0], columns, strict=True):
        stage = name.split(", ")[-1]
        low, high = (limits if name.startswith("channel") else map_limits).get(stage, (None, None))
        scale = (
            f"\n{low:.2f} to {high:.2f}" if name.split(",")[0].endswith(("map", "gates")) else ""
        )
        cell.set_title(name.replace(", ", "\n") + scale, fontsize=7)
    figure.suptitle(drawn["title"], fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
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
    add("--run", type=Path, action="append", default=[], help="a run's folder; may be repeated")
    add(
        "--checkpoint",
        type=Path,
        action="append",
        default=[],
        help="a best.pt, in its run's folder",
    )
    add("--images", type=int, nargs="+", metavar="I", help="of the test set, counted from 0")
    add("--limit-test", type=int, help="test images that the numbers are of; default: all")
    add("--limit-cam", type=int, default=200,
        help="of these, images that Grad-CAM is judged on; default: %(default)s")  # fmt: skip
    add("--data-dir", type=Path, help="default: the run's")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help="folder; default: %(default)s")
    args = parser.parse_args(argv)
    checkpoints = [folder / "best.pt" for folder in args.run] + args.checkpoint
    if not checkpoints:
        parser.error("name a --run or a --checkpoint")
    if min(args.limit_cam, 1 if args.limit_test is None else args.limit_test) < 1:
        parser.error("--limit-test and --limit-cam must be at least 1")
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    try:
        rows = []
        for checkpoint in checkpoints:
            config = read_config(checkpoint)
            place = args.data_dir or Path(config["data_dir"])
            dataset = data.load_dataset(config["dataset"], place, config.get("image_size"))
            n = len(dataset.test_images[: args.limit_test])
            if args.images and not 0 <= min(args.images) <= max(args.images) < n:
                raise ExplainError(f"--images must be from 0 to {n - 1}, the test images there are")
            numbers, drawn = explain(checkpoint, dataset, config, args)
            path = args.out / f"explain_{config['model']}_seed{config['seed']}.png"
            draw(drawn, path)
            rows.append(numbers)
            print(f"written: {path}")
        write_atomically(args.out / "explain.json", json.dumps(rows, indent=2) + "\n")
    except (data.DataError, ExplainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print_numbers(row)
    print(f"written: {args.out / 'explain.json'}")
    return 0


def print_numbers(row: dict) -> None:
    """The gist of one entry of explain.json."""
    print(
        f"\n{row['model']}, seed {row['seed']}: {row['test_acc']:.2f} % of {row['test_images']:,}"
    )
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
        f"({row['insertion_random']:.3f})"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    sys.exit(main())
