"""Recipes: the parts of `strong` against their formulas, the schedule of `short`."""

import copy
import json
import math

import data
import train
from kit import checkpoint
from kit.augment import Augmentation
from kit.ema import EMA
from kit.fast import channels_last
from models import build_model

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, HostWatch, assert_same, metrics_of, settings_of, state_at
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

FLAGS = ["--model", "cbam_blocks", "--recipe", "strong", "--cutmix", "1", "--width", "8"]
FLAGS += ["--device", "cpu"]
FLAGS += ["--limit-train", "168", "--limit-test", "100", "--epochs", "3", "--warmup", "1"]
FLAGS += ["--randaugment", "1", "--data-dir", str(REPO / "data")]
FOLDER = "fashion_mnist/strong/cbam_blocks/seed0"


def test_adamw_decays_the_weights_alone():
    """Algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101), in float64."""
    layer = torch.nn.Linear(7, 5)
    optimizer = train.adam(layer, 1e-2, weight_decay=0.3)
    values = {key: p.detach().double() for key, p in layer.named_parameters()}
    m, v = dict.fromkeys(values, 0.0), dict.fromkeys(values, 0.0)
    for t in range(1, 5):
        optimizer.zero_grad()
        layer(torch.rand(3, 7)).square().sum().backward()
        optimizer.step()
        for key, parameter in layer.named_parameters():
            gradient = parameter.grad.double()
            m[key] = 0.9 * m[key] + 0.1 * gradient
            v[key] = 0.999 * v[key] + 0.001 * gradient**2
            decay = 0.3 if key == "weight" else 0.0
            step = (m[key] / (1 - 0.9**t)) / ((v[key] / (1 - 0.999**t)).sqrt() + 1e-8)
            values[key] -= 1e-2 * (step + decay * values[key])
            torch.testing.assert_close(parameter.double(), values[key], rtol=1e-5, atol=1e-7)


def test_warm_up_then_cosine():
    optimizer = train.adam(torch.nn.Linear(2, 2), 0.4)
    scheduler = train.cosine(optimizer, steps=10, warmup=3)
    found = []
    for _ in range(10):
        found.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    cosine = [0.2 * (1 + math.cos(math.pi * i / 7)) for i in range(7)]
    assert found == pytest.approx([0.1, 0.2, 0.3, *cosine]) and found[3] == pytest.approx(0.4)
    assert float(scheduler.get_last_lr()[0]) == pytest.approx(0)


def test_the_ema_is_a_moving_average():
    model = torch.nn.BatchNorm1d(3)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().double()
    for t in range(100):
        with torch.no_grad():
            model.weight.copy_(torch.rand(3))
            model.running_mean.fill_(t)
        model.num_batches_tracked.fill_(t)
        ema.update()
        new = max(0.1, 9 / (10 + t))
        expected += new * (model.weight.detach().double() - expected)
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.model.num_batches_tracked == 99
    assert 85 < ema.model.running_mean[0] < 95  # about 9 steps behind
    again = EMA(model, decay=0.9)
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert torch.equal(again.model.weight, ema.model.weight) and again.steps == 100


def test_the_ema_of_a_shared_layer_moves_once():
    layer = torch.nn.Linear(1, 1)
    model = torch.nn.Sequential(layer, layer)
    ema = EMA(model, decay=0.9)
    before = layer.weight.item()
    with torch.no_grad():
        layer.weight += 1
    ema.update()
    assert ema.model[0].weight.item() == pytest.approx(before + 0.9)


@pytest.fixture(scope="module")
def strong_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("strong")
    assert train.main([*FLAGS, "--runs", str(runs)]) == 0
    return runs / FOLDER


def test_the_loop_equals_an_obvious_one(strong_run, fashion_mnist):
    """Augmented, mixed, smoothed, decayed, warmed up, averaged: as one would write it down."""
    train_idx, val_idx = data.split_indices(60_000, seed=0)
    train_idx, val_idx = train_idx[:168], val_idx[:64]
    mean, std = fashion_mnist.mean[0], fashion_mnist.std[0]
    augmentation = Augmentation(crop=2, flip=True, randaugment=1, erase=0.25, cutmix=1.0)
    model = channels_last(build_model("cbam_blocks", width=8, seed=0))
    averaged = copy.deepcopy(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.05)
    steps, expected = 0, []
    for epoch, lr in ((1, 1e-3), (2, 2e-3), (3, 1e-3)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        order, total = data.shuffled(train_idx, 0, epoch), 0.0
        params = augmentation.make_params(168, 0, epoch)
        for part in (slice(64), slice(64, 128), slice(128, 168)):
            idx = order[part]
            pixels = augmentation.of_pixels(fashion_mnist.train_images[idx], params[part])
            images, weight = augmentation.of_normalized((pixels / 255 - mean) / std, params[part])
            one_hot = F.one_hot(fashion_mnist.train_labels[idx], 10).float()
            targets = weight[:, None] * one_hot + (1 - weight[:, None]) * one_hot.roll(1, 0)
            targets = 0.9 * targets + 0.1 / 10
            loss = -(targets * F.log_softmax(model(images), 1)).sum(1).mean()
            model.zero_grad()
            loss.backward()
            optimizer.step()
            new = max(1e-3, 9 / (10 + steps))
            steps += 1
            for key, value in averaged.state_dict().items():
                fresh = model.state_dict()[key]
                value.copy_(new * fresh + (1 - new) * value if fresh.is_floating_point() else fresh)
            total += loss.item() * len(idx)
        with torch.no_grad():
            logits = averaged.eval()((fashion_mnist.train_images[val_idx] / 255 - mean) / std)
        val_loss = F.cross_entropy(logits, fashion_mnist.train_labels[val_idx]).item()
        expected.append((lr, total / 168, val_loss))
    found = [json.loads(line) for line in (strong_run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["lr"], row["train_loss"], row["val_loss"]) for row in found]
    for ours, obvious in zip(found, expected, strict=True):
        assert ours == pytest.approx(obvious, rel=2e-4)


@pytest.fixture(scope="module")
def strong_state(tmp_path_factory):
    """In the last validation: an epoch has three steps and one batch to validate."""
    return state_at(12, tmp_path_factory.mktemp("strong_state"), FLAGS)


def test_the_ema_is_tested_and_kept(strong_run, strong_state):
    last = strong_state
    best = torch.load(strong_run / "best.pt", weights_only=True)
    if json.loads((strong_run / "result.json").read_text())["best_epoch"] == 3:
        key = "layer1.0.conv1.weight"
        assert torch.equal(best[key], last["ema"]["model"][key])
        assert not torch.equal(best[key], last["model"][key])
    assert last["ema"]["steps"] == 9


@pytest.mark.parametrize("n", [3, 6])
def test_stopped_and_resumed_it_ends_the_same(strong_run, strong_state, tmp_path, n):
    state_at(n, tmp_path, FLAGS)
    state = state_at(13 - n, tmp_path, FLAGS)
    for part in ("model", "ema", "optimizer", "scheduler"):
        assert_same(state[part], strong_state[part])
    assert train.main([*FLAGS, "--runs", str(tmp_path)]) == 0
    assert metrics_of(tmp_path / FOLDER) == metrics_of(strong_run)
    predictions = [np.load(f / "test_predictions.npy") for f in (strong_run, tmp_path / FOLDER)]
    assert np.array_equal(*predictions)


@pytest.mark.slow
def test_compiled_it_does_the_same(strong_run, tmp_path):
    assert train.main([*FLAGS, "--mode", "compile", "--runs", str(tmp_path)]) == 0
    losses = [
        [json.loads(line)["train_loss"] for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (strong_run, tmp_path / FOLDER)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# --- short: annealed per batch, the last weights tested -------------------------------------------

SHORT = ["--model", "se", "--recipe", "short", "--width", "8", "--limit-train", "80"]
SHORT += ["--epochs", "3", "--batch-size", "16", "--limit-test", "40", "--device", "cpu"]
SHORT += ["--data-dir", str(REPO / "data")]  # 5 steps an epoch, 15 in all
SHORT_FOLDER = "fashion_mnist/short/se/seed0"


def rate(step, warmup=0, steps=15):
    if step < warmup:
        return 1e-3 * (step + 1) / (warmup + 1)
    return 5e-4 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize(
    ("mode", "warmup"),
    [("eager", 0), ("eager", 1), pytest.param("compile", 0, marks=pytest.mark.slow)],
)
def test_the_learning_rate_of_every_step(mode, warmup, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(float(optimizer.param_groups[0]["lr"]))
    )
    try:
        flags = [*SHORT, "--mode", mode, "--warmup", str(warmup), "--runs", str(tmp_path)]
        assert train.main(flags) == 0
    finally:
        hook.remove()
    expected = [rate(step, 5 * warmup) for step in range(15)]
    assert rates[-15:] == pytest.approx(expected)  # a compiled step was tried before
    epochs = [row["lr"] for row in metrics_of(tmp_path / SHORT_FOLDER)]
    at_the_end = [rate(step, 5 * warmup) for step in (5, 10, 15)]
    assert epochs == pytest.approx(at_the_end, abs=1e-12) and epochs[-1] == 0


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("short")
    assert train.main([*SHORT, "--runs", str(runs)]) == 0
    return runs / SHORT_FOLDER


@pytest.fixture(scope="module")
def short_state(tmp_path_factory):
    """In the last validation: an epoch has five steps and one batch to validate."""
    return state_at(18, tmp_path_factory.mktemp("short_state"), SHORT)


@pytest.mark.parametrize("n", [3, 9])
def test_short_stopped_within_an_epoch_ends_the_same(n, short_run, short_state, tmp_path):
    assert state_at(n, tmp_path, SHORT)["progress"]["step"] == {3: 2, 9: 2}[n]
    state = state_at(19 - n, tmp_path, SHORT)
    for part in ("model", "optimizer", "scheduler"):
        assert_same(state[part], short_state[part])
    assert train.main([*SHORT, "--runs", str(tmp_path)]) == 0
    assert metrics_of(tmp_path / SHORT_FOLDER) == metrics_of(short_run)


def test_short_tests_the_last_weights(short_run, short_state):
    """Whichever epoch is best in validation: best.pt holds what test_predictions.npy is of."""
    result = json.loads((short_run / "result.json").read_text())
    rows = metrics_of(short_run)
    assert result["test_acc"] == result["test_acc_last"] and result["best_epoch"] == 3
    assert result["val_acc"] == rows[-1]["val_acc"]
    assert_same(checkpoint.load(short_run / "best.pt"), dict(short_state["model"]))
    assert result["epochs_run"] == 3 and not result["stopped_early"]


def test_on_a_gpu_the_rate_is_set_without_waiting():
    with FakeTensorMode(), HostWatch() as watch:
        optimizer = torch.optim.Adam(torch.nn.Linear(2, 2, device="cuda").parameters())
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device="cuda")  # as train.adam does
        for warmup in (0, 4):
            scheduler = train.cosine(optimizer, steps=20, warmup=warmup)
            for _ in range(20):
                scheduler.step()
        assert optimizer.param_groups[0]["lr"].is_cuda
    assert watch.found == []


@pytest.mark.parametrize(("flags", "quick"), [
    ("--recipe published", False), ("--recipe short", False), ("--recipe strong", False),
    ("--recipe quick", True), ("--recipe quick --epochs 50 --limit-train 0", True),
    ("--recipe short --epochs 9", True), ("--recipe short --epochs 20", False),
    ("--recipe short --patience 3", True), ("--recipe published --patience 9", True),
    ("--recipe published --patience 0", False), ("--recipe published --epochs 49", True),
    ("--recipe short --limit-train 50000", True), ("--recipe short --limit-test 9999", True),
    ("--recipe short --width 16", False), ("--recipe published --width 8", False),
])  # fmt: skip
def test_a_smoke_test_is_shorter_than_its_own_recipe(flags, quick):
    assert settings_of("--model", "se", *flags.split()).quick == quick


OFF = ["--weight-decay", "0", "--warmup", "0", "--label-smoothing", "0", "--ema", "0"]
OFF += ["--crop", "0", "--no-flip", "--erase", "0", "--cutmix", "0", "--normalize", "half"]


AUGMENTATIONS = ("crop", "flip", "randaugment", "erase", "cutmix")


def test_every_part_has_a_flag_and_can_be_left_out():
    published, strong = train.RECIPES["published"], train.RECIPES["strong"]
    settings = settings_of("--model", "se", "--recipe", "strong", *OFF)
    assert not any(getattr(settings, key) for key in AUGMENTATIONS)
    changed = {key for key in strong if strong[key] != published[key]} - {"lr", "patience"}
    assert settings.overrides == {key: published[key] for key in changed}
    same = settings_of("--model", "se", *OFF, "--randaugment", "0")
    assert same.overrides == {} and same.normalize == "half"


def test_a_run_is_called_by_what_was_changed_of_its_model():
    def named(*flags):
        settings = settings_of("--model", *flags)
        return settings.model, settings.base_model, settings.position, settings.reduction

    assert named("se") == ("se", "se", None, None)
    assert named("se", "--reduction", "16") == ("se_r16", "se", None, 16)
    assert named("eca", "--position", "classifier") == ("eca_classifier", "eca", "classifier", None)
    both = named("se", "--position", "prepool", "--reduction", "8")
    assert both == ("se_prepool_r8", "se", "prepool", 8)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--warmup", "3", "--epochs", "3"], "must be less than --epochs 3"),
        (["--ema", "1"], "is not from 0 to 0.999999"),
        (["--erase", "1.5"], "is not from 0 to 1"),
        (["--normalize", "all"], "invalid choice"),
    ],
)
def test_wrong_parts_are_usage_errors(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        settings_of("--model", "se", *flags)
    assert words in capsys.readouterr().err
