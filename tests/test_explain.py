"""Grad-CAM against its closed form and captum, gates against formulas, and the real script."""

import argparse
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import data
import explain
import train
from kit import attribution, datasets, pictures
from kit.attribution import attention_modules, gate_maps_of, gate_numbers, gates_of, replaced
from kit.command_line import UserError
from models import ATTENTION, MODELS, build_model

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import REPO, is_one_line, train_small
from PIL import Image

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
    model = opened(name)
    with attribution.captured(model, {"layer4": model.layer4}) as seen, torch.no_grad():
        model(IMAGES)
    activation = seen["layer4"][1]
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


def test_grad_cam_leaves_nothing_behind():
    model = opened("se").train()
    with torch.no_grad():
        attribution.grad_cam(model, IMAGES, CLASSES)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_empty_map_stays_empty():
    model = opened("baseline")
    nn.init.constant_(model.fc.weight, -1.0)  # nothing speaks for any class
    maps = attribution.grad_cam(model, IMAGES, CLASSES)["layer4"]
    assert torch.equal(maps, torch.zeros_like(maps))
    assert torch.equal(attribution.scaled(maps), torch.zeros_like(maps))
    assert torch.equal(
        attribution.scaled(maps + 3), torch.ones_like(maps)
    )  # nothing but everywhere


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
    torch.testing.assert_close(means["attention"].gate, mean)
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
    torch.testing.assert_close(means["attention"].gate, product, rtol=1e-4, atol=1e-5)


def test_where_nothing_comes_in_nothing_is_said_of_the_gate():
    x = torch.rand(6, 4, 3, 3)
    x[:2, 0] = 0
    x[:, 1] = 0
    _, found, means = gates_of(Gated(ATTENTION["se"](4).eval()), x)
    unknown = torch.zeros(6, 4, dtype=torch.bool)
    unknown[:2, 0] = unknown[:, 1] = True
    assert torch.equal(found["attention"].isnan(), unknown)
    assert torch.equal(means["attention"].gate[1], torch.ones(3, 3))
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


def test_what_adds_has_no_gate_and_is_replaced_by_a_term():
    gc = ATTENTION["gc"](64).eval()
    nn.init.normal_(gc.fc2.weight)
    x = torch.randn(5, 64, 4, 4)
    _, found, means = gates_of(Gated(gc), x)
    assert found == {} and gate_maps_of(Gated(gc), x) == {}
    torch.testing.assert_close(means["attention"](x), x + (gc(x) - x).mean(0))


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
}


@pytest.mark.parametrize("name", NO_GATES)
def test_what_is_no_gate_is_never_credited_with_accuracy(name):
    x = torch.randn(5, 8, 6, 6)
    _, gates, means = gates_of(Gated(small(NO_GATES[name]()).eval()), x)
    assert gates == {} and means == {}
    assert gate_maps_of(Gated(small(NO_GATES[name]()).eval()), x) == {}


def test_on_a_1x1_map_a_term_is_not_told_from_a_layer():
    for module in (small(ATTENTION["gc"](8)), small(nn.Conv2d(8, 8, 1))):
        assert gates_of(Gated(module.eval()), torch.randn(5, 8, 1, 1))[1:] == ({}, {})


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


def test_the_script_on_runs_side_by_side(finished_run, tmp_path, capsys):
    assert train_small("baseline", tmp_path / "runs", "--epochs", "1") == 0
    other = tmp_path / "runs/fashion_mnist/published/baseline/seed0"
    flags = ["--limit-test", "300", "--limit-cam", "10", "--data-dir", str(REPO / "data")]
    runs = ["--compare", str(finished_run), str(other)]
    assert explain.main([*runs, *flags, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert [row["model"] for row in rows] == ["cbam_blocks", "baseline"]
    assert rows[0]["images"] == rows[1]["images"] and 10 <= len(rows[0]["images"]) <= 20
    assert rows[1]["test_acc_gates_fixed"] is None and rows[0]["gates"].keys() == {
        "layer1", "layer2", "layer3", "layer4",
    }  # fmt: skip
    for name in ("cbam_blocks_seed0", "baseline_seed0", "compare"):
        picture = matplotlib.image.imread(tmp_path / "out" / f"explain_{name}.png")
        assert picture.shape[0] > 500 and picture.std() > 0.1
    assert "gates replaced by their mean" in capsys.readouterr().out
    again = tmp_path / "again"
    assert explain.main([*runs, *flags, "--out", str(again)]) == 0
    assert json.loads((again / "explain.json").read_text()) == rows

    made = (again / "explain.json").read_bytes()
    copy = tmp_path / "moved"  # whatever its place and its files' times
    shutil.copytree(other, copy)
    for wanted in (runs, ["--run", str(other)], ["--run", str(copy)]):
        assert explain.main([*wanted, *flags, "--keep", "--out", str(again)]) == 0
        assert "kept: " in capsys.readouterr().out
    assert (again / "explain.json").read_bytes() == made
    (again / "explain_compare.png").unlink()
    assert explain.main([*runs, *flags, "--keep", "--out", str(again)]) == 0
    assert (again / "explain_compare.png").exists()
    for images, kept in ((["--images", "5"], False), (["--images", "5"], True), ([], False)):
        command = ["--run", str(other), *flags, *images, "--keep", "--out", str(tmp_path / "few")]
        assert explain.main(command) == 0
        assert capsys.readouterr().out.startswith("kept: ") == kept


def test_what_was_explained_before_stays(finished_run, tmp_path, capsys):
    """Rows of other runs, and their pictures; --overwrite discards them."""
    assert train_small("cbam_blocks", tmp_path / "runs", "--epochs", "1") == 0
    short = tmp_path / "runs/fashion_mnist/published/cbam_blocks/seed0"
    flags = ["--limit-test", "50", "--limit-cam", "2", "--out", str(tmp_path / "out")]

    def rows_after(run, *more):
        assert explain.main(["--run", str(run), *flags, *more]) == 0
        rows = json.loads((tmp_path / "out/explain.json").read_text())
        return {row["overrides"].get("epochs"): row for row in rows}

    first, again = rows_after(finished_run), rows_after(finished_run)
    both = rows_after(short)
    assert list(first) == list(again) == [2] and list(both) == [2, 1] and both[2] == first[2]
    assert len({row["picture"] for row in both.values()}) == 2
    assert all((tmp_path / "out" / row["picture"]).is_file() for row in both.values())
    assert list(rows_after(short, "--overwrite")) == [1]


@pytest.mark.parametrize("change", ["weights", "other weights", "predictions", "labels", "no file"])
def test_a_run_is_explained_with_its_own_weights_and_images(finished_run, tmp_path, capsys, change):
    """Else refused in one line that says how many predictions differ; --keep looks at content."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    flags = ["--run", str(run), "--limit-test", "80", "--limit-cam", "2"]
    flags += ["--out", str(tmp_path / "out")]
    assert explain.main(flags) == 0
    times = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    capsys.readouterr()
    if change == "weights":
        (run / "result.json").unlink()  # which has their sha256
        torch.save(build_model("cbam_blocks", width=8, seed=7).state_dict(), run / "best.pt")
    elif change == "labels":
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"data": "0" * 16}))
    elif change == "predictions":
        predictions = np.load(run / "test_predictions.npy")
        np.save(run / "test_predictions.npy", (predictions + 1) % 10)
    if change == "no file":
        (run / "test_predictions.npy").unlink()
    if change == "other weights":  # of the same predictions
        weights = torch.load(run / "best.pt", weights_only=True)
        torch.save(weights, run / "best.pt")
    for name, time in times.items():
        if (run / name).exists():
            os.utime(run / name, ns=(time, time))  # as if nothing had happened
    code = explain.main([*flags, *(["--keep"] if change != "no file" else [])])
    error = capsys.readouterr().err
    assert is_one_line(error)
    if change == "no file":  # a checkpoint alone
        assert code == 0 and f"note: {run} has no test_predictions.npy" in error
    elif change == "other weights":
        assert code == 1 and f"{run}/best.pt is not the one of the run" in error
    elif change == "labels":
        assert code == 1 and f"{run} was trained on other images or labels" in error
    else:
        assert code == 1 and re.search("[1-9][0-9]* of 80 predictions are not those", error)


def test_images_that_moved_are_found(tmp_path, capsys):
    """--dataset says where; the content decides."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "here/pets" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"here/pets/{name}/{i}.png")
    flags = ["--model", "se", "--width", "8", "--epochs", "1", "--batch-size", "4", "--device"]
    flags += ["cpu", "--data-dir", str(tmp_path / "data"), "--dataset"]
    places = [str(tmp_path / place / "pets") for place in ("here", "there")]
    assert train.main([*flags, places[0], "--runs", str(tmp_path / "here/runs")]) == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    runs = tmp_path / "there/runs"
    assert train.main([*flags, places[1], "--runs", str(runs)]) == 0
    assert "already complete" in capsys.readouterr().out
    explained = ["--run", str(runs / "pets/published/se/seed0"), "--out", str(tmp_path / "out")]
    assert explain.main(explained) == 1
    assert "--dataset" in capsys.readouterr().err
    assert explain.main([*explained, "--dataset", places[1]]) == 0
    os.remove(tmp_path / "there/pets/cat/0.png")
    assert explain.main([*explained, "--dataset", places[1]]) == 1
    assert "other images or labels" in capsys.readouterr().err


def test_accuracy_is_that_of_the_run(finished_run, tmp_path):
    result = json.loads((finished_run / "result.json").read_text())
    flags = ["--limit-test", "100", "--limit-cam", "2", "--images", "5"]
    flags += ["--checkpoint", str(finished_run / "best.pt"), "--out", str(tmp_path)]
    assert explain.main(flags) == 0
    (row,) = json.loads((tmp_path / "explain.json").read_text())
    assert row["test_acc"] == pytest.approx(result["test_acc"]) and row["images"] == [5]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, "--run --checkpoint --compare"),
        (["--run", "RUN", "--checkpoint", "RUN/best.pt"], 2, "not allowed with"),
        (["--run", "nowhere"], 1, "nowhere is not the folder of a run"),
        (["--run", "RUN", "--images", "10000"], 1, "from 0 to 9999"),
        (["--run", "RUN", "--images", "-1"], 2, "--images at least 0"),
        (["--run", "RUN", "--dataset", "mnistt"], 2, "unknown data set 'mnistt'"),
        (["--compare", "RUN", "RUN/."], 2, "named twice"),
        (["--run", "RUN", "--limit-test", "0"], 2, "at least 1"),
        (["--run", "RUN", "--device", "cuda:9"], 2, "cuda:9"),
        (["--checkpoint", "OTHER/best.pt"], 1, "does not load as se"),
        (["--checkpoint", "OTHER/gone.pt"], 1, "No such file"),
        (["--run", "RUN", "--out", "RUN/best.pt", "--limit-test", "20"], 1, "best.pt"),
    ],
)
def test_what_cannot_be_explained_is_one_line(finished_run, tmp_path, capsys, flags, code, words):
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((finished_run / "config.json").read_text())
    se = config | {"model": "se", "base_model": "se"}
    (other / "config.json").write_text(json.dumps(se))
    (other / "best.pt").write_bytes((finished_run / "best.pt").read_bytes())
    flags = [*flags, "--limit-cam", "2"]
    flags = [flag.replace("RUN", str(finished_run)).replace("OTHER", str(other)) for flag in flags]
    try:
        found = explain.main([*flags])
    except SystemExit as stopped:
        found = stopped.code
    error = capsys.readouterr().err
    assert found == code and is_one_line(error) and words in error


def test_runs_that_share_model_and_seed_have_pictures_of_their_own():
    configs = [
        {"model": "se", "seed": 0, "recipe": "published"},
        {"model": "se", "seed": 0, "recipe": "strong"},
        {"model": "se", "seed": 1, "recipe": "strong"},
        {"model": "eca", "seed": 0, "recipe": "strong"},
    ]
    names = ["se_seed0_published", "se_seed0_strong", "se_seed1", "eca_seed0"]
    assert explain.names_of(configs) == names
    assert explain.names_of([configs[0]] * 2) == ["se_seed0_published_1", "se_seed0_published_2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": "8"}, "width is 8"),
        ({"width": 0}, "width 0"),
        ({"data_dir": None}, "data_dir is None"),
        ({"dataset": ["a"]}, "dataset is"),
        ({"base_model": "foo"}, "unknown model 'foo'"),
        ({"limit_test": "abc"}, "limit_test is abc"),
        ({"model": "../../evil"}, "no model ../../evil"),
        ({"seed": "../x"}, "seed is"),
        ({"reduction": "x"}, "reduction is x"),
        ({"recipe": "../x"}, "recipe is ../x"),
        ({"overrides": None}, "overrides is"),
        ({"model": "/tmp/evil"}, "no model /tmp/evil"),
        ({"model": "a\0b"}, "no model"),
        ({"recipe": "/tmp/evil"}, "recipe is /tmp/evil"),
        ({"recipe": "..\n/x"}, "recipe is"),
        ({"seed": -1}, "seed is not from"),
        ({"data_dir": "a\0b"}, "data_dir is"),
        ({"data_dir": "/dev/null/x", "dataset": "mnist"}, "--data-dir"),
    ],
)
def test_an_odd_config_is_one_line(finished_run, tmp_path, capsys, change, words):
    config = json.loads((finished_run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "best.pt").write_bytes((finished_run / "best.pt").read_bytes())
    flags = ["--run", str(tmp_path), "--limit-cam", "2", "--out", str(tmp_path / "out")]
    assert explain.main(flags) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and words in error


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "pets"])
def test_a_folder_that_only_a_config_names_is_not_written_to(
    finished_run, tmp_path, capsys, monkeypatch, dataset
):
    """Nothing is fetched into it, and no decoded images are kept there, unless --data-dir does."""
    monkeypatch.setattr(datasets, "download", lambda *_: pytest.fail("fetched"))
    for k in range(10):
        (tmp_path / f"pets/{k}").mkdir(parents=True)
        for i in range(12):
            pixels = np.full((28, 28), 20 * k + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pets/{k}/{i}.png")
    config = json.loads((finished_run / "config.json").read_text()) | {"data": None}
    own = {"dataset": str(tmp_path / "pets") if dataset == "pets" else dataset, "limit_test": None}
    own |= {"data_dir": str(tmp_path / "elsewhere/data"), "dataset_name": "pets"}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config | own))
    shutil.copy(finished_run / "best.pt", run)
    flags = ["--run", str(run), "--limit-cam", "2", "--out", str(tmp_path / "out")]
    assert explain.main(flags) == (0 if dataset == "pets" else 1)
    assert not (tmp_path / "elsewhere").exists()
    assert "--data-dir" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"pets", "run", "out"}
    assert {path.name for path in run.iterdir()} == {"config.json", "best.pt"}
    if dataset == "pets":
        assert explain.main([*flags, "--data-dir", own["data_dir"]]) == 0
        assert list((tmp_path / "elsewhere/data/.decoded").iterdir())


@pytest.mark.parametrize("key", ["position", "place"])
def test_configs_of_older_runs_say_place(fashion_mnist, tmp_path, key):
    config = {"model": "se_classifier", "base_model": "se", "width": 4, key: "classifier"}
    config |= {"dataset": "fashion_mnist", "data_dir": "data", "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = explain.read_config(tmp_path / "best.pt")
    weights = build_model("se", width=4, position="classifier").state_dict()
    torch.save(weights, tmp_path / "best.pt")
    model = explain.load_model(tmp_path / "best.pt", config, fashion_mnist)
    assert list(attention_modules(model)) == ["attention"]


def test_runs_with_other_data_are_not_compared(fashion_mnist):
    args = dict(limit_test=5, images=None, data_dir=REPO / "data", dataset=None)
    run = {"dataset": "fashion_mnist", "limit_test": None, "image_size": None}
    run |= {"data": fashion_mnist.digest}
    older = run | {"data": None}  # which were Fashion-MNIST's, too

    def indices(*configs):
        paths = [Path("best.pt")] * len(configs)
        return explain.load_dataset(configs, argparse.Namespace(paths=paths, **args))[1]

    assert indices(run, older).tolist() == data.stratified(fashion_mnist.test_labels, 5).tolist()
    with pytest.raises(UserError, match="other images"):
        indices(run, older, run | {"data": "b"})


def drawn(patch, tmp_path, classes, shape, predictions, gates):
    """(what is explained of random images, two of each class; the figures of both pictures)."""
    n, figures = len(predictions), []
    shown = pictures.Explained(
        name="cbam_blocks_static, seed 0, published, smoke test",
        classes=classes,
        pixels=torch.randint(0, 256, (n, 3, *shape), dtype=torch.uint8),
        labels=[i // 2 for i in range(n)],
        predictions=predictions,
        probabilities=[1.0] * n,
        cams={layer: torch.rand(n, *shape) for layer in attribution.LAYERS},
        gate_maps={f"layer{i}": gates(n, 4, 4) for i in range(1, 5)},
        gates_by_class={f"layer{i}": gates(len(classes), 16) for i in range(1, 5)},
    )
    patch.setattr(pictures.plt, "close", figures.append)
    pictures.draw_model(shown, shown, tmp_path / "model.png")
    pictures.draw_comparison([shown] * 3, tmp_path / "compare.png")
    return shown, figures


HOSTILE = ["$\\frac{1}$", "W" * 40, "Ankle boot", "a\nb\nc", "_" * 30, "<b>"]


@pytest.mark.parametrize("shape", [(28, 28), (20, 60), (60, 30)])
def test_texts_of_the_pictures_do_not_touch(tmp_path, monkeypatch, shape):
    """At least 7 pt on a page of 6.5 inches; and images keep their shape."""
    predictions = [0, 1, 1, 1, 0, 0, 3, 2, 4, 4, 0, 0]
    _, figures = drawn(monkeypatch, tmp_path, HOSTILE, shape, predictions, torch.rand)
    for figure in figures:
        figure.set_dpi(200)
        figure.canvas.draw()
        (axes,) = figure.axes
        texts = [text for text in axes.texts if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 7 and figure.get_figwidth() <= 6.5
        boxes = [text.get_window_extent() for text in texts]
        assert all(b.x0 >= 0 and b.x1 <= figure.bbox.x1 and b.y0 >= 0 for b in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        images = [image for image in axes.images if image.get_array().shape[:2] == shape]
        for box in (image.get_window_extent() for image in images):
            assert box.height / box.width == pytest.approx(shape[0] / shape[1], rel=0.01)
        headings = [text for text in texts if text.get_weight() == "bold"]
        words = [text.get_text().split(" by ")[0] for text in headings]
        assert words == ["Correctly classified", "Misclassified"]


def test_classes_have_a_column_in_both_bands(tmp_path, monkeypatch):
    """One correct and one wrong image of class 0, two correct of 1, two wrong of 2."""
    predictions = [2, 0, 1, 1, 0, 0]
    shown, figures = drawn(monkeypatch, tmp_path, ["a", "b", "c"], (8, 8), predictions, torch.rand)
    columns = [(0, 1, 0), (1, 2, None), (1, 3, None), (2, None, 4), (2, None, 5)]
    assert pictures.columns_of(shown) == columns
    of_images = [shown.pixels[i].permute(1, 2, 0).numpy() / 255 for i in range(6)]
    cells = {}  # of each image (column, height)
    for image in figures[0].axes[0].images:
        for i, pixels in enumerate(of_images):
            if image.get_array().shape == (8, 8, 3) and np.allclose(image.get_array(), pixels):
                x, _, _, y = image.get_extent()
                cells[i] = round((x - pictures.LABEL) / pictures.STEP), y
    assert {i: column for i, (column, _) in cells.items()} == {1: 0, 0: 0, 2: 1, 3: 2, 4: 3, 5: 4}
    assert cells[1][1] == cells[2][1] == cells[3][1] < cells[0][1] == cells[4][1] == cells[5][1]


def test_gates_that_hardly_vary_do_not_look_like_attention(tmp_path, monkeypatch):
    """From 0.24 to 0.25: one colour, that of the bar at about a quarter; inactive ones are grey."""

    def gates(*shape):
        found = 0.24 + 0.01 * torch.rand(*shape)
        found[0, 0] = torch.nan
        return found

    _, figures = drawn(monkeypatch, tmp_path, ["a", "b", "c"], (8, 8), [0, 0, 1, 0, 2, 1], gates)
    images = [image.get_array() for image in figures[0].axes[0].images]
    assert "0.24 to 0.25" in " ".join(text.get_text() for text in figures[0].axes[0].texts)
    maps = np.stack([image for image in images if image.shape == (4, 4, 3)])
    assert len(maps) == 4 * 6 and np.ptp(maps[:, 1:], axis=(0, 1, 2)).max() < 0.01
    assert np.allclose(maps[:, 1:], pictures.COLOURS(0.245)[:3], atol=0.01)
    inactive = (maps == matplotlib.colors.to_rgb("lightgrey")).all(-1)
    assert inactive.sum() == 4 * 4 and not inactive[:, 1:].any()  # a row of the first image each
    strips = [image for image in figures[0].axes[0].images if image.get_array().shape == (3, 16)]
    assert [strip.get_clim() for strip in strips] == [(0, 1)] * 4


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
    assert pictures.gate_scale([torch.tensor(gates), torch.tensor([[0.5]])]) == scale
    assert pictures.gate_scale([]) == (0, 1)


def test_weights_that_give_nan_are_one_line(finished_run, tmp_path, capsys):
    weights = torch.load(finished_run / "best.pt", weights_only=True)
    weights["fc.bias"][3] = torch.nan
    torch.save(weights, tmp_path / "best.pt")
    (tmp_path / "config.json").write_bytes((finished_run / "config.json").read_bytes())
    flags = ["--run", str(tmp_path), "--limit-cam", "2", "--out", str(tmp_path / "out")]
    assert explain.main(flags) == 1 and "finite" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_of_gates_are_those_of_their_classes(finished_run, tmp_path, fashion_mnist):
    """Of a class that no image is of, nothing is said."""
    config = explain.read_config(finished_run / "best.pt")
    asked = dict(device=torch.device("cpu"), limit_test=6, limit_cam=1, images=None, asked=None)
    path = finished_run / "best.pt"
    args = argparse.Namespace(**asked, data_dir=REPO / "data", dataset=None, paths=[path])
    dataset, idx = explain.load_dataset([config], args)
    _, drawn = explain.explain("x", path, config, dataset, idx, args)
    there = set(fashion_mnist.test_labels[idx].tolist())
    for gates in drawn.gates_by_class.values():
        rows = {row for row in range(10) if not gates[row].isnan().all()}
        assert rows == there != set(range(10))
