"""What TensorBoard gets, and what a browser shows of it."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import train
from kit import tensorboard_log

import numpy as np
import pytest
import torch
from conftest import REPO, train_small
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2


def test_curves_hparams_and_pictures_in_one_run(finished_run):
    assert [path for path in finished_run.rglob("*") if path.is_dir()] == []
    events = EventAccumulator(str(finished_run)).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "loss/train", "loss/val", "accuracy/train", "accuracy/val", "lr", "accuracy/test",
    }  # fmt: skip
    assert set(tags["images"]) == {"confusion_matrix", "misclassified"}
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("loss/val", "val_loss"), ("accuracy/train", "train_acc"), ("lr", "lr")):
        values = [(event.step, event.value) for event in events.Scalars(tag)]
        assert values == [(row["epoch"], pytest.approx(row[key])) for row in rows]
    (started,) = (
        plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
        for tag, metadata in events.summary_metadata.items()
        if tag.endswith("session_start_info")
    )
    hparams = {
        key: getattr(value, value.WhichOneof("kind"))
        for key, value in started.session_start_info.hparams.items()
    }
    assert hparams.keys() > train.SETTINGS.keys() | {"model", "seed", "width", "optimizer_class"}
    config = json.loads((finished_run / "config.json").read_text())
    assert all(hparams[key] == config[key] for key in train.SETTINGS)
    assert (hparams["epochs"], hparams["flip"], hparams["position"]) == (2, False, "none")


def test_confusion_matrix_counts():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    figure = tensorboard_log.draw_confusion(labels, predictions, ["a", "b", "c"], "title")
    shown = {text.get_position(): int(text.get_text()) for text in figure.axes[0].texts}
    found = list(zip(predictions.tolist(), labels.tolist()))
    assert shown == {cell: found.count(cell) for cell in itertools.product(range(3), repeat=2)}


def luminance(rgb):
    """Relative, of sRGB (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("correct", [0.53, 0.97])
@pytest.mark.parametrize("k", [2, 10, 20])
def test_every_number_of_a_confusion_matrix_can_be_read(k, correct):
    """Contrast of at least 4.5 with what is behind it, and within its cell."""
    labels = torch.randint(0, k, (2000,))
    wrong = torch.rand(2000) > correct
    figure = tensorboard_log.draw_confusion(labels, (labels + wrong) % k, list("ab" * 10)[:k], "")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    shades, cell = axes.images[0], axes.get_window_extent().width / k
    for text in axes.texts:
        behind = luminance(shades.cmap(shades.norm(int(text.get_text())))[:3])
        dark, light = sorted((behind, luminance(to_rgb(text.get_color()))))
        assert (light + 0.05) / (dark + 0.05) > 4.5
        assert text.get_window_extent().width < cell


@pytest.mark.parametrize("k", [2, 100, 200])
def test_labels_of_a_confusion_matrix_never_overlap(k):
    names = [f"a long name, too long for any figure {i}" for i in range(k)]
    figure = tensorboard_log.draw_confusion(torch.arange(k), torch.arange(k), names, "title")
    figure.draw_without_rendering()
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        extents = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert len(extents) == min(k, 100)
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(extents))
        title = axis.label.get_window_extent()
        assert min(title.x0, title.y0) > 0 and not any(map(title.overlaps, extents))


def test_misclassified_images_keep_their_shape_and_say_what_they_are():
    images = torch.zeros(5, 3, 10, 30, dtype=torch.uint8)
    figure = tensorboard_log.draw_misclassified(images, [0] * 5, [1, 1, 1, 1, 0], ["$^", "dog"])
    figure.draw_without_rendering()
    shown = [axes for axes in figure.axes if axes.images]
    titles = [axes.get_title() for axes in shown]
    assert titles[3:] == ["$^\npredicted dog", "$^\npredicted $^"]
    for axes in shown:
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(3, rel=0.01)


def test_nobody_is_told_to_open_tensorboard_to_the_network():
    """In a container it listens to all, and the port is published to this machine alone."""
    pages = [REPO / "README.md", REPO / "Dockerfile", *(REPO / "docs").glob("*.md")]
    words = "\n".join(page.read_text() for page in pages)
    ports = re.findall(r"-p\s+(\S*6006\S*)", words)
    assert "bind_all" not in words and set(ports) == {"127.0.0.1:6006:6006"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_the_curves_of_both_models(finished_run, tmp_path):
    """tensorboard --logdir runs, as it stands, in headless Chromium; a screenshot is left."""
    shutil.copytree(finished_run, tmp_path / "runs/fashion_mnist/published/cbam_blocks/seed0")
    assert train_small("se", tmp_path / "runs", "--epochs", "2") == 0
    command = [Path(sys.executable).parent / "tensorboard", "--logdir", tmp_path / "runs"]
    server = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        url = next(
            found[1]
            for line in server.stderr
            if (found := re.search(r"TensorBoard .* at (http\S+)", line))
        )
        # Without WebGL the curves are paths in the page, one for each run.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-3d-apis"]
        flags += [f"--user-data-dir={tmp_path}/profile", "--window-size=1400,1000"]
        flags += ["--virtual-time-budget=20000"]
        picture = tmp_path / "tensorboard.png"
        looked = [
            subprocess.run(
                ["chromium", *flags, what, f"{url}#timeseries"],
                capture_output=True, text=True, timeout=120,
            )
            for what in ("--dump-dom", f"--screenshot={picture}")
        ]  # fmt: skip
        page = looked[0].stdout
        assert page, (url, looked[0].stderr)
    finally:
        server.terminate()
        server.wait()
    names = set(re.findall(r"fashion_mnist/published/\w+/seed\d", page))
    assert names == {f"fashion_mnist/published/{model}/seed0" for model in ("se", "cbam_blocks")}
    for group in ("accuracy", "loss", "confusion_matrix", "misclassified"):
        assert re.search(rf">\s*{group}\s*<", page), group
    curves = re.findall(r'<path d="M[^"]*L[^"]*" style="fill: none; stroke: (rgb[^;]*);', page)
    assert len(set(curves)) == 2  # a colour each
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    for colour in set(curves):
        wanted = np.array([int(part) for part in re.findall(r"\d+", colour)])
        assert (abs(pixels - wanted).max(axis=2) < 3).sum() > 100
