"""explain.json in the report: what the gates do, whether they carry accuracy, and the pictures.

Reads files alone and needs no torch.
"""

import json
import re
from pathlib import Path

from kit.results import DAMAGED, Study, check_number, in_table_order, is_finite
from kit.tables import Lines, image, interval, label, number, table

STAGES = ("layer1", "layer2", "layer3", "layer4", "classifier")
STAGE_NUMBERS = (
    "mean", "spread_over_channels", "spread_over_images", "saturated", "hardly_vary",
)  # fmt: skip
SHARES = ("deletion", "deletion_random", "insertion", "insertion_random")
COUNTS = ("test_images", "cam_images", "lost", "won", "seed")
# Accuracy of the same images may differ by so many points between precisions, not more.
SAME = 0.5


def read_explained(paths: list[Path]) -> tuple[list[dict], Lines]:
    """The rows of the first explain.json that exists, and what is wrong with it, in words."""
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return [], []
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list):
            raise ValueError("no list")
        for row in rows:
            check(row)
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        return [], [f"{path} left out, it is damaged ({reason}): run python explain.py again"]
    return rows, []


def check(row: dict) -> None:
    """Raises one of DAMAGED."""
    for key in ("model", "dataset", "recipe", "picture"):
        if not re.fullmatch(r"[\w.+-]+", row[key]):
            raise ValueError(f"{key} is {row[key]}")
    for key in COUNTS:
        if type(row[key]) is not int or row[key] < 0:
            raise ValueError(f"{key} is {row[key]}")
    check_number("test_images", row["test_images"])
    check_number("test_acc", row["test_acc"])
    if not isinstance(row["overrides"], dict):
        raise ValueError("overrides is no object")
    fixed = row["test_acc_gates_fixed"]
    changed = 100 * (row["won"] - row["lost"]) / row["test_images"]
    if fixed is not None and not abs(fixed - row["test_acc"] - changed) < 0.01:
        raise ValueError("accuracies and counts that do not fit")
    for stage, numbers in row["gates"].items():
        if stage not in STAGES:
            raise ValueError(f"no stage is called {stage}")
        for key in STAGE_NUMBERS:
            if not (is_finite(numbers[key]) or (key == "saturated" and numbers[key] is None)):
                raise ValueError(f"{key} is {numbers[key]}")
    for value in (row[key] for key in SHARES):
        if not (is_finite(value) and 0 <= value <= 1):
            raise ValueError(f"{value} should be from 0 to 1")
    for value in correlations(row):
        if value is not None and not (is_finite(value) and -1.001 <= value <= 1.001):
            raise ValueError(f"a correlation is {value}")


def explained_of(study: Study, rows: list[dict]) -> tuple[list[dict], Lines]:
    """The rows that are of this study's runs, and those that are of other weights, in words."""
    found, problems = {}, []
    wanted = {"dataset": study.dataset, "recipe": study.recipe, "overrides": study.overrides}
    for row in rows:
        run = study.by_seed(row["model"]).get(row["seed"])
        if run is None or not wanted.items() <= row.items():
            continue
        accuracy = run.result["test_acc"] if row["test_images"] == study.n_images else None
        if run.correct is not None:
            accuracy = 100 * run.correct[: row["test_images"]].mean()
        if accuracy is not None and abs(accuracy - row["test_acc"]) > SAME:
            problems.append(
                f"explain.json: {row['model']} seed {row['seed']} left out, it has "
                f"{row['test_acc']:.2f} % where the run has {accuracy:.2f} %: run python "
                "explain.py again"
            )
        else:
            found.setdefault(row["model"], []).append(row)
    return [row for model in in_table_order(found) for row in found[model]], problems


def pictures_of(rows: list[dict], out: Path) -> dict[str, bytes]:
    """{file name: PNG}: the models side by side, and each of those with gates."""
    gated = [row for row in rows if row["gates"]]
    names = ["explain_compare.png"] if len(rows) > 1 else []
    names += [row["picture"] for row in (gated or rows[:1])]
    return {name: (out / name).read_bytes() for name in names if (out / name).is_file()}


def correlations(row: dict) -> list[float | None]:
    return [row["correlation_with_random_weights"][layer] for layer in ("layer3", "layer4")]


def ablation(row: dict) -> tuple[float, tuple[float, float]] | None:
    """(points that fixing the gates adds, its 95 % interval over test images); None: no gates.

    Of n images `won` are right only with gates fixed, `lost` only with gates as they are. The
    interval is Wald's for paired proportions with 1/2 added to each cell (Agresti and Min,
    Statistics in Medicine 24, 2005), which says something even where no image changes.
    """
    if row["test_acc_gates_fixed"] is None:
        return None
    n, won, lost = row["test_images"], row["won"], row["lost"]
    middle = (won - lost) / (n + 2)
    error = 1.96 * (won + lost + 1 - (won - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return 100 * (won - lost) / n, (100 * (middle - error), 100 * (middle + error))


def explained_section(study: Study, rows: list[dict], pictures: Lines) -> Lines:
    """What explain.py found of this study's runs."""
    lines = []
    for name in pictures:
        lines += [image(name), ""]
    lines += [*ablation_table(study, rows), ""]
    lines += [
        "Gates fixed: the test accuracy of the same weights with every gate (of each channel and "
        "position) at its mean over these images, whatever the image shows; of a module that adds, "
        "such as gc, with what it adds at its mean. The interval (95 %) is over images, of one "
        "seed. Where it holds 0, accuracy is not shown to rest on gates that see the image; a "
        "control's (`_static`) never does.",
        "",
    ]
    if stages := stage_table(study, rows):
        lines += [*stages, ""]
        lines += [
            "Gates: output / input, averaged over the positions of each channel. Spread: standard "
            "deviations. Saturated: below 0.05 or above 0.95 (-: gates not from 0 to 1). Hardly "
            "vary: channels whose gate has a standard deviation below 0.01 from image to image.",
            "",
        ]
    lines += [*cam_table(study, rows), ""]
    return [
        *lines,
        "Grad-CAM at layer4: the mean probability of the predicted class while the pixels that it "
        "marks go first (deletion, low is good) or come first (insertion, high is good), grey "
        "standing in for what is not there; in brackets by a random map as coarse. Random weights: "
        "correlation of the maps with those of an untrained model; a map that is near these says "
        "little about the trained one.",
    ]


def ablation_table(study: Study, rows: list[dict]) -> Lines:
    """Accuracy in percent with gates as they are and fixed; the difference in points."""
    cells = []
    for row in rows:
        difference = ablation(row)
        cells.append([
            label(study, f"`{row['model']}`"),
            str(row["seed"]),
            f"{row['test_images']:,}",
            f"{row['test_acc']:.2f}",
            number(row["test_acc_gates_fixed"], ".2f"),
            f"{difference[0]:+.2f} ({interval(difference[1])})" if difference else "-",
        ])  # fmt: skip
    header = ["model", "seed", "images", "accuracy %", "gates fixed", "difference"]
    return table(header, cells)


def stage_table(study: Study, rows: list[dict]) -> Lines:
    """The gates of each stage; none for a model without gates."""
    cells = [
        [
            label(study, f"`{row['model']}`"),
            stage,
            *(f"{numbers[key]:.3f}" for key in STAGE_NUMBERS[:3]),
            *(number(numbers[key], ".0%") for key in STAGE_NUMBERS[3:]),
        ]
        for row in rows
        for stage, numbers in row["gates"].items()
    ]
    header = ["model", "stage", "mean gate", "spread over channels", "over images", "saturated"]
    return table([*header, "hardly vary"], cells) if cells else []


def cam_table(study: Study, rows: list[dict]) -> Lines:
    """Grad-CAM's deletion and insertion scores (random maps'), and what random weights leave."""
    cells = [
        [
            label(study, f"`{row['model']}`"),
            f"{row['cam_images']:,}",
            f"{row['deletion']:.3f} ({row['deletion_random']:.3f})",
            f"{row['insertion']:.3f} ({row['insertion_random']:.3f})",
            *(number(value, "+.2f") for value in correlations(row)),
        ]
        for row in rows
    ]
    header = ["model", "images", "deletion", "insertion", "random weights, layer3", "layer4"]
    return table(header, cells)
