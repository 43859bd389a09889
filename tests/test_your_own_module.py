"""A module of one's own: the README's example, as a reader would copy it; what others may do."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import explain
import models
import train
from kit import attribution

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import REPO, is_one_line, metrics_of, stop_at, train_small, unaligned

README = (REPO / "README.md").read_text()


@pytest.mark.slow
def test_the_readme_s_module_trains_is_timed_reported_and_tested(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (*REPO.glob("*.py"), REPO / "pyproject.toml", REPO / "README.md"):
        shutil.copy(path, copy)
    for folder in ("kit", "tests"):
        shutil.copytree(REPO / folder, copy / folder)
    (copy / "data").symlink_to(REPO / "data")
    (code,) = re.findall(r"```python\n(class Spread\(nn\.Module\).*?)```", README, re.DOTALL)
    ((line, table),) = re.findall(r"a line `(.*?)` in `(\w+)`", README)
    assert (line, table) == ('"spread": Spread,', "ATTENTION")
    text = (copy / "models.py").read_text()
    before, head, after = text.partition("# name: channels -> module")
    table_starts = "ATTENTION = {\n"
    assert head and after.count(table_starts) == 1
    after = after.replace(table_starts, f"{table_starts}    {line}\n")
    (copy / "models.py").write_text(f"{before}{code}\n\n{head}{after}")  # that one file

    def run(*command, **environment):
        environment = os.environ | environment
        done = subprocess.run(
            [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    plan = run("-m", "kit.study", "plan", "verdict", MODELS="baseline spread")
    assert plan.count(" train.py --model ") == 40
    small = ["--width", "16", "--limit-train", "640", "--limit-test", "100", "--epochs", "1"]
    for model in ("baseline", "spread"):
        run("train.py", "--model", model, *small)
    models = ["--models", "baseline", "spread", "--width", "16"]
    run("benchmark.py", *models, "--batch-sizes", "64", "--modes", "eager", "--repeats", "2")
    run("report.py")
    report = unaligned((copy / "results/report.md").read_text())
    assert "| `spread` (smoke test) | 1 |" in report
    tested = run(
        "-m", "pytest", "-q", "-k", "spread", "tests/test_attention.py", "tests/test_models.py"
    )
    assert int(re.search(r"(\d+) passed", tested)[1]) >= 12


class Drop(nn.Module):
    """Skips a batch's residual branch now and then."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x):
        skipped = self.training and random.random() + np.random.random() < 0.7  # noqa: NPY002
        return x * 0 if skipped else x


def test_a_module_may_draw_from_python_s_and_numpy_s_generators(tmp_path, monkeypatch, capsys):
    """Seeded, saved and restored; no mode that would draw once and for all."""
    monkeypatch.setitem(models.MODELS, "drop", (Drop, "blocks"))
    monkeypatch.setattr("torch.compile", lambda forward, **options: forward)
    folder = "fashion_mnist/published/drop/seed0"
    for name in ("whole", "parts"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "parts":
                stop_at(6, patch)
                assert train_small("drop", tmp_path / name, "--epochs", "2") == 130
                random.seed(7)
        assert train_small("drop", tmp_path / name, "--epochs", "2") == 0
    assert metrics_of(tmp_path / "whole" / folder) == metrics_of(tmp_path / "parts" / folder)
    assert train_small("drop", tmp_path / "fast", "--epochs", "1", "--mode", "compile") == 0
    assert "only once; training in mode eager" in capsys.readouterr().err
    assert json.loads((tmp_path / "fast" / folder / "result.json").read_text())["mode"] == "eager"


class Anneals(nn.Module):
    """Counts its steps in Python: the gate opens as training goes on."""

    def __init__(self, channels: int):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        return x * (1 - 0.5**self.steps)


def test_a_counter_in_python_is_saved_and_never_fixed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "anneals", (Anneals, "blocks"))
    monkeypatch.setattr("torch.compile", lambda forward, **options: forward)
    folder, flags = "fashion_mnist/published/anneals/seed0", ["--epochs", "2", "--mode", "compile"]
    assert train_small("anneals", tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        assert train_small("anneals", tmp_path / "parts", *flags) == 130
    assert train_small("anneals", tmp_path / "parts", *flags) == 0
    assert metrics_of(tmp_path / "whole" / folder) == metrics_of(tmp_path / "parts" / folder)
    error = capsys.readouterr().err
    assert "count in an attribute (use a buffer), only once; training in mode eager" in error
    assert (
        error.count("note: layer1.0.attention.steps changes, but best.pt lacks it") == 3
    )  # once per start


class Keeps(nn.Module):
    """Keeps tensors between calls: a running mean that is no buffer, and its last gate."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc, self.mean, self.height = nn.Linear(channels, channels), None, 0

    def forward(self, x):
        z = x.mean((2, 3)).mean(0)
        self.mean = z.detach() if self.mean is None else 0.9 * self.mean + 0.1 * z.detach()
        self.height, self.width = x.shape[2:]  # numbers, but none that change from step to step
        if not hasattr(self, "relu"):
            self.relu = nn.ReLU()  # without parameters
        self.gate = self.fc(z + self.mean).sigmoid()
        return x * self.gate[:, None, None]


def test_a_module_may_keep_tensors_between_calls(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "keeps", (Keeps, "blocks"))
    monkeypatch.setattr("torch.compile", lambda forward, **options: forward)
    flags = ["--epochs", "2", "--mode", "compile"]
    with monkeypatch.context() as patch:
        stop_at(10, patch)  # in the test
        assert train_small("keeps", tmp_path, *flags) == 130
    assert train_small("keeps", tmp_path, *flags) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["mode"] == "compile"


class Late(nn.Module):
    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x):
        if not hasattr(self, "fc"):
            self.fc = nn.Linear(x.shape[1], x.shape[1])
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


def test_what_is_made_in_the_first_forward_is_refused(tmp_path, monkeypatch, capsys):
    """It would not be trained."""
    monkeypatch.setitem(models.MODELS, "late", (Late, "blocks"))
    assert train_small("late", tmp_path, "--epochs", "1", "--dry-run") == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "layer1.0.attention.fc.bias is made in the first forward" in error


class Lazy(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.LazyLinear(channels)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]


class LateBuffer(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.training:
            self.mean = x.detach().mean()
        return x


class Listed(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = [nn.Linear(channels, channels)]

    def forward(self, x):
        return x * self.layers[0](x.mean((2, 3))).sigmoid()[:, :, None, None]


class Views(nn.Module):
    """As the authors of SGE (arXiv 1905.09646) form groups."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x):
        n, c, h, w = x.shape
        return x * x.view(n * 4, -1, h, w).mean((2, 3)).sigmoid().view(n, c, 1, 1)


@pytest.mark.parametrize(("module", "words"), [
    (Lazy, "layer1.0.attention.fc.weight is of a lazy layer"),
    (LateBuffer, "layer1.0.attention.mean is made in the first forward"),
    (Listed, "layer1.0.attention.layers has its layers in a plain list"),
    (Views, "layer1.0.attention: use reshape instead of view"),
])  # fmt: skip
def test_what_would_not_train_is_refused_before_training(
    module, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(models.MODELS, "mine", (module, "blocks"))
    assert train_small("mine", tmp_path, "--width", "16", "--dry-run") == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and words in error


class Kernels(nn.Module):
    """Parameters of other shapes than layers have, a loss of its own, now and then no branch."""

    def __init__(self, channels: int):
        super().__init__()
        self.kernels = nn.Parameter(torch.zeros(2, channels, 1, 3, 3))
        self.complex = nn.Parameter(torch.zeros(channels, 3, 2, 2))

    def forward(self, x):
        gate = (self.kernels.mean((0, 2, 3, 4)) + torch.view_as_complex(self.complex).abs().sum(
            (1, 2))).sigmoid()  # fmt: skip
        if self.training:
            self.loss = gate.mean()
            if torch.rand(()) < 0.3:
                return 0
        return x * gate[:, None, None]


def test_a_module_may_have_any_parameters_and_a_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mine", (Kernels, "blocks"))
    assert train_small("mine", tmp_path, "--width", "16", "--epochs", "1") == 0


class Drifts(nn.Module):
    """A state that best.pt lacks."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x):
        self.scale *= 0.5 if self.training else 1.0
        return x * self.scale


@pytest.mark.parametrize("ema", [[], ["--ema", "0.9"]])
def test_the_tested_weights_are_those_of_best_pt_alone(ema, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mine", (Drifts, "blocks"))
    assert train_small("mine", tmp_path, "--epochs", "1", *ema) == 0
    run = str(tmp_path / "fashion_mnist/published/mine/seed0")
    assert explain.main(["--run", run, "--limit-test", "100", "--out", str(tmp_path)]) == 0


class TwoLayers(Lazy):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.Linear(4, channels))


class OneLayer(Lazy):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.fc = nn.Linear(channels, channels)


def test_a_module_that_was_rewritten_does_not_cost_a_stopped_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "mine", (TwoLayers, "blocks"))
    assert train_small("mine", tmp_path / "whole", "--epochs", "2") == 0
    folder = "fashion_mnist/published/mine/seed0"
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        assert train_small("mine", tmp_path / "parts", "--epochs", "2") == 130
    there = {p: p.read_bytes() for p in (tmp_path / "parts").rglob("*") if p.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setitem(models.MODELS, "mine", (OneLayer, "blocks"))
        assert train_small("mine", tmp_path / "parts", "--epochs", "2") == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "does not fit the model or the optimizer" in error
    now = {p: p.read_bytes() for p in (tmp_path / "parts").rglob("*") if p.is_file()}
    assert {p for p in there if there[p] != now.get(p)} == set()
    assert train_small("mine", tmp_path / "parts", "--epochs", "2") == 0
    assert metrics_of(tmp_path / "whole" / folder) == metrics_of(tmp_path / "parts" / folder)


class ReturnsGate(nn.Module):
    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).sigmoid()


class HasAttention(ReturnsGate):
    """A right module with a part that is called attention."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.attention = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        return x * self.attention(x).sigmoid()


def test_a_part_of_a_module_may_be_called_attention(monkeypatch):
    monkeypatch.setitem(models.MODELS, "mine", (HasAttention, "blocks"))
    model = models.build_model("mine", width=4)
    assert len(attribution.attention_modules(model)) == 8
    attribution.check_shapes(model, torch.zeros(2, 1, 28, 28))


class Registered(ReturnsGate):
    """Its layers are in a list, and in the module."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.fc = nn.Linear(channels, channels)
        self.layers = [self.fc]

    def forward(self, x):
        return x * self.layers[0](x.mean((2, 3)))[:, :, None, None]


def test_layers_may_also_be_in_a_list_and_images_large(monkeypatch):
    monkeypatch.setitem(models.MODELS, "mine", (Registered, "blocks"))
    attribution.check_shapes(models.build_model("mine", width=4), torch.zeros(2, 1, 28, 28))
    attribution.check_shapes(models.build_model("bam", width=2), torch.zeros(2, 1, 320, 320))


class ReturnsBoth(ReturnsGate):
    def forward(self, x):
        return x, super().forward(x)


class Halves(ReturnsGate):
    def forward(self, x):
        return x[:, ::2]


class Doubles(ReturnsGate):
    def forward(self, x):
        return x * torch.ones((), dtype=torch.float64).expand(1, 1, 1, 1)


@pytest.mark.parametrize("module", [ReturnsGate, ReturnsBoth, Halves, Doubles])
def test_a_module_that_returns_another_shape_or_dtype_is_named_before_training(
    module, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(models.MODELS, "mine", (module, "blocks"))
    for flags in (["--dry-run"], []):
        assert train_small("mine", tmp_path, "--epochs", "1", *flags) == 1
        error = capsys.readouterr().err
        assert is_one_line(error) and f"layer1.0.attention ({module.__name__}) makes " in error
        assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", ["eca-3", "2d", ".hidden", "-se", "a b"])
def test_a_name_is_taken_by_every_script_or_by_none(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, name, models.MODELS["eca"])
    if name in ("eca-3", "2d"):
        assert train_small(name, tmp_path, "--epochs", "1") == 0
        run = str(tmp_path / f"fashion_mnist/published/{name}/seed0")
        assert explain.main(["--run", run, "--limit-test", "10", "--out", str(tmp_path)]) == 0
        return
    for flags in ([f"--model={name}"], ["--model=se", f"--dataset={tmp_path}/{name}"]):
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags, "--device", "cpu"])
        assert stopped.value.code == 2 and "names have letters" in capsys.readouterr().err
