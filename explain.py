"""What a trained model looks at: Grad-CAM, the gates of its attention, and what they are worth.

    python explain.py --run runs/fashion_mnist/published/se/seed0
    python explain.py --checkpoint PATH/best.pt --images 3 17 42 --out results
    python explain.py --compare RUN RUN RUN           # models side by side on the same images

Writes OUT/explain.json, which becomes a section of the report (rows of other runs stay in it), and
pictures: Grad-CAM of the predicted class, gates that depend on the position, and each channel's
mean gate by class. They show --images, by default for each class the first that the (first) model
gets right, and wrong. Half a minute for a model of full width on two CPU cores. Nothing else is
written: the data folder that a run's config.json names is only read.

A run is explained with its own weights and images: if too many predictions are not those that it
left in test_predictions.npy, it is refused.

Numbers, over --limit-test images: mean, spread and saturation of the gates, and the accuracy with
every gate replaced by its mean over the images (gate ablation).
"""

import argparse
import hashlib
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

import data
from kit import attribution
from kit.checkpoint import load_weights
from kit.command_line import UserError, exit_code, in_one_line, is_name, make_parser, noted
from kit.environment import source_hashes
from kit.fast import channels_last, set_up_torch
from kit.files import check_writable, locked, only_read, read_small, write_atomically
from kit.finished import COUNT, check, digest_of, read_classes
from kit.identity import settings_of
from kit.pictures import Explained, draw_comparison, draw_model
from kit.plots import legible
from kit.preflight import choose_device, preflight
from kit.results import rows_that_stay
from models import build_model

import torch
import torch.nn as nn
from tqdm import tqdm

LIMIT_TEST = 2000
CLASSES_SHOWN = 10
# What is used of a config.json, and what older ones lack.
KINDS = {
    str: "model dataset data_dir base_model position? recipe?", dict: "overrides",
    int: "width seed", COUNT: "limit_test? image_size? reduction?",
}  # fmt: skip
DEFAULTS = {"overrides": {}, "quick": False}
DEFAULTS |= dict.fromkeys(("limit_test", "image_size", "position", "reduction", "recipe"))
CODE = (  # that --keep compares
    "explain.py", "models.py", "data.py", "kit/attention.py", "kit/attribution.py",
    "kit/pictures.py",
)  # fmt: skip
TOLERANCE = 0.01  # share of predictions that rounding may change: a run may have been in bfloat16


def read_config(path: Path) -> dict:
    """The settings of the run that the checkpoint `path` belongs to. Raises UserError."""
    try:
        config = json.loads(read_small(path.parent / "config.json"))
        place = config.get("place")  # as older runs call the position
        config = check(
            DEFAULTS | {"base_model": config["model"], "position": place} | config, KINDS
        )
        if not 0 <= config["seed"] <= 1e9:
            raise ValueError("seed is not from 0 to 10^9")
        if not 1 <= config["width"] <= 2**16 or not is_name(config["model"]):
            raise ValueError(f"no model {config['model']} has width {config['width']}")
        if not re.fullmatch(r"[\w.+-]+", config["recipe"] or "none"):  # it may name the pictures
            raise ValueError(f"recipe is {config['recipe']}")
        if not config["data_dir"].isprintable():
            raise ValueError(f"data_dir is {config['data_dir']!a}")
    except Exception as error:  # whatever a damaged file leads to
        reason = f"config.json: {in_one_line(error)}"
        raise UserError(f"{path.parent} is not the folder of a run: {reason}") from None
    return config


def load_dataset(configs: list[dict], args) -> tuple[data.ImageData, torch.Tensor]:
    """(what all the runs were trained on, indices of the test images used). Raises UserError."""
    first, n_test = configs[0], [config["limit_test"] for config in configs if config["limit_test"]]
    name, folder = args.dataset or first["dataset"], args.data_dir or Path(first["data_dir"])
    try:
        with only_read(*[] if args.data_dir else [folder]):  # a config.json may name any folder
            dataset = data.load_dataset(name, folder, first["image_size"])
    except (UserError, PermissionError) as error:
        raise UserError(f"{error}; --dataset and --data-dir say where the images are now") from None
    for path, config in zip(args.paths, configs, strict=True):
        if settings_of(config).get("data") not in (None, dataset.digest):
            raise UserError(f"{path.parent} was trained on other images or labels than {name}")
    n = min(args.limit_test or LIMIT_TEST, *n_test, len(dataset.test_labels))
    return dataset, data.stratified(dataset.test_labels, n)


def key_of(row: dict) -> str:
    """Which run a row of explain.json, or a config, is of: two rows of one run are the same row."""
    dataset = settings_of(row)["dataset_name"]
    return json.dumps([dataset, *(row.get(k) for k in ("recipe", "overrides", "model", "seed"))])


def names_of(configs: list[dict], taken: set[str] = frozenset()) -> list[str]:
    """For each run "se_seed0", say, with more where two would have the same name, or where it is
    taken by a picture of another run."""
    names = [f"{config['model']}_seed{config['seed']}" for config in configs]
    for more in ([config.get("recipe") for config in configs], range(1, len(configs) + 1)):
        pairs = zip(names, more, strict=True)
        names = [f"{name}_{m}" if names.count(name) > 1 else name for name, m in pairs]
    digests = [hashlib.sha256(key_of(config).encode()).hexdigest()[:6] for config in configs]
    return [
        f"{name}_{digest}" if f"explain_{name}.png" in taken else name
        for name, digest in zip(names, digests, strict=True)
    ]


def load_model(path: Path, config: dict, dataset: data.ImageData) -> nn.Module:
    """The model with the weights in `path`. Raises UserError."""
    shape = len(dataset.classes), dataset.test_images.shape[1], config["width"]
    try:
        more = {key: config[key] for key in ("position", "reduction")}
        model = build_model(config["base_model"], *shape, **more)
    except ValueError as error:
        raise UserError(f"{path.parent / 'config.json'}: {error}") from None
    try:
        model.load_state_dict(load_weights(path))
    except UserError:
        raise
    except Exception as error:  # damaged files raise what they like
        raise UserError(
            f"{path} does not load as {config['model']} ({in_one_line(error)}): train it (Git "
            "keeps no weights)"
        ) from None
    return channels_last(model).eval()


def check_predictions(path: Path, config: dict, dataset, idx, predictions) -> str | None:
    """Raises UserError if `predictions` of the test images `idx` are not those that the run has
    left; the digest of these, None where there are none."""
    own = data.stratified(dataset.test_labels, config["limit_test"] or len(dataset.test_labels))
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # none, or an older run's
        weights = json.loads(read_small(path.parent / "result.json")).get("weights")
        if weights not in (None, sha256_of(path)):
            raise UserError(f"{path} is not the one of the run, by its sha256 in result.json")
    try:
        left = read_classes(path.parent / "test_predictions.npy", {"test_images": len(own)})
    except ValueError as error:
        raise UserError(f"{path.parent} is damaged ({error}): train it again") from None
    if left is None:
        print(f"note: {path.parent} has no test_predictions.npy to compare with", file=sys.stderr)
        return None
    differ = (left[torch.searchsorted(own, idx).numpy()] != predictions.cpu().numpy()).sum()
    if differ > max(1, TOLERANCE * len(idx)):
        raise UserError(
            f"{path}: {differ:,} of {len(idx):,} predictions are not those of the run: it was "
            "trained with other weights, code or images than there are now"
        )
    if differ:
        print(f"note: {path}: {differ:,} predictions of {len(idx):,} differ", file=sys.stderr)
    return digest_of(left)


def explain(name: str, path: Path, config: dict, dataset: data.ImageData, idx, args):
    """(a row of explain.json, what is drawn), over the test images idx. Fills in args.images, also
    indices of test images, where it is None.

    Raises UserError.
    """
    model = load_model(path, config, dataset).to(args.device)
    mean_and_std = dataset.mean_and_std(config.get("normalize"), args.device)

    def normalized(idx):
        return data.normalize(dataset.test_images[idx].to(args.device), *mean_and_std)

    labels, images = dataset.test_labels[idx].to(args.device), normalized(idx)
    probabilities, gates, means = attribution.gates_of(model, images)
    if not probabilities.isfinite().all():
        raise UserError(f"{path}: its outputs are not all finite, there is nothing to explain")
    if unknown := len(attribution.attention_modules(model).keys() - means.keys()):
        what = f"{unknown} modules neither gate their input nor add one vector to it"
        print(f"note: {config['model']}: {what}: nothing is said of them", file=sys.stderr)
    predictions = probabilities.argmax(1)
    predicted = check_predictions(path, config, dataset, idx, predictions)
    if args.images is None:  # other models are shown the same
        args.images = idx[chosen(labels, predictions)].tolist()
    numbers = {
        "model": config["model"],
        "dataset": settings_of(config)["dataset_name"],
        **{key: config[key] for key in ("recipe", "overrides", "quick", "seed")},
        "test_images": len(labels),
        **ablation(model, images, labels, predictions, means),
        "gates": attribution.gate_numbers(gates),
        "images": args.images,
        "picture": f"explain_{name}.png",
        "predictions": predicted,
        "asked": asked(path, config, args),
        "compared": [],
    }
    shown, size = normalized(args.images), images.shape[2:]
    probabilities = attribution.predict(model, shown)
    predictions = probabilities.argmax(1)
    cams = attribution.grad_cam(model, shown, predictions)
    more = name.removeprefix(f"{config['model']}_seed").replace("_", ", ")
    words = f"{config['model']}, seed {more}"
    return numbers, Explained(
        name=words + ", smoke test" * bool(numbers["quick"]),
        classes=legible(dataset.classes),
        pixels=dataset.test_images[args.images],
        labels=dataset.test_labels[args.images].tolist(),
        predictions=predictions.tolist(),
        probabilities=probabilities.amax(1).tolist(),
        cams={k: attribution.enlarged(attribution.scaled(m), size).cpu() for k, m in cams.items()},
        gate_maps=attribution.gate_maps_of(model, shown),
        gates_by_class=attribution.gates_by_class(gates, labels.cpu(), len(dataset.classes)),
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


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def asked(path: Path, config: dict, args) -> dict:
    """What a row of explain.json was asked for; weights and code by content."""
    own = {"limit_test": args.limit_test, "limit_cam": args.limit_cam, "images": args.asked}
    weights, of_data = sha256_of(path) if path.is_file() else None, settings_of(config).get("data")
    return own | {"code": source_hashes(CODE), "data": of_data, "weights": weights}


def is_kept(rows: list[dict], configs: list[dict], args) -> bool:
    """Whether these runs are among the rows, with the same data, predictions and weights, which
    results that were committed and cloned lack."""
    by_key, keys = {key_of(row): row for row in rows}, list(map(key_of, configs))
    try:
        for path, config, key in zip(args.paths, configs, keys, strict=True):
            row, wanted = by_key[key], asked(path, config, args)
            wanted["weights"] = wanted["weights"] or row["asked"]["weights"]
            left = read_classes(path.parent / "test_predictions.npy", {"test_images": None})
            if (
                row["asked"] != wanted
                or not (args.out / row["picture"]).is_file()
                or (left is not None and digest_of(left) != row["predictions"])
                or (len(keys) > 1 and row["compared"] != keys)
            ):
                return False
        return len(keys) == 1 or (args.out / "explain_compare.png").is_file()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings, the device resolved. Exits with 2 on wrong usage."""
    parser = make_parser(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, nargs=1, dest="runs", help="a run's folder")
    which.add_argument("--checkpoint", type=Path, help="a best.pt, in its run's folder")
    which.add_argument("--compare", type=Path, nargs="+", dest="runs", metavar="RUN", help="runs")
    add("--images", type=int, nargs="+", metavar="I", help="to show: of the test set, from 0")
    add("--limit-test", type=int, help=f"test images; default: the run's, up to {LIMIT_TEST:,}")
    add("--limit-cam", type=int, default=100, help=f"of these, images for Grad-CAM; {default}")
    add("--dataset", help="a name or the images' folder; default: the run's")
    add("--data-dir", type=Path, help="default: the run's")
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("results"), help=f"folder; {default}")
    add("--keep", action="store_true", help="do nothing if OUT/explain.json has these runs")
    add("--overwrite", action="store_true", help="discard its rows of other runs")
    args = parser.parse_args(argv)
    limit_test = 1 if args.limit_test is None else args.limit_test
    if min(args.limit_cam, limit_test, *(i + 1 for i in args.images or [])) < 1:
        parser.error("--limit-test and --limit-cam must be at least 1, --images at least 0")
    if len(set(map(Path.resolve, args.runs or []))) < len(args.runs or []):
        parser.error("--compare: a run is named twice")
    args.asked = args.images  # or None; explain() fills in which are shown
    try:
        args.device = choose_device(args.device)
        data.resolve(args.dataset or "fashion_mnist")
    except ValueError as error:
        parser.error(str(error))
    return args


@exit_code
def main(argv: list[str] | None = None) -> None:
    """The script, with `argv` in place of the command line."""
    args = parse(argv)
    set_up_torch("fp32")
    args.paths = [folder / "best.pt" for folder in args.runs or []] or [args.checkpoint]
    configs = [read_config(path) for path in args.paths]
    check_writable(args.out)
    preflight(args.device, args.out)
    with locked(args.out, "explain*"):
        rows = [] if args.overwrite else rows_that_stay(args.out / "explain.json")
        if args.keep and is_kept(rows, configs, args):
            print(f"kept: {args.out / 'explain.json'}")
            return
        keys = list(map(key_of, configs))
        others = [row for row in rows if key_of(row) not in keys]
        names = names_of(configs, {row["picture"] for row in others})
        dataset, idx = load_dataset(configs, args)
        if args.images and max(args.images) >= len(dataset.test_labels):
            raise UserError(f"--images must be from 0 to {len(dataset.test_labels) - 1}")
        runs = list(zip(names, args.paths, configs, strict=True))
        found = [explain(*run, dataset, idx, args) for run in tqdm(runs, disable=None, leave=False)]
        new, drawn = zip(*found, strict=True)
        for row, explained in found:
            with noted(f"no {row['picture']}"):
                draw_model(explained, drawn[0], args.out / row["picture"])
            print(
                f"{explained.name}: {row['test_acc']:.2f}% of {row['test_images']:,} images; "
                f"gates replaced by their mean: {row['lost']} lost, {row['won']} won"
            )
        if len(runs) > 1:
            with noted("no explain_compare.png"):
                draw_comparison(drawn, args.out / "explain_compare.png")
        for row in [*others, *new] if len(runs) > 1 else []:  # whom that picture shows
            row["compared"] = keys if row in new else []
        body = json.dumps([*others, *new], indent=2, allow_nan=False) + "\n"
        write_atomically(args.out / "explain.json", body)
        print(f"written: {args.out / 'explain.json'} and its pictures")


if __name__ == "__main__":
    sys.exit(main())
