"""explain.json in the report: what the gates do, whether they carry accuracy, and the pictures.

Reads files alone and needs no torch.
"""

import json
from pathlib import Path

from studies import DAMAGED, Study, check_number, in_table_order, is_finite
from tables import Lines, image, interval, label, number, table

STAGE_NUMBERS = (
    "mean", "spread_over_channels", "spread_over_images", "saturated", "hardly_vary",
)  # fmt: skip
CAM_NUMBERS = ("deletion", "deletion_random", "insertion", "insertion_random")
# Accuracy of the same images may differ by so many points between precisions, not more.
SAME = 0.5


def read_explained(paths: list[Path]) -> tuple[list[dict], Lines]:
    """The rows of the first explain.json that exists, and what is wrong with it, in words."""
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return [], []
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            for key in ("test_acc", "test_images"):
                check_number(key, row[key])
            if row["test_acc_gates_fixed"] is not None:
                check_number("test_acc", row["test_acc_gates_fixed"])
            numbers = [row["cam_images"], row["lost"], row["won"], *(row[k] for k in CAM_NUMBERS)]
            numbers += [stage[k] for stage in row["gates"].values() for k in STAGE_NUMBERS]
            numbers += [value for value in correlations(row) if value is not None]
            if not all(map(is_finite, numbers)):
                raise ValueError("something else where a number should be")
            for key in ("model", "dataset", "recipe", "seed", "overrides"):
                row[key]
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        return [], [f"{path} left out, it is damaged ({reason}): run python explain.py again"]
    return rows, []


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
    """{file name: PNG}: the models side by side, and the first of those with gates."""
    gated = [row for row in rows if row["gates"]]
    names = ["explain_compare.png"] if len(rows) > 1 else []
    names += [f"explain_{row['model']}_seed{row['seed']}.png" for row in (gated or rows)[:1]]
    return {name: (out / name).read_bytes() for name in names if (out / name).is_file()}


def correlations(row: dict) -> list[float | None]:
    return [row["correlation_with_random_weights"][layer] for layer in ("layer3", "layer4")]


def ablation(row: dict) -> tuple[float, tuple[float, float]] | None:
    """(points that fixing the gates adds, its 95 % interval over test images); None: no gates.

    Of n images `won` are right only with gates fixed, `lost` only with gates as they are.
    """
    if row["test_acc_gates_fixed"] is None:
        return None
    n, won, lost = row["test_images"], row["won"], row["lost"]
    difference = (won - lost) / n
    error = 1.96 * max((won + lost) / n - difference**2, 0) ** 0.5 / n**0.5
    return 100 * difference, (100 * (difference - error), 100 * (difference + error))


def explained_section(study: Study, rows: list[dict], pictures: Lines) -> Lines:
    """What explain.py found of this study's runs."""
    lines = []
    for name in pictures:
        lines += [image(name), ""]
    lines += [*ablation_table(study, rows), ""]
    lines += [
        "Gates fixed: the test accuracy of the same weights with every gate at its mean over these "
        "images, whatever the image shows; the interval (95 %) is over images, of one seed. Where "
        "nothing is lost, the accuracy does not rest on gates that see the image.",
        "",
    ]
    if stages := stage_table(study, rows):
        lines += [*stages, ""]
        lines += [
            "Gates: what a module multiplies a channel by, over the images. Spread: standard "
            "deviations. Saturated: below 0.05 or above 0.95. Hardly vary: channels whose gate has "
            "a standard deviation below 0.01 from image to image.",
            "",
        ]
    lines += [*cam_table(study, rows), ""]
    return [
        *lines,
        "Grad-CAM at layer4: the mean probability of the predicted class while the pixels that it "
        "marks go first (deletion, low is good) or come first (insertion, high is good), in "
        "brackets by a random map. Random weights: correlation of the maps with those of an "
        "untrained model, which a map that explains the trained one has no reason to be near.",
    ]


def ablation_table(study: Study, rows: list[dict]) -> Lines:
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
    cells = [
        [
            label(study, f"`{row['model']}`"),
            stage,
            *(f"{numbers[key]:.3f}" for key in STAGE_NUMBERS[:3]),
            *(f"{numbers[key]:.0%}" for key in STAGE_NUMBERS[3:]),
        ]
        for row in rows
        for stage, numbers in row["gates"].items()
    ]
    header = ["model", "stage", "mean gate", "spread over channels", "over images", "saturated"]
    return table([*header, "hardly vary"], cells) if cells else []


def cam_table(study: Study, rows: list[dict]) -> Lines:
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
