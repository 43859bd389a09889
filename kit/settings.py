"""Recipes, and the settings of a run from the command line of train.py.

To add a recipe: one line in RECIPES, with other values for the settings of PUBLISHED.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

import data
from kit.environment import choose_device
from models import MODELS, PLACES, REPLACING, name_of
from kit.modes import MODES, PRECISIONS, why_not
from kit.training_step import choose_precision

PUBLISHED = dict(
    epochs=50,  # also the length of the cosine schedule of the learning rate
    batch_size=64,  # the last partial batch is kept
    lr=1e-3,  # Adam's; there is no weight decay
    patience=10,  # stop when validation accuracy has not improved for so many epochs
    limit_train=None,  # images taken of the training split, None: all. Validation then takes a
    # ninth of that number, or a batch if that is more
    limit_test=None,  # images taken of the test set; None: all
    # The published recipe has none of these. None: not used.
    weight_decay=None,  # of AdamW, for all but biases and BatchNorm
    warmup=None,  # epochs in which the learning rate rises to lr
    label_smoothing=None,
    ema=None,  # decay of the weights' moving average, which is then what is tested
    normalize=None,  # "data": by the data's mean and standard deviation; None: to [-1, 1]
    crop=None,  # this and the following: see augment.py
    flip=None,
    randaugment=None,
    erase=None,
    cutmix=None,
    mixup=None,
)
AUGMENTATIONS = ("crop", "flip", "randaugment", "erase", "cutmix", "mixup")
# Chosen on validation images at width 16, in 16 epochs of half the images: see the README.
STRONG = PUBLISHED | dict(
    patience=50,
    lr=2e-3,
    weight_decay=0.05,
    warmup=3,
    label_smoothing=0.1,
    ema=0.999,
    normalize="data",
    crop=2,
    flip=True,
    erase=0.25,
)
RECIPES = {
    "published": PUBLISHED,
    "quick": PUBLISHED | dict(epochs=1, limit_train=1920, limit_test=1000),
    "strong": STRONG,
}
WIDTH = 64  # channels of the first stage, as published


def make_parser(description: str) -> argparse.ArgumentParser:
    """All flags of train.py."""

    def within(least, most, kind):
        def parse(text):
            value = kind(text)
            if not least <= value <= most:
                raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
            return value

        parse.__name__ = kind.__name__  # argparse then says "invalid int value"
        return parse

    def folder(text):
        text.encode()  # raises ValueError for what is not UTF-8, which TensorBoard cannot write
        return Path(text)

    def of_recipe(key):
        none = "all" if key.startswith("limit") else "none"
        values = (f"{name}: {recipe[key] or none}" for name, recipe in RECIPES.items())
        return f"default: the recipe's ({', '.join(values)})"

    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, "default: %(default)s"
    count = within(1, 10**9, int)
    add("--model", choices=MODELS)
    add("--place", choices=[place for place in PLACES if place not in REPLACING],
        help="put the model's attention there instead: models.PLACES")  # fmt: skip
    add("--reduction", type=count, help="of the module's hidden width; default: the module's own")
    add(
        "--dataset",
        default="fashion_mnist",
        metavar="NAME",
        help=f"{', '.join(data.DATASETS)}, or a folder of images (image_folder.py); {default}",
    )
    add("--image-size", type=int, help="pixels to which the images of a folder are brought")
    add("--data-dir", type=folder, default=Path("data"), help=default)
    add("--recipe", default="published", choices=RECIPES, help=default)
    add("--epochs", type=count, help=of_recipe("epochs"))
    add("--batch-size", type=count, help=of_recipe("batch_size"))
    add("--lr", type=within(1e-9, 1e9, float), help=of_recipe("lr"))
    add("--patience", type=count, help=of_recipe("patience"))
    add("--limit-train", type=count, help=of_recipe("limit_train"))
    add("--limit-test", type=count, help=of_recipe("limit_test"))
    share, alpha = within(0, 1, float), within(0, 100, float)
    for name, kind, what in (
        ("weight_decay", within(0, 1e3, float), "AdamW's, for all but biases and BatchNorm"),
        ("warmup", within(0, 10**9, int), "epochs of rising learning rate"),
        ("label_smoothing", share, "share of the labels that goes to all classes"),
        ("ema", share, "decay of the moving average of the weights, which is what is tested"),
        ("crop", within(0, 256, int), "pixels of border that random crops may take in"),
        ("randaugment", within(0, 14, int), "operations an image"),
        ("erase", share, "share of images of which a rectangle is erased"),
        ("cutmix", alpha, "alpha of the shares of mixed images"),
        ("mixup", alpha, "likewise; with both, an image takes one of the two"),
    ):
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=kind, help=f"{what}; 0: none; {of_recipe(name)}")
    flips = f"mirror images with probability 1/2; {of_recipe('flip')}"
    add("--flip", action=argparse.BooleanOptionalAction, help=flips)
    kinds = f"half: to [-1, 1]; data: by mean and deviation; {of_recipe('normalize')}"
    add("--normalize", choices=["half", "data"], help=kinds)
    add("--seed", type=within(0, 10**9, int), default=0, help=f"split, order, weights; {default}")
    add("--width", type=count, default=WIDTH, help=f"channels of stage 1; {default}")
    add(
        "--precision",
        default="auto",
        choices=["auto", *PRECISIONS],
        help="auto: bf16 on a GPU of compute capability 8.0 or more, else fp32",
    )
    add(
        "--mode",
        default="auto",
        choices=["auto", *MODES],
        help="how a training step is run (modes.py); auto: by device and length of the run",
    )
    add("--device", default="auto", help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N")
    add("--runs", type=folder, default=Path("runs"), help=f"folder of all runs; {default}")
    add(
        "--target-acc",
        type=within(0, 100, float),
        help="exit 1 if test accuracy (percent) is below this",
    )
    add("--overwrite", action="store_true", help="discard what the run's folder holds")
    add("--keep-last", action="store_true", help="keep last.pt when the run is complete")
    add(
        "--dry-run",
        action="store_true",
        help="one batch each of training, validation and test; keeps nothing",
    )
    add(
        "--self-check",
        action="store_true",
        help="compare every mode, or --mode and --precision, with eager mode; train nothing",
    )
    return parser


def parse_settings(argv: list[str] | None, description: str = __doc__) -> argparse.Namespace:
    """All settings, resolved: explicit flags win over the recipe. Exits with 2 on wrong usage."""
    parser = make_parser(description)
    settings = parser.parse_args(argv)
    if not (settings.model or settings.self_check):
        parser.error("--model is missing: choose from " + ", ".join(MODELS))
    if wrong := data.what_is_wrong_with(settings.dataset, settings.image_size):
        parser.error(wrong)
    if data.is_folder(settings.dataset):
        settings.dataset = str(Path(settings.dataset).resolve())
    settings.base_model = settings.model
    if settings.model and (settings.place or settings.reduction):
        try:
            settings.model = name_of(settings.model, settings.place, settings.reduction)
        except ValueError as error:
            parser.error(str(error))
        if settings.model in MODELS:  # said in other words
            settings.base_model, settings.place, settings.reduction = settings.model, None, None
        elif not settings.model.endswith(f"_r{settings.reduction}"):
            settings.reduction = None  # the module's own
    recipe = RECIPES[settings.recipe]
    for key, value in recipe.items():
        if getattr(settings, key) is None:
            setattr(settings, key, value)
    for key in recipe.keys() - {"limit_train", "limit_test"}:
        if getattr(settings, key) in (0, False, "half"):
            setattr(settings, key, None)  # not used: one way to say it
    if settings.dry_run:
        settings.epochs, settings.warmup = 1, None
        settings.limit_train = settings.limit_test = settings.batch_size
    if (settings.warmup or 0) >= settings.epochs:
        parser.error(f"--warmup {settings.warmup} must be less than --epochs {settings.epochs}")
    if settings.ema == 1:
        parser.error("--ema 1 would never take in new weights: use less")
    try:
        settings.device = choose_device(settings.device)
    except ValueError as error:
        parser.error(str(error))
    if impossible := why_not(settings.mode, settings.precision, settings.device):
        parser.error(impossible)
    if settings.self_check:
        settings.self_check = (settings.mode, settings.precision)  # as asked for, auto: all
        if settings.self_check == ("eager", "fp32"):
            parser.error("--self-check: eager fp32 is what the others are compared with")
    settings.precision = choose_precision(settings.precision, settings.device)
    # What differs from the recipe: the report keeps such runs apart.
    own = recipe | dict(width=WIDTH, precision=choose_precision("auto", settings.device))
    chosen = {key: getattr(settings, key) for key in own}
    settings.overrides = {key: value for key, value in chosen.items() if value != own[key]}
    # Whether it is a look rather than a result: the report says so wherever it shows its figures.
    settings.quick = bool(
        settings.limit_train
        or settings.limit_test
        or settings.epochs < PUBLISHED["epochs"]
        or settings.patience < PUBLISHED["patience"]
        or settings.width != WIDTH
    )
    settings.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    return settings


def as_config(settings: argparse.Namespace) -> dict:
    """The settings as they stand in config.json."""
    special = (Path, torch.device)
    return {k: str(v) if isinstance(v, special) else v for k, v in vars(settings).items()}
