"""The command line of train.py: flags for each setting of a recipe, and for the run."""

import argparse
import math
import shlex
import sys
from pathlib import Path

from kit.command_line import NAMES, is_name, make_parser
from kit.fast import MODES, PRECISIONS, choose_precision, why_not
from kit.preflight import choose_device

import torch

WIDTH = 64  # channels of the first stage, as published
# Minimum and maximum of a setting, or its choices; other numbers are from 0 to 10^9.
LIMITS = {
    "epochs": (1, 1e9), "batch_size": (1, 1e9), "lr": (1e-9, 1e9), "label_smoothing": (0, 1),
    "ema": (0, 0.999999), "erase": (0, 1), "crop": (0, 256), "randaugment": (0, 14),
    "cutmix": (0, 100), "normalize": ("half", "data"), "anneal": ("epoch", "batch"),
    "tested": ("best", "last"),
}  # fmt: skip


def number(kind: type, least: float, most: float):
    """An argparse type: an int or float within bounds."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid int value"
    return parse


def folder(text: str) -> Path:
    text.encode()  # raises ValueError if not UTF-8, which TensorBoard cannot write
    return Path(text)


def train_parser(description: str, table: dict, recipes: dict, models, data):
    """All flags of train.py, in groups. table: {setting: (published value, help)}."""
    parser = make_parser(description)
    default, count = "default: %(default)s", number(int, 1, 1e9)

    add = parser.add_argument_group("what to train").add_argument
    add("--model", required=True, choices=models.MODELS, help="see docs/attention.md")
    add("--position", choices=models.POSITIONS, help="of the attention; default: the model's own")
    add("--reduction", type=count, metavar="N",
        help="its hidden width is channels / N; default: the module's own")  # fmt: skip
    add("--width", type=count, default=WIDTH, metavar="N", help=f"channels of stage 1; {default}")
    known = ", ".join(data.DATASETS)
    add("--dataset", default="fashion_mnist", help=f"{known}, a folder or an .npz; {default}")
    add("--image-size", type=int, metavar="N", help="a folder's images are resized to N x N")
    add("--data-dir", type=folder, default=Path("data"), metavar="DIR",
        help=f"where data sets are, or are downloaded to; {default}")  # fmt: skip

    about = "Defaults are those of published, and of recipes that differ; flags override them."
    add = parser.add_argument_group("recipe", about).add_argument
    add("--recipe", default="published", choices=recipes, help=default)
    for name, (value, what) in table.items():
        values = {recipe: in_words(own.get(name, value)) for recipe, own in recipes.items()}
        others = "".join(f", {r}: {v}" for r, v in values.items() if v != in_words(value))
        text = f"{what}; default: {in_words(value)}{others}"
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, str):
            kind = {"choices": LIMITS.get(name)}
        else:
            kind = {"type": number(type(value), *LIMITS.get(name, (0, 1e9)))}
            kind["metavar"] = "N" if isinstance(value, int) else "X"
        add(f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), **kind)

    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=number(int, 0, 1e9), default=0, metavar="N",
        help=f"of split, initial weights, order of images, augmentation; {default}")  # fmt: skip
    add("--runs", type=folder, default=Path("runs"), metavar="DIR", help=f"of all runs; {default}")
    add("--target-acc", type=number(float, 1, 100), metavar="PERCENT",
        help="exit with code 1 if test accuracy is below: 92 is 92%%")  # fmt: skip
    add("--overwrite", action="store_true", help="discard what the run's folder holds")
    add("--dry-run", action="store_true",
        help="train, validate and test on one batch each; keeps no run")  # fmt: skip

    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--precision", default="auto", choices=["auto", *PRECISIONS],
        help="auto: bf16 on GPUs made for it, otherwise fp32; see docs/speed.md")  # fmt: skip
    add("--mode", default="auto", choices=["auto", *MODES],
        help="auto: compile if the run is long enough, and a CUDA graph on GPUs")  # fmt: skip
    return parser


def in_words(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def as_flag(setting: tuple) -> str:
    name, value = setting
    name = name.replace("_", "-")
    return f"--{'no-' * (not value)}{name}" if isinstance(value, bool) else f"--{name}={value}"


def parse_settings(argv, description, table, recipes, models, data) -> argparse.Namespace:
    """All settings, resolved: explicit flags win over the recipe. Exits with 2 on wrong usage.

    models, data: the scripts, passed in because they import kit.
    """
    parser = train_parser(description, table, recipes, models, data)
    argv = sys.argv[1:] if argv is None else argv
    settings = parser.parse_args(argv)
    recipe = {name: value for name, (value, _) in table.items()} | recipes[settings.recipe]
    if unknown := [name for name in recipe if name not in settings]:
        parser.error(f"recipe {settings.recipe}: {unknown[0]} is no setting")
    flags, prog = [*map(as_flag, recipe.items())], parser.prog
    parser.prog += f", recipe {settings.recipe}"  # its values are checked as flags are
    recipe = vars(parser.parse_args([f"--model={settings.model}", *flags]))
    parser.prog = prog
    settings = parser.parse_args([*flags, *argv])
    if settings.dry_run:
        settings.epochs, settings.warmup = 1, 0
        settings.limit_train = settings.limit_test = settings.batch_size
    if settings.warmup >= settings.epochs:
        parser.error(f"--warmup {settings.warmup} must be less than --epochs {settings.epochs}")
    for name in (settings.model, settings.recipe):
        if not is_name(name):
            parser.error(f"rename {name!r}: {NAMES}")
    try:
        models.find_module(settings.model, settings.position, settings.reduction)
        found = data.resolve(settings.dataset, settings.image_size)
        settings.dataset, settings.dataset_name = found
        settings.device = choose_device(settings.device)
    except ValueError as error:
        parser.error(str(error))
    if impossible := why_not(settings.mode, settings.precision, settings.device):
        parser.error(impossible)
    settings.auto_precision = settings.precision == "auto"
    settings.precision = choose_precision(settings.precision, settings.device)
    settings.base_model = settings.model  # without the suffixes below
    settings.model += f"_{settings.position}" if settings.position else ""
    settings.model += f"_r{settings.reduction}" if settings.reduction else ""
    # What differs from the recipe: the report keeps such runs apart.
    own = {name: recipe[name] for name in table} | {"width": WIDTH}
    own["precision"] = choose_precision("auto", settings.device)
    settings.overrides = {k: v for k in own if (v := getattr(settings, k)) != own[k]}
    # What differs from the defaults, by a flag or by the recipe.
    settings.chosen = [k for k, (value, _) in table.items() if getattr(settings, k) != value]
    # A smoke test is shorter than its recipe; the report marks all its results as such.
    length = ("epochs", "patience", "limit_train", "limit_test")  # 0: no limit
    settings.quick = settings.recipe == "quick" or any(
        (getattr(settings, key) or math.inf) < (recipe[key] or math.inf) for key in length
    )
    settings.command = shlex.join(["python", "train.py", *argv])
    return settings


def as_config(settings: argparse.Namespace) -> dict:
    """The settings as saved in config.json."""
    special = (Path, torch.device)
    return {k: str(v) if isinstance(v, special) else v for k, v in vars(settings).items()}
