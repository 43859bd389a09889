import json
import math
import os
import re
import shutil
import tempfile

import data
import train
from kit.decoding import pixels
from kit.fast import channels_last
from models import build_model

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    REPO,
    SMALL,
    is_one_line,
    metrics_of,
    script,
    settings_of,
    state_at,
    train_small,
)
from PIL import Image


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": 200}, "epoch is no setting"),
        ({"lr": -1}, "argument --lr: -1 is not from 1e-09 to"),
        ({"batch_size": 0}, "argument --batch-size: 0 is not"),
        ({"epochs": 1.5}, "--epochs: invalid int value"),
        ({"anneal": "step"}, "--anneal: invalid choice: 'step'"),
        ({"ema": math.inf}, "--ema: inf is not"),
        ({"precision": "fp16"}, "--precision: invalid choice: 'fp16'"),
        ({"epochs": "ten"}, "--epochs: invalid int value: 'ten'"),
    ],
)
def test_a_recipe_is_checked_as_flags_are(monkeypatch, capsys, change, said):
    monkeypatch.setitem(train.RECIPES, "mine", train.PUBLISHED | change)
    with pytest.raises(SystemExit) as stopped:
        settings_of("--model", "se", "--recipe", "mine")
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and is_one_line(error) and "recipe mine" in error and said in error
    )


def test_a_recipe_may_have_any_flag_of_its_own(monkeypatch):
    monkeypatch.setitem(train.RECIPES, "mine", dict(width=16, epochs="3", flip=True))
    settings = settings_of("--model", "se", "--recipe", "mine", "--lr", "0.5")
    assert (settings.width, settings.epochs, settings.flip, settings.batch_size) == (
        16,
        3,
        True,
        64,
    )
    assert settings.overrides == {"width": 16, "lr": 0.5} and not settings.quick


def test_the_published_recipe_stays_as_it_is(fashion_mnist):
    settings = settings_of("--model", "se")
    not_used = {"limit_train": 0, "limit_test": 0, "weight_decay": 0, "warmup": 0, "ema": 0}
    not_used |= {"label_smoothing": 0, "crop": 0, "flip": False, "randaugment": 0, "erase": 0}
    not_used |= {"cutmix": 0}
    used = {"epochs": 50, "batch_size": 64, "lr": 1e-3, "patience": 10, "normalize": "half"}
    used |= {"anneal": "epoch", "tested": "best"}
    assert train.RECIPES["published"] == used | not_used
    assert {key: getattr(settings, key) for key in used} == used
    assert (settings.recipe, settings.width) == ("published", 64)
    mean_and_std = fashion_mnist.mean_and_std(settings.normalize, torch.device("cpu"))
    assert [value.item() for value in mean_and_std] == [0.5, 0.5]
    assert not settings.quick and settings.overrides == {}


def test_explicit_flags_win_over_the_recipe():
    settings = settings_of("--model", "se", "--recipe", "quick", "--epochs", "3")
    assert (settings.epochs, settings.limit_train, settings.limit_test) == (3, 1920, 1000)
    assert settings.overrides == {"epochs": 3} and settings.quick
    assert not settings_of("--model", "se", "--lr", "0.01").quick
    assert not settings_of("--model", "se", "--width", "16").quick  # another network
    bf16 = settings_of("--model", "se", "--precision", "bf16", "--device", "cpu")
    assert bf16.overrides == {"precision": "bf16"} and not bf16.quick


def test_help_has_groups_and_each_default_of_a_recipe_that_differs(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    titles = (
        "what to train: --model",
        "recipe: Defaults",
        "the run: --seed",
        "the machine: --device",
    )
    places = [words.index(title) for title in titles]
    assert places == sorted(places) and "options:" in words[: places[0]]
    for flag in train.SETTINGS:
        assert places[1] < words.index(f" --{flag.replace('_', '-')}", places[1]) < places[2]
    assert "default: 50, quick: 1, short: 10 " in words and "default: off, strong: on " in words
    assert "per image; default: 0, strong: 0.25 " in words
    assert "the last partial batch is kept; default: 64 --lr" in words


def test_normalize_does_what_its_help_says(fashion_mnist):
    """half: pixels scaled to [-1, 1]; data: mean 0, std 1 in each channel."""
    scaled = {}
    for name in ("half", "data"):
        mean, std = fashion_mnist.mean_and_std(name, torch.device("cpu"))
        scaled[name] = (fashion_mnist.train_images[::10] / 255 - mean) / std
    assert (scaled["half"].min(), scaled["half"].max()) == (-1, 1)
    assert scaled["data"].mean().item() == pytest.approx(0, abs=0.01)
    assert scaled["data"].std().item() == pytest.approx(1, abs=0.01)


def test_run_folder_holds_what_it_should(finished_run):
    names = {path.name for path in finished_run.iterdir() if "tfevents" not in path.name}
    names -= {"code.diff"}  # there where the code differs from its commit
    assert names == {
        "config.json", "env.json", "metrics.jsonl", "best.pt", "test_predictions.npy",
        "test_labels.npy", "result.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert set(rows[0]) == {
        "epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds",
        "images_per_second",
    }  # fmt: skip
    result = result_of(finished_run)
    assert set(result) >= {
        "model", "dataset", "recipe", "seed", "width", "test_acc", "test_acc_last", "val_acc",
        "best_epoch", "epochs_run", "stopped_early", "params", "train_seconds",
        "images_per_second", "precision", "mode", "device", "quick",
    }  # fmt: skip
    assert (result["model"], result["epochs_run"], result["quick"]) == ("cbam_blocks", 2, True)
    config = json.loads((finished_run / "config.json").read_text())
    assert config["command"].startswith("python train.py --model cbam_blocks")
    assert (config["mode"], config["precision"]) == ("eager", "fp32")  # what auto came to
    assert config["overrides"] == {"epochs": 2, "limit_train": 160, "limit_test": 100, "width": 8}
    env = json.loads((finished_run / "env.json").read_text())
    assert env["torch"] == torch.__version__ and len(env["sha256"]["models.py"]) == 64


def test_best_weights_give_the_predictions_and_the_accuracy(finished_run, fashion_mnist):
    model = channels_last(build_model("cbam_blocks", width=8))
    model.load_state_dict(torch.load(finished_run / "best.pt", weights_only=True))
    tested = data.stratified(fashion_mnist.test_labels, 100)
    images = (fashion_mnist.test_images[tested] / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = model.eval()(images).argmax(1)
    predictions = np.load(finished_run / "test_predictions.npy")
    assert predictions.dtype == np.uint8 and predictions.tolist() == expected.tolist()
    labels = np.load(finished_run / "test_labels.npy")
    assert np.bincount(labels).tolist() == [10] * 10
    assert labels.tolist() == fashion_mnist.test_labels[tested].tolist()
    correct = (expected.numpy() == labels).sum()
    assert result_of(finished_run)["test_acc"] == pytest.approx(correct)


@pytest.mark.parametrize(("isa", "width", "batch"), [("AVX2", 4, 16), ("AVX512_CORE", 8, 15)])
def test_training_a_narrow_model_damages_no_memory(isa, width, batch, tmp_path):
    """In channels_last oneDNN writes beyond its memory, which glibc's checks find at once."""
    env = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    env |= {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": isa}
    flags = ["--model", "se", "--width", str(width), "--batch-size", str(batch), "--mode", "eager"]
    small = ["--limit-train", "48", "--limit-test", "20", "--epochs", "1", "--device", "cpu"]
    place = ["--data-dir", REPO / "data", "--runs", tmp_path]
    run = script("train.py", *flags, *small, *place, env=os.environ | env, timeout=200)
    assert "test accuracy" in run.stdout, run.stderr


def test_a_narrow_model_on_a_cpu_keeps_the_default_layout():
    for width, last in ((2, False), (8, False), (15, False), (16, True), (64, True)):
        weight = channels_last(build_model("baseline", width=width)).layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last


def test_the_loop_equals_an_obvious_one(finished_run, fashion_mnist, tmp_path):
    """The published recipe step by step: same losses, same weights, bit for bit."""
    train_idx, val_idx = data.split_indices(60_000, seed=0)
    train_idx, val_idx = train_idx[:160], val_idx[:64]
    images = (fashion_mnist.train_images / 255 - 0.5) / 0.5
    labels = fashion_mnist.train_labels
    model = channels_last(build_model("cbam_blocks", width=8, seed=0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    expected = []
    for epoch in (1, 2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * (epoch - 1) / 2)) / 2
        model.train()
        order, total, correct = data.shuffled(train_idx, 0, epoch), 0.0, 0
        for batch in (order[:64], order[64:128], order[128:]):
            logits = model(images[batch])
            loss = F.cross_entropy(logits, labels[batch])
            model.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
            correct += (logits.argmax(1) == labels[batch]).sum().item()
        with torch.no_grad():
            logits = model.eval()(images[val_idx])
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "train_loss": total / 160}
        row["train_acc"] = 100 * correct / 160
        row["val_loss"] = F.cross_entropy(logits, labels[val_idx])
        row["val_acc"] = 100 * (logits.argmax(1) == labels[val_idx]).float().mean().item()
        expected.append({key: pytest.approx(float(value), rel=1e-6) for key, value in row.items()})
    assert metrics_of(finished_run) == expected
    command = ["--model", "cbam_blocks", *SMALL, "--data-dir", str(REPO / "data"), "--epochs", "2"]
    last = state_at(8, tmp_path, command)["model"]  # in the last validation
    for key, value in model.state_dict().items():
        assert torch.equal(last[key], value), key


def test_same_seed_same_figures(finished_run, tmp_path):
    assert train_small("cbam_blocks", tmp_path, "--epochs", "2") == 0
    again = tmp_path / "fashion_mnist/published/cbam_blocks/seed0"
    assert metrics_of(again) == metrics_of(finished_run)
    predictions = [np.load(folder / "test_predictions.npy") for folder in (again, finished_run)]
    assert np.array_equal(*predictions)


def test_a_finished_run_is_left_alone(finished_run, tmp_path, capsys):
    folder = tmp_path / "fashion_mnist/published/cbam_blocks/seed0"
    shutil.copytree(finished_run, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train_small("cbam_blocks", tmp_path, "--epochs", "2") == 0
    assert "already complete" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    env = json.loads((folder / "env.json").read_text())
    env["sha256"]["models.py: SE"] = "another"
    (folder / "env.json").write_text(json.dumps(env))
    before["env.json"] = (folder / "env.json").stat().st_mtime_ns
    assert train_small("cbam_blocks", tmp_path, "--epochs", "2") == 0
    assert "(models.py: SE edited since; --overwrite" in capsys.readouterr().out

    assert train_small("cbam_blocks", tmp_path, "--epochs", "2", "--lr", "0.01") == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "lr 0.001 instead of 0.01" in error and "--overwrite" in error
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    assert train_small("cbam_blocks", tmp_path, "--epochs", "1", "--overwrite") == 0
    assert result_of(folder)["epochs_run"] == 1
    assert len(list(folder.glob("*tfevents*"))) == 1


def test_a_new_setting_leaves_finished_and_stopped_runs_what_they_are(
    finished_run, tmp_path, capsys, monkeypatch
):
    """As after README's "A setting", with a default that is not 0."""
    folder = tmp_path / "fashion_mnist/published/cbam_blocks/seed0"
    shutil.copytree(finished_run, folder)
    env = json.loads((folder / "env.json").read_text())
    env["sha256"]["train.py: prepare"] = "as it was"
    (folder / "env.json").write_text(json.dumps(env))
    command = ["--model", "se", *SMALL, "--data-dir", str(REPO / "data"), "--epochs", "1"]
    state_at(2, tmp_path / "stopped", command)
    monkeypatch.setitem(train.SETTINGS, "momentum", (0.9, "of SGD"))
    for recipe in train.RECIPES.values():
        monkeypatch.setitem(recipe, "momentum", 0.9)
    assert train_small("cbam_blocks", tmp_path, "--epochs", "2") == 0
    out = capsys.readouterr().out
    assert "already complete" in out and "(train.py: prepare edited since; " in out
    assert train.main([*command, "--runs", str(tmp_path / "stopped")]) == 0
    assert "resuming in epoch 1, after 1 steps" in capsys.readouterr().out
    for runs, model, epochs in ((tmp_path, "cbam_blocks", "2"), (tmp_path / "stopped", "se", "1")):
        assert train_small(model, runs, "--epochs", epochs, "--momentum", "0.5") == 1
        error = capsys.readouterr().err
        assert is_one_line(error) and "a run with momentum " in error and " instead of 0.5" in error


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(finished_run, tmp_path):
    folder = tmp_path / "fashion_mnist/published/cbam_blocks/seed0"
    shutil.copytree(finished_run, folder)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"not labels")
    flags = ["--epochs", "2", "--overwrite", "--data-dir", str(tmp_path)]
    assert train_small("cbam_blocks", tmp_path, *flags) == 1
    assert result_of(folder) == result_of(finished_run)


@pytest.mark.parametrize("name", ["config.json", "env.json", "result.json"])
def test_json_of_another_shape_is_one_line(finished_run, tmp_path, capsys, name):
    folder = tmp_path / "fashion_mnist/published/cbam_blocks/seed0"
    shutil.copytree(finished_run, folder)
    for content in ("null", "[]", "{}", "3", "{"):
        (folder / name).write_text(content)
        code = train_small("cbam_blocks", tmp_path, "--epochs", "2")
        out, error = capsys.readouterr()
        assert code == 1 and is_one_line(error) and name in error and "--overwrite" in error
        assert "already complete" not in out


def test_early_stopping(tmp_path):
    flags = ["--epochs", "40", "--patience", "2", "--lr", "0.02"]
    assert train_small("baseline", tmp_path, *flags) == 0
    folder = tmp_path / "fashion_mnist/published/baseline/seed0"
    result, accuracies = result_of(folder), [row["val_acc"] for row in metrics_of(folder)]
    assert result["stopped_early"] and result["epochs_run"] == len(accuracies) < 40
    best = accuracies.index(max(accuracies)) + 1
    assert result["best_epoch"] == best == result["epochs_run"] - 2
    for end in range(3, len(accuracies)):  # it did not run past an earlier reason to stop
        assert max(accuracies[:end]) in accuracies[end - 2 : end]
    assert result["val_acc"] == max(accuracies)


def test_nan_stops_the_run_and_names_the_step(tmp_path, capsys):
    assert train_small("se", tmp_path, "--epochs", "2", "--lr", "1e9") == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and re.search(
        "the loss is (nan|inf) at epoch 1, step [23] of 3", error
    )
    assert not (tmp_path / "fashion_mnist/published/se/seed0/result.json").exists()

    # One step, whose own loss is still finite: validation shows it.
    flags = ["--width", "1", "--limit-train", "64", "--epochs", "1", "--lr", "1e9", "--overwrite"]
    assert train_small("se", tmp_path, *flags) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "validation loss is" in error


def test_a_target_is_in_percent(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", "se", "--target-acc", "0.9"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and is_one_line(error) and "0.9 is not from 1 to 100" in error


def test_target_accuracy(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "fashion_mnist/published/cbam_blocks/seed0")
    accuracy = result_of(finished_run)["test_acc"]
    for target, code in ((accuracy, 0), (accuracy + 0.01, 1)):
        flags = ["--epochs", "2", "--target-acc", str(target)]
        assert train_small("cbam_blocks", tmp_path, *flags) == code
    assert "misses the target" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dry_run_goes_through_and_keeps_nothing(tmp_path, capsys, monkeypatch, precision):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = ["--dry-run", "--precision", precision]
    assert train_small("cbam_classifier", tmp_path, *flags) == 0
    assert "64 training, 64 validation, 64 test images" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "resnet"], "resnet"),
        (["--model", "se", "--recipe", "fast"], "fast"),
        (["--model", "se", "--epochs", "0"], "--epochs"),
        (["--model", "se", "--lr", "nan"], "--lr"),
        (["--model", "se", "--batch-size", "x"], "--batch-size"),
        (["--model", "se", "--device", "gpu"], "gpu"),
        (["--model", "se", "--device", "cpu", "--precision", "tf32"], "tf32"),
        (["--model", "se", "--position", "conv1"], "--position"),
        (["--model", "baseline", "--position", "blocks"], "baseline has no attention"),
        (["--model", "eca", "--reduction", "8"], "eca has no reduction"),
        ([], "--model"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and is_one_line(error) and named in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_though_asked_for(capsys):
    with pytest.raises(SystemExit):
        train.main(["--model", "se", "--device", "cuda"])
    assert "sees no CUDA GPU" in capsys.readouterr().err


def test_unwritable_runs_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file, not a folder")
    assert train_small("se", tmp_path / "runs") == 1
    assert is_one_line(capsys.readouterr().err)


def test_missing_data_is_one_line(tmp_path):
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"not labels")
    flags = ["--data-dir", tmp_path, "--runs", tmp_path / "runs"]
    done = script("train.py", "--model", "se", *SMALL, *flags)
    assert done.returncode == 1 and "t10k-labels-idx1-ubyte" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_other_runs_stay_where_one_cannot_get_its_data(tmp_path):
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"not labels")
    other = tmp_path / "runs/fashion_mnist/published/baseline/seed0/result.json"
    other.parent.mkdir(parents=True)
    other.touch()
    assert train_small("se", tmp_path / "runs", "--data-dir", str(tmp_path)) == 1
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == [other]
    assert not (tmp_path / "runs/fashion_mnist/published/se").exists()


@pytest.mark.parametrize("flags", [["--limit-train", "65"], ["--batch-size", "1"]])
def test_a_batch_of_one_image_is_refused(tmp_path, capsys, flags):
    """BatchNorm's statistics of one image on a map of one position are undefined."""
    assert train_small("se", tmp_path / "runs", *flags) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "--batch-size" in error
    assert not (tmp_path / "runs").exists()


def test_adam_is_adam():
    """Algorithm 1 of Kingma and Ba (arXiv 1412.6980), in float64."""
    layer = torch.nn.Linear(7, 5)
    weight, m, v = layer.weight.detach().double(), 0.0, 0.0
    optimizer = train.adam(layer, 1e-3)
    scheduler = train.cosine(optimizer, steps=4)
    for t in range(1, 5):
        optimizer.zero_grad()
        layer(torch.rand(3, 7)).square().sum().backward()
        gradient = layer.weight.grad.double()
        optimizer.step()
        scheduler.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = 1e-3 * (1 + math.cos(math.pi * (t - 1) / 4)) / 2
        weight -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        assert torch.allclose(layer.weight.double(), weight, rtol=1e-6, atol=1e-8)


(CODE_ELSEWHERE,) = re.findall(
    r"```python\n(import json.*?)```", (REPO / "docs/running.md").read_text(), re.DOTALL
)


def test_a_trained_model_is_used_elsewhere_as_the_docs_say(finished_run, fashion_mnist, tmp_path):
    tested = data.stratified(fashion_mnist.test_labels, 100)
    predicted = np.load(finished_run / "test_predictions.npy")
    for i in (0, 41, 99):
        picture = tmp_path / "image.png"
        Image.fromarray(fashion_mnist.test_images[tested[i], 0].numpy()).save(picture)
        variables = f"run, picture = {str(finished_run)!r}, {str(picture)!r}"
        done = script("-c", f"{variables}\n{CODE_ELSEWHERE}")
        assert done.stdout.strip() == fashion_mnist.classes[predicted[i]], done.stderr


def test_a_picture_elsewhere_is_read_as_in_training(tmp_path, capsys):
    """Transparent, turned by its EXIF, larger: the same pixels, and the class that the run says."""
    generator, exif = np.random.default_rng(0), Image.Exif()
    exif[0x112] = 6
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(12):
            image = generator.integers(0, 256, (20, 30, 4)).astype(np.uint8)
            image[..., :3] //= 1 + (name == "cat")
            Image.fromarray(image, "RGBA").resize((30 + i, 20)).save(
                tmp_path / "pets" / name / f"{i}.png", exif=exif if i % 2 else Image.Exif()
            )
    flags = ["--dataset", str(tmp_path / "pets"), "--data-dir", str(tmp_path), "--batch-size", "4"]
    flags += ["--image-size", "16", "--width", "4", "--epochs", "2", "--device", "cpu"]
    assert train.main(["--model", "se", *flags, "--runs", str(tmp_path / "runs")]) == 0
    run = tmp_path / "runs/pets/published/se/seed0"
    dataset = data.load_dataset(str(tmp_path / "pets"), tmp_path, 16)
    paths = sorted((tmp_path / "pets").glob("*/*.png"), key=lambda path: path.name)
    for i, label in enumerate(np.load(run / "test_predictions.npy")):
        (same,) = [
            path for path in paths
            if np.array_equal(
                np.asarray(pixels(path, False, (16, 16))).transpose(2, 0, 1), dataset.test_images[i]
            )
        ]  # fmt: skip
        capsys.readouterr()
        exec(CODE_ELSEWHERE, {"run": str(run), "picture": str(same)})
        assert capsys.readouterr().out.strip() == dataset.classes[label]


def test_balanced_accuracy_is_sklearn_s():
    """sklearn.metrics.balanced_accuracy_score([0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 0]) = 7/12."""
    predictions, labels = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 0, 1, 2])
    assert train.balanced_accuracy(predictions, labels) == pytest.approx(100 * 7 / 12)
