"""Grad-CAM against its closed form and captum, gates against formulas, and the real script."""

import argparse
import itertools
import json
import os
import re
import shutil

import data
import explain
import train
from kit import attribution, pictures
from kit.attribution import attention_modules, gate_maps_of, gate_numbers, gates_of, replaced
from kit.command_line import UserError
from kit.runs import read_run
from models import ATTENTION, MODELS, build_model

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import REPO, is_one_line, train_small
from matplotlib.text import Text
from test_image_folder import make

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
CLASSES = torch.arange(6)


def opened(name, **more):
    """A model whose BatchNorms do something, in evaluation mode."""
    torch.manual_seed(0)
    model = build_model(name, width=8, seed=0, **more)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", ["baseline", "se", "cbam_blocks"])
def test_the_last_map_has_a_closed_form(name):
    """Global pooling and a linear layer: relu(sum_k W[c, k] A_k) / (HW)."""
    model, outputs = opened(name), []
    with torch.no_grad(), model.layer4.register_forward_hook(lambda *seen: outputs.append(seen[2])):
        model(IMAGES)
    (activation,) = outputs
    weights = model.fc.weight[CLASSES][:, :, None, None]
    expected = F.relu((weights * activation).sum(1)) / activation[0, 0].numel()
    found = attribution.grad_cam(model, IMAGES, CLASSES)["layer4"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7)
    assert found.amax() > 0


def test_grad_cam_equals_captum_s():
    attr = pytest.importorskip("captum.attr", reason="needs captum")
    model = opened("cbam_blocks")
    found = attribution.grad_cam(model, IMAGES, CLASSES)
    for layer in attribution.LAYERS:
        theirs = attr.LayerGradCam(model, getattr(model, layer)).attribute(
            IMAGES, CLASSES, relu_attributions=True
        )
        torch.testing.assert_close(found[layer], theirs[:, 0].detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_channels_are_drawn(channels):
    images = torch.randint(0, 256, (2, channels, 5, 6), dtype=torch.uint8)
    shown = [0, 0, 0] if channels < 3 else [0, 1, 2]
    assert torch.equal(pictures.rgb(images), images[:, shown].permute(0, 2, 3, 1))


def test_grad_cam_leaves_nothing_behind():
    model = opened("se").train()
    with torch.no_grad():
        attribution.grad_cam(model, IMAGES, CLASSES)
    assert model.training and not any("forward" in vars(m) for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_empty_map_stays_empty():
    model = opened("baseline")
    nn.init.constant_(model.fc.weight, -1.0)  # nothing speaks for any class
    maps = attribution.grad_cam(model, IMAGES, CLASSES)["layer4"]
    assert torch.equal(maps, torch.zeros_like(maps))
    assert torch.equal(attribution.scaled(maps), torch.zeros_like(maps))
    everywhere = attribution.scaled(maps + 3)
    assert torch.equal(everywhere, torch.ones_like(maps))


class Gated(nn.Module):
    """A model of one module, and of a number for each image."""

    def __init__(self, module):
        super().__init__()
        self.attention = module

    def forward(self, x):
        return self.attention(x).mean((2, 3))


def test_gates_are_those_of_the_formulas():
    x = torch.randn(4, 16, 5, 6)
    se = ATTENTION["se"](16).eval()
    gate = torch.sigmoid(se.fc2(F.relu(se.fc1(x.mean((2, 3))))))
    _, found, means = gates_of(Gated(se), x)
    torch.testing.assert_close(found["attention"], gate)
    mean = gate.mean(0)[:, None, None].expand(16, 5, 6)
    torch.testing.assert_close(means["attention"], mean)
    assert gate_maps_of(Gated(se), x) == {}  # it does not tell positions apart

    cbam = ATTENTION["cbam"](16).eval()
    nn.init.normal_(cbam.spatial.bn.weight)
    inside = {}
    cbam.spatial.register_forward_hook(lambda _, i, o: inside.update(inputs=i[0], outputs=o))
    _, found, means = gates_of(Gated(cbam), x)
    maps = gate_maps_of(Gated(cbam), x)["classifier"]
    cbam.eval()(x)
    of_channels = inside["inputs"] / x  # both constant over the other's dimensions
    of_positions = inside["outputs"] / inside["inputs"]
    expected = of_positions[:, 0] * of_channels.mean((1, 2, 3))[:, None, None]
    torch.testing.assert_close(maps, expected)
    expected = of_channels[:, :, 0, 0] * of_positions[:, 0].mean((1, 2))[:, None]
    torch.testing.assert_close(found["attention"], expected, rtol=1e-4, atol=1e-5)
    product = (of_channels * of_positions).mean(0)
    torch.testing.assert_close(means["attention"], product, rtol=1e-4, atol=1e-5)


def test_where_nothing_comes_in_nothing_is_said_of_the_gate():
    x = torch.rand(6, 4, 3, 3)
    x[:2, 0] = 0
    x[:, 1] = 0
    _, found, means = gates_of(Gated(ATTENTION["se"](4).eval()), x)
    unknown = torch.zeros(6, 4, dtype=torch.bool)
    unknown[:2, 0] = unknown[:, 1] = True
    assert torch.equal(found["attention"].isnan(), unknown)
    assert torch.equal(means["attention"][1], torch.ones(3, 3))
    numbers = gate_numbers(found)["classifier"]
    known = found["attention"][:, [0, 2, 3]]
    assert numbers["mean"] == pytest.approx(known.nanmean().item(), rel=0.05)
    assert all(value == value for value in numbers.values())


def test_a_position_without_input_does_not_hide_the_map():
    cbam = ATTENTION["cbam"](8).eval()
    nn.init.normal_(cbam.spatial.bn.weight)
    x = torch.rand(2, 8, 5, 5)
    x[0, :, 2, 3] = 0
    maps = gate_maps_of(Gated(cbam), x)["classifier"]
    assert maps.isnan().nonzero().tolist() == [[0, 2, 3]]
    _, found, _ = gates_of(Gated(cbam), torch.zeros(2, 8, 5, 5))
    assert gate_numbers(found) == {}  # nothing ever comes in: nothing is said


def test_a_module_that_works_in_place_has_gates():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(0.25)

    _, found, _ = gates_of(Gated(InPlace()), torch.rand(3, 4, 2, 2) + 1)
    torch.testing.assert_close(found["attention"], torch.full((3, 4), 0.25))


def small(module, weight=0.1):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=weight)
    return module


class NonLocal(nn.Module):
    """x + W softmax(q k) v over positions, without biases."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(8, 24, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        mixed = v @ (q.transpose(1, 2) @ k).softmax(2).transpose(1, 2)
        return x + self.out(mixed.unflatten(2, x.shape[2:]))


class GateAndTerm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.term = ATTENTION["se"](8), nn.Linear(8, 8)

    def forward(self, x):
        return self.gate(x) + self.term(x.mean((2, 3)))[:, :, None, None]


NO_GATES = {
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False),
    "dilated depthwise": lambda: nn.Conv2d(8, 8, 3, 1, 2, 2, groups=8, bias=False),
    "channels shuffled": lambda: nn.ChannelShuffle(2),
    "MHSA": lambda: ATTENTION["mhsa"](8),
    "non-local": NonLocal,
    "both": GateAndTerm,
    "term": lambda: ATTENTION["gc"](8),
}


@pytest.mark.parametrize("name", NO_GATES)
def test_what_is_no_gate_is_never_credited_with_accuracy(name):
    x = torch.randn(5, 8, 6, 6)
    model = Gated(small(NO_GATES[name]()).eval())
    assert gates_of(model, x)[1:] == ({}, {})
    assert gate_maps_of(model, x) == {}


def test_mean_gates_of_a_control_change_nothing_and_of_a_module_do():
    for name, same in (("se_static", True), ("se", False)):
        model = opened(name)
        for module in attention_modules(model).values():
            nn.init.normal_(module.fc1.weight)
            nn.init.normal_(module.fc2.weight, std=3)
        before, gates, means = gates_of(model, IMAGES)
        assert torch.equal(attribution.predict(model, IMAGES), before)
        after = attribution.predict(replaced(model, means), IMAGES)
        assert torch.allclose(before, after, atol=1e-5) == same
        assert torch.equal(attribution.predict(model, IMAGES), before)  # unchanged
        vary = gate_numbers(gates)["layer1"]["spread_over_images"]
        assert (vary < 1e-5) == same


def test_gate_numbers():
    gates = {
        "layer1.0.attention": torch.tensor([[0.0, 0.5], [1.0, 0.5]]),
        "layer1.1.attention": torch.tensor([[0.5], [0.5]]),
        "attention": torch.tensor([[0.96], [0.96]]),
    }
    numbers = gate_numbers(gates)
    assert numbers.keys() == {"layer1", "classifier"}
    assert numbers["layer1"]["mean"] == pytest.approx(0.5)
    assert numbers["layer1"]["spread_over_images"] == pytest.approx(0.5 / 3)
    assert numbers["layer1"]["hardly_vary"] == pytest.approx(2 / 3)
    assert numbers["layer1"]["saturated"] == pytest.approx(2 / 6)
    assert numbers["classifier"]["saturated"] == 1.0
    beyond = {"attention": torch.tensor([[1.5], [0.5]])}
    assert gate_numbers(beyond)["classifier"]["saturated"] is None


@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_colour(name):
    model = opened(name, in_channels=3, num_classes=7)
    images = torch.rand(2, 3, 20, 24)
    maps = attribution.grad_cam(model, images, torch.tensor([1, 6]))
    assert maps["layer4"].isfinite().all() and maps["layer3"].shape[0] == 2
    _, gates, means = gates_of(model, images)
    gated = name not in ("baseline", "sk", "bot", "mhsa")
    assert bool(gates) == bool(means) == gated and not any(g.isinf().any() for g in gates.values())
    assert attribution.predict(replaced(model, means), images).isfinite().all()


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def explainable(finished_run, tmp_path):
    """A copy of a finished run, to be explained."""
    folder = tmp_path / "runs/fashion_mnist/published/cbam_blocks/seed0"
    return shutil.copytree(finished_run, folder)


def train_pets(tmp_path, data_dir, runs):
    """Trains on tmp_path/pets, made if need be; the run's folder."""
    if not (tmp_path / "pets").exists():
        make(tmp_path / "pets", {"cat": 12, "dog": 12}, size=(16, 16), mode="L")
    flags = ["--model", "se", "--width", "8", "--epochs", "1", "--batch-size", "4", "--device"]
    flags += ["cpu", "--data-dir", str(data_dir), "--dataset", str(tmp_path / "pets")]
    assert train.main([*flags, "--runs", str(runs)]) == 0
    return runs / "pets/published/se/seed0"


def test_the_script_on_runs_side_by_side(explainable, tmp_path, capsys):
    assert train_small("baseline", tmp_path / "runs", "--epochs", "1") == 0
    other = tmp_path / "runs/fashion_mnist/published/baseline/seed0"
    flags = ["--data-dir", str(REPO / "data"), "--out", str(tmp_path / "out")]
    command = ["--compare", str(explainable), str(other), "--limit-test", "300", *flags]
    assert explain.main(command) == 0
    runs = explainable, other
    cbam, baseline = (json.loads((run / "explain.json").read_text()) for run in runs)
    assert cbam["images"] == baseline["images"] and 10 <= len(cbam["images"]) <= 20
    assert baseline["test_acc_gates_fixed"] is None and cbam["gates"].keys() == {
        "layer1", "layer2", "layer3", "layer4",
    }  # fmt: skip
    compared = tmp_path / "out/explain_compare.png"
    for picture in (explainable / "explain.png", other / "explain.png", compared):
        pixels = matplotlib.image.imread(picture)
        assert pixels.shape[0] > 500 and pixels.std() > 0.1
    assert "gates replaced by their mean" in capsys.readouterr().out

    made = (explainable / "explain.json").read_bytes()
    assert explain.main([*command, "--keep"]) == 0 and "kept: " in capsys.readouterr().out
    compared.unlink()
    assert explain.main([*command, "--keep"]) == 0 and compared.exists()
    assert (explainable / "explain.json").read_bytes() == made  # twice the same
    assert not (explainable / ".lock").exists()


def test_a_run_that_is_trained_again_is_not_explained_any_more(tmp_path, capsys):
    folder = tmp_path / "runs/fashion_mnist/published/se/seed0"
    flags = ["--run", str(folder), "--limit-test", "20", "--keep"]
    for more in ([], ["--overwrite"]):
        assert train_small("se", tmp_path / "runs", "--epochs", "1", *more) == 0
        assert not (folder / "explain.json").exists()
        assert explain.main(flags) == 0 and "kept: " not in capsys.readouterr().out
    assert {path.name for path in folder.glob("explain*")} == {"explain.json", "explain.png"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_that_cannot_be_written_is_one_line(explainable, capsys):
    explainable.chmod(0o555)
    assert explain.main(["--run", str(explainable), "--limit-test", "20"]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "copy the run to a folder of your own" in error


@pytest.mark.parametrize("change", ["weights", "predictions", "labels", "no file"])
def test_a_run_is_explained_with_its_own_weights_and_images(explainable, capsys, change):
    """Else refused in one line that says how many predictions differ."""
    run = explainable
    if change == "weights":
        torch.save(build_model("cbam_blocks", width=8, seed=7).state_dict(), run / "best.pt")
    elif change == "labels":
        change_json(run / "config.json", data="0" * 16)
    elif change == "predictions":
        (run / "test_labels.npy").unlink()  # by which test_acc is checked
        predictions = np.load(run / "test_predictions.npy")
        np.save(run / "test_predictions.npy", (predictions + 1) % 10)
    else:
        (run / "test_predictions.npy").unlink()
    code, error = explain.main(["--run", str(run), "--limit-test", "80"]), capsys.readouterr().err
    assert is_one_line(error) and (run / "explain.json").exists() == (code == 0)
    if change == "no file":
        assert code == 0 and f"note: {run} has no test_predictions.npy" in error
    elif change == "labels":
        assert code == 1 and f"{run} was not trained on the images and labels of" in error
    else:
        assert code == 1 and re.search("[1-9][0-9]* of 80 predictions differ from the run's", error)


def test_images_that_moved_are_found(tmp_path, capsys):
    """--dataset says where; the content decides."""
    here, there = tmp_path / "here", tmp_path / "there"
    train_pets(here, tmp_path / "data", here / "runs")
    shutil.move(here, there)
    run = train_pets(there, tmp_path / "data", there / "runs")
    assert "already complete" in capsys.readouterr().out
    explained, moved = ["--run", str(run)], ["--dataset", str(there / "pets")]
    assert explain.main(explained) == 1
    assert "--dataset" in capsys.readouterr().err
    assert explain.main([*explained, *moved]) == 0
    next((there / "pets/cat").iterdir()).unlink()
    assert explain.main([*explained, *moved]) == 1
    assert "was not trained on the images and labels of" in capsys.readouterr().err


def test_accuracy_is_that_of_the_run(explainable):
    result = json.loads((explainable / "result.json").read_text())
    flags = ["--limit-test", "100", "--images", "5"]
    assert explain.main(["--checkpoint", str(explainable / "best.pt"), *flags]) == 0
    found = json.loads((explainable / "explain.json").read_text())
    assert found["test_acc"] == pytest.approx(result["test_acc"]) and found["images"] == [5]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, "--run --checkpoint --compare"),
        (["--run", "RUN", "--checkpoint", "RUN/best.pt"], 2, "not allowed with"),
        (["--run", "nowhere"], 1, "nowhere is not the folder of a finished run"),
        (["--run", "RUN", "--images", "10000"], 1, "from 0 to 9999"),
        (["--run", "RUN", "--images", "-1"], 2, "--images at least 0"),
        (["--run", "RUN", "--dataset", "mnistt"], 2, "unknown data set 'mnistt'"),
        (["--compare", "RUN", "RUN/."], 2, "given twice"),
        (["--run", "RUN", "--limit-test", "0"], 2, "at least 1"),
        (["--run", "RUN", "--device", "cuda:9"], 2, "cuda:9"),
        (["--checkpoint", "OTHER/best.pt"], 1, "does not load as se"),
        (["--compare", "RUN", "OTHER", "--out", "RUN/best.pt"], 1, "best.pt"),
    ],
)
def test_what_cannot_be_explained_is_one_line(explainable, tmp_path, capsys, flags, code, words):
    other = shutil.copytree(explainable, tmp_path / "other")
    for name in ("config.json", "result.json"):
        change_json(other / name, model="se", base_model="se")
    flags = [flag.replace("RUN", str(explainable)).replace("OTHER", str(other)) for flag in flags]
    try:
        found = explain.main([*flags])
    except SystemExit as stopped:
        found = stopped.code
    error = capsys.readouterr().err
    assert found == code and is_one_line(error) and words in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": "8"}, "width is 8"),
        ({"width": 0}, "width is 0"),
        ({"data_dir": None}, "data_dir is None"),
        ({"dataset": ["a"]}, "dataset is"),
        ({"base_model": "foo"}, "unknown model 'foo'"),
        ({"limit_test": "abc"}, "limit_test is abc"),
        ({"model": "../../evil"}, "model is ../../evil"),
        ({"seed": "../x"}, "seed is"),
        ({"reduction": "x"}, "reduction is x"),
        ({"recipe": "../x"}, "recipe is ../x"),
        ({"overrides": None}, "overrides is"),
        ({"model": "a\0b"}, "model is a"),
        ({"recipe": "..\n/x"}, "recipe is"),
        ({"seed": -1}, "seed is -1"),
        ({"data_dir": "a\0b"}, "data_dir is"),
        ({"data_dir": "/dev/null/x", "dataset": "mnist"}, "--data-dir"),
    ],
)
def test_an_odd_config_is_one_line(explainable, capsys, change, words):
    change_json(explainable / "config.json", **change)
    assert explain.main(["--run", str(explainable)]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and words in error
    assert not list(explainable.glob("explain*"))


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_nothing_is_fetched_into_a_folder_that_only_a_config_names(
    explainable, tmp_path, capsys, dataset
):
    folder = str(tmp_path / "elsewhere/data")
    change_json(explainable / "config.json", dataset=dataset, data_dir=folder)
    assert explain.main(["--run", str(explainable)]) == 1
    assert "--data-dir" in capsys.readouterr().err and not (tmp_path / "elsewhere").exists()


def test_nothing_is_decoded_into_a_folder_that_only_a_config_names(tmp_path):
    decoded = tmp_path / "elsewhere/data"
    run = train_pets(tmp_path, decoded, tmp_path / "runs")
    shutil.rmtree(tmp_path / "elsewhere")
    command = ["--run", str(run)]
    assert explain.main(command) == 0 and not (tmp_path / "elsewhere").exists()
    assert explain.main([*command, "--data-dir", str(decoded)]) == 0
    assert list((decoded / ".decoded").iterdir())


def test_runs_with_other_data_are_not_compared(explainable, fashion_mnist):
    args = argparse.Namespace(limit_test=5, data_dir=REPO / "data", dataset=None)
    run, other = read_run(explainable), read_run(explainable)
    expected = data.stratified(fashion_mnist.test_labels, 5)
    assert torch.equal(explain.load_dataset([run, other], args)[1], expected)
    other.config["data"] = "b"
    with pytest.raises(UserError, match="was not trained on the images"):
        explain.load_dataset([run, other], args)


def drawn(patch, tmp_path, classes, shape, predictions, gates=torch.rand):
    """(what is explained of random images, two of each class; the figures of both pictures)."""
    n, figures = len(predictions), []
    shown = pictures.Explained(
        name="cbam_blocks_static, seed 0, published, smoke test",
        classes=classes,
        images=torch.randint(0, 256, (n, *shape, 3), dtype=torch.uint8),
        labels=torch.arange(n) // 2,
        probabilities=F.one_hot(torch.tensor(predictions), len(classes)).float(),
        cams={layer: torch.rand(n, 2, 2) for layer in attribution.LAYERS},
        gate_maps={f"layer{i}": gates(n, 4, 4) for i in range(1, 5)},
        gates_by_class={f"layer{i}": gates(len(classes), 16) for i in range(1, 5)},
    )
    patch.setattr(pictures.plt, "close", figures.append)
    pictures.draw_model(shown, shown, tmp_path / "model.png")
    pictures.draw_comparison([shown] * 3, tmp_path / "compare.png")
    return shown, figures


def texts_of(figure):
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def images_of(figure, shape):
    images = [image for axes in figure.axes for image in axes.images]
    return [image for image in images if image.get_array().shape == shape]


HOSTILE = ["$\\frac{1}$", "W" * 40, "Ankle boot", "a\nb\nc", "_" * 30, "<b>"]


@pytest.mark.parametrize("shape", [(28, 28), (20, 60), (60, 30)])
def test_texts_of_the_pictures_do_not_touch(tmp_path, monkeypatch, shape):
    """At least 7 pt on a page of 6.5 inches; and images keep their shape."""
    predictions = [0, 1, 1, 1, 0, 0, 3, 2, 4, 4, 0, 0]
    _, figures = drawn(monkeypatch, tmp_path, HOSTILE, shape, predictions)
    for figure in figures:
        figure.set_dpi(200)
        figure.canvas.draw()
        texts = texts_of(figure)
        assert min(text.get_fontsize() for text in texts) >= 7 and figure.get_figwidth() <= 6.5
        boxes = [text.get_window_extent() for text in texts]
        assert all(b.x0 >= 0 and b.x1 <= figure.bbox.x1 and b.y0 >= 0 for b in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        for image in images_of(figure, (*shape, 3)):
            box = image.get_window_extent()
            assert box.height / box.width == pytest.approx(shape[0] / shape[1], rel=0.01)
        headings = [text for text in texts if "classified by " in text.get_text()]
        words = [text.get_text().strip().split(" by ")[0] for text in headings]
        assert words == ["Correctly classified", "Misclassified"]


def test_images_are_in_the_band_that_they_belong_to(tmp_path, monkeypatch):
    """One correct and one wrong image of class 0, two correct of 1, two wrong of 2."""
    predictions = [2, 0, 1, 1, 0, 0]
    shown, figures = drawn(monkeypatch, tmp_path, ["a", "b", "c"], (8, 8), predictions)
    bands = [axes for axes in figures[0].axes if "classified by " in axes.get_title("left")]
    for axes, images, classes, captions in (
        (bands[0], [1, 2, 3], "abb", ["a\n100%", "b\n100%", "b\n100%"]),
        (bands[1], [0, 4, 5], "acc", ["c\n✗ 100%", "a\n✗ 100%", "a\n✗ 100%"]),
    ):
        tiles = [image.get_array() for image in axes.images]
        assert np.array_equal(tiles, shown.images[images])
        assert [label.get_text() for label in axes.get_xticklabels()] == list(classes)
        assert [text.get_text() for text in axes.texts] == captions
        colours = {text.get_color() for text in axes.texts}
        assert colours == {"black" if axes is bands[0] else "firebrick"}
        centres = [np.mean(image.get_extent()[:2]) for image in axes.images]
        assert centres == pytest.approx(list(axes.get_xticks()))
        assert centres == pytest.approx([text.get_position()[0] for text in axes.texts])


def test_gates_that_hardly_vary_do_not_look_like_attention(tmp_path, monkeypatch):
    """From 0.24 to 0.25: one colour, that of the bar at about a quarter; inactive ones are grey."""

    def gates(*shape):
        found = 0.24 + 0.01 * torch.rand(*shape)
        found[0, 0] = torch.nan
        return found

    predictions = [0, 0, 1, 0, 2, 1]
    _, (figure, _) = drawn(monkeypatch, tmp_path, list("abc"), (8, 8), predictions, gates)
    assert "0.24 to 0.25" in " ".join(text.get_text() for text in texts_of(figure))
    images = images_of(figure, (4, 4))
    maps = np.stack([image.to_rgba(image.get_array())[..., :3] for image in images])
    assert len(maps) == 4 * 6 and np.ptp(maps[:, 1:], axis=(0, 1, 2)).max() < 0.01
    assert np.allclose(maps[:, 1:], pictures.COLOURS(0.245)[:3], atol=0.01)
    inactive = (maps == matplotlib.colors.to_rgb("lightgrey")).all(-1)
    assert inactive.sum() == 4 * 4 and not inactive[:, 1:].any()  # a row of the first image each
    strips = images_of(figure, (3, 16))
    assert [image.get_clim() for image in images + strips] == [(0, 1)] * (4 * 6 + 4)


@pytest.mark.parametrize(
    ("gates", "scale"),
    [
        ([0.24, 0.25], (0, 1)),
        ([0.0, 1.0005, float("nan")], (0, 1)),  # rounding
        ([1.4, 1.6], (0, 2)),  # BAM: 1 + a sigmoid
        ([-0.3, 2.2], (-1, 3)),
    ],
)
def test_one_scale_for_all_gates(gates, scale):
    for given, expected in (([torch.tensor(gates), torch.tensor([[0.5]])], scale), ([], (0, 1))):
        norm = pictures.gate_scale(given)
        assert (norm.vmin, norm.vmax) == expected


def test_weights_that_give_nan_are_one_line(explainable, capsys):
    weights = torch.load(explainable / "best.pt", weights_only=True)
    weights["fc.bias"][3] = torch.nan
    torch.save(weights, explainable / "best.pt")
    assert (
        explain.main(["--run", str(explainable)]) == 1
        and "NaN or infinity" in capsys.readouterr().err
    )
    assert not list(explainable.glob("explain*"))


def test_rows_of_gates_are_those_of_their_classes(finished_run, fashion_mnist):
    """Of a class that no image is of, nothing is said."""
    run = read_run(finished_run)
    args = argparse.Namespace(limit_test=6, data_dir=REPO / "data", dataset=None)
    dataset, idx = explain.load_dataset([run], args)
    _, drawn = explain.explain(run, dataset, idx, None, torch.device("cpu"))
    there = set(fashion_mnist.test_labels[idx].tolist())
    for gates in drawn.gates_by_class.values():
        rows = {row for row in range(10) if not gates[row].isnan().all()}
        assert rows == there != set(range(10))
