"""What TensorBoard gets, and what a browser shows of it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_small
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kit import tensorboard_log
from kit.attribution import gates_of
from models import build_model


def test_curves_hparams_pictures_and_gates_in_one_run(finished_run):
    assert [path for path in finished_run.rglob("*") if path.is_dir()] == []
    events = EventAccumulator(str(finished_run)).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "loss/train", "loss/val", "accuracy/train", "accuracy/val", "lr", "accuracy/test",
    }  # fmt: skip
    assert set(tags["images"]) >= {"confusion_matrix", "misclassified"}
    assert any(tag.startswith("grad_cam") for tag in tags["images"])
    assert set(tags["histograms"]) == {f"gates/layer{i}" for i in (1, 2, 3, 4)}
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("loss/val", "val_loss"), ("accuracy/train", "train_acc"), ("lr", "lr")):
        values = [(event.step, event.value) for event in events.Scalars(tag)]
        assert values == [(row["epoch"], pytest.approx(row[key])) for row in rows]
    plugins = events.summary_metadata
    assert any("hparams" in str(metadata.plugin_data) for metadata in plugins.values())


def test_confusion_matrix_counts():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    figure = tensorboard_log.draw_confusion(labels, predictions, ["a", "b", "c"], "title")
    shown = {text.get_position(): int(text.get_text()) for text in figure.axes[0].texts}
    expected = {(p, t): 0 for p in range(3) for t in range(3)}
    for label, prediction in zip(labels.tolist(), predictions.tolist()):
        expected[prediction, label] += 1
    assert shown == expected


def test_gates_of_a_stage_are_those_of_all_its_blocks():
    model, images = build_model("se", width=16, seed=0), torch.randn(3, 1, 28, 28)
    found = tensorboard_log.gates_by_stage(model, images)
    one_by_one = gates_of(model, images)[1]
    assert list(found) == ["layer1", "layer2", "layer3", "layer4"]
    both = [one_by_one[f"layer2.{i}.attention"].flatten() for i in (0, 1)]
    torch.testing.assert_close(found["layer2"], torch.cat(both))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_shown_with_their_maps(channels):
    images = torch.randint(0, 256, (2, channels, 8, 6), dtype=torch.uint8)
    maps = {"layer3": torch.rand(2, 4, 3), "layer4": torch.zeros(2, 2, 2)}
    found = tensorboard_log.with_maps(images, maps)
    assert found.shape == (2, 3, 32 + 16, 72 + 16) and found.min() >= 0 and found.max() <= 1
    left = (images.float() / 255).expand(-1, 3, -1, -1)
    torch.testing.assert_close(found[:, :, :32:4, :24:4].float(), left)


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
    for group in ("accuracy", "loss", "gates", "grad_cam", "confusion_matrix", "misclassified"):
        assert re.search(rf">\s*{group}\s*<", page), group
    curves = re.findall(r'<path d="M[^"]*L[^"]*" style="fill: none; stroke: (rgb[^;]*);', page)
    assert len(set(curves)) == 2  # a colour each
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    for colour in set(curves):
        wanted = np.array([int(part) for part in re.findall(r"\d+", colour)])
        assert (abs(pixels - wanted).max(axis=2) < 3).sum() > 100
