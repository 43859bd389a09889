"""Folders of images, and torchvision's data sets, with files made here in their layouts."""

import dataclasses
import json
import os
import pickle

import data
import report
import train
from kit import decoding
from kit.command_line import UserError
from kit.datasets import ImageData

import numpy as np
import pytest
import torch
import torchvision
from conftest import is_one_line, stop_at, unaligned
from PIL import Image


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """--data-dir is data/ in the current folder."""
    monkeypatch.chdir(tmp_path)


def make(folder, counts, size=(9, 7), mode="RGB", seed=0):
    """Random images in class folders: {class: how many}. size: (width, height)."""
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{i:03d}.png")
    return folder


def test_fashion_mnist_as_pngs_gives_the_same_tensors_and_metrics(fashion_mnist, tmp_path):
    n_train, n_test = 1_000, 100
    folder = tmp_path / "pngs"
    for part in ("train", "test"):
        images, labels = (getattr(fashion_mnist, f"{part}_{what}") for what in ("images", "labels"))
        for i in range(n_train if part == "train" else n_test):
            of_class = folder / part / str(labels[i].item())
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i, 0].numpy()).save(of_class / f"{i:05d}.png")
    read = data.load_dataset(str(folder))
    assert read.classes == list("0123456789")
    few = dataclasses.replace(  # as many of the idx files
        fashion_mnist,
        train_images=fashion_mnist.train_images[:n_train],
        train_labels=fashion_mnist.train_labels[:n_train],
        test_images=fashion_mnist.test_images[:n_test],
        test_labels=fashion_mnist.test_labels[:n_test],
    )
    for what in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(read, what), getattr(few, what))
    flags = ["--model", "se", "--width", "8", "--epochs", "2", "--device", "cpu"]
    assert train.main([*flags, "--dataset", str(folder), "--runs", str(tmp_path / "runs")]) == 0
    with pytest.MonkeyPatch().context() as monkeypatch:
        monkeypatch.setitem(data.DATASETS, "fashion_mnist", lambda _: few)
        assert train.main([*flags, "--runs", str(tmp_path / "runs")]) == 0
    metrics = sorted((tmp_path / "runs").glob("*/*/*/*/metrics.jsonl"))
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in metrics]
    assert len(rows) == 2 and len(rows[0]) == 2
    for ours, theirs in zip(*rows):
        for key in ("train_loss", "train_acc", "val_loss", "val_acc", "lr"):
            assert ours[key] == theirs[key]
    predictions = [np.load(p) for p in (tmp_path / "runs").glob("*/*/*/*/test_predictions.npy")]
    assert np.array_equal(*predictions)


def test_a_folder_without_parts_is_divided_once_for_all(tmp_path):
    folder = make(tmp_path / "pets", {"cat": 12, "dog": 30, "owl": 3})
    first = data.load_dataset(str(folder))
    assert first.classes == ["cat", "dog", "owl"]
    assert first.test_labels.bincount().tolist() == [2, 5, 1]  # a sixth, at least one
    assert first.train_labels.bincount().tolist() == [10, 25, 2]
    assert first.train_images.shape == (37, 3, 7, 9)
    again = data.load_dataset(str(folder))
    assert torch.equal(first.test_images, again.test_images)
    every = torch.cat([first.train_images, first.test_images])
    assert len(every.flatten(1).unique(dim=0)) == 45  # none twice


def test_decoded_once_and_again_when_the_content_changes(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4}, mode="L")
    first = data.load_dataset(str(folder))
    (kept,) = (tmp_path / "data").rglob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", None)
        assert torch.equal(data.load_dataset(str(folder)).train_images, first.train_images)

    kept.write_bytes(kept.read_bytes()[:-100] + bytes(100))
    assert torch.equal(data.load_dataset(str(folder)).train_images, first.train_images)
    assert "is damaged" in capsys.readouterr().err

    image = folder / "cat" / "cat000.png"
    times = image.stat().st_atime_ns, image.stat().st_mtime_ns
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(image)
    os.utime(image, ns=times)  # the content counts, not the date
    changed = data.load_dataset(str(folder))
    every = torch.cat([changed.train_images, changed.test_images])
    assert (every.flatten(1).sum(1) == 0).sum() == 1
    assert len(list((tmp_path / "data").rglob("*.npz"))) == 1


def test_sizes_and_colours(tmp_path):
    folder = make(tmp_path / "mixed", {"a": 3}, size=(20, 10))
    make(folder, {"b": 3}, size=(8, 8), mode="L")
    read = data.load_dataset(str(folder))
    assert read.train_images.shape[1:] == (3, 64, 64)
    assert data.load_dataset(str(folder), image_size=10).train_images.shape[1:] == (3, 10, 10)
    wide = Image.open(folder / "a" / "a000.png")
    middle = np.asarray(wide.crop((5, 0, 15, 10))).transpose(2, 0, 1)
    ten = data.load_dataset(str(folder), image_size=10)
    every = torch.cat([ten.train_images, ten.test_images])
    assert (every == torch.tensor(middle)).flatten(1).all(1).sum() == 1  # cropped in the middle


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "cat" / "cat000.png").write_bytes(b""), "1 images cannot be read"),
        (lambda f: (f / "cat" / "cat000.png").write_bytes(b"\x89PNG no"), "cat000.png"),
        (lambda f: truncate(f / "dog" / "dog001.png"), "dog001.png"),
        (lambda f: (f / "bird").mkdir(), "bird has no images"),
        (lambda f: [p.unlink() for p in (f / "dog").glob("*[1-9].png")], "class dog has a single"),
        (lambda f: (f / "cat").rename(f / ".cat"), "each of two classes"),
        (lambda f: make(f / "train", {"cat": 2, "dog": 2}), "one to test (test or val)"),
        (lambda f: make(f / "cat", {"train": 2, "test": 2}), "cat has parts of its own"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, capsys, break_it, words):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4})
    break_it(folder)
    code = train.main(["--model", "se", "--width", "8", "--dataset", str(folder), "--dry-run"])
    error = capsys.readouterr().err.replace(f"decoding 8 images below {folder}\n", "")
    assert code == 1 and is_one_line(error) and words in error


def truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


def test_train_and_test_must_have_the_same_classes(tmp_path):
    folder = make(tmp_path / "pets" / "train", {"cat": 2, "dog": 2}).parent
    make(folder / "val", {"cat": 2, "owl": 2})
    with pytest.raises(UserError, match="class dog, owl"):
        data.load_dataset(str(folder))


def test_more_than_fits_is_refused_with_the_figure(tmp_path, monkeypatch):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4})
    size = 8 * 3 * 500 * 500
    monkeypatch.setattr(decoding, "available_memory", lambda: 2 * size - 1)
    with pytest.raises(UserError, match=r"the images take 12.0 MB of 12.0 MB free"):
        data.load_dataset(str(folder), image_size=500)
    monkeypatch.setattr(decoding, "available_memory", lambda: 2 * size)
    assert data.load_dataset(str(folder), image_size=500).train_images.shape[1:] == (3, 500, 500)


def test_wrong_names_are_usage_errors(tmp_path, capsys):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "two words").mkdir()
    for flags, words in (
        (["--dataset", "mnits"], "choose from fashion_mnist, mnist"),
        (["--dataset", str(tmp_path / "mnist")], "rename it"),
        (["--dataset", str(tmp_path / "two words")], "rename it"),
        (["--image-size", "32"], "is for folders of images"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train.main(["--model", "se", *flags])
        error = capsys.readouterr().err
        assert is_one_line(error) and words in error


def stopped_run(folder, runs, monkeypatch, *flags):
    flags = ["--model", "baseline", "--width", "16", "--epochs", "2", "--dataset", str(folder)]
    flags += ["--runs", str(runs), "--device", "cpu"]
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert train.main(flags) == 130
    return flags


def test_a_run_is_not_resumed_with_other_images(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / "pets", {"cat": 60, "dog": 60}, size=(12, 12))
    flags = stopped_run(folder, tmp_path / "runs", monkeypatch)
    make(folder, {"cat": 1}, size=(12, 12), seed=9)
    capsys.readouterr()
    assert train.main(flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds a run with other images or labels" in error and "--overwrite" in error
    make(folder, {"cat": 1}, size=(12, 12), seed=0)  # as it was
    assert train.main(flags) == 0


def test_runs_of_other_images_or_sizes_are_not_compared(tmp_path, capsys):
    runs = tmp_path / "runs"
    for model, place, size in (
        ("baseline", "a", "9"), ("se", "a", "9"), ("eca", "b", "9"), ("gc", "a", "12"),
    ):  # fmt: skip
        folder = make(tmp_path / place / "pets", {"cat": 90, "dog": 90}, seed=ord(place))
        flags = ["--model", model, "--width", "16", "--epochs", "1", "--image-size", size]
        flags += ["--dataset", str(folder), "--device", "cpu", "--runs", str(runs)]
        assert train.main(flags) == 0
    assert report.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `se` (smoke test, width 16) | 1 |" in unaligned(text)
    assert "`eca`" not in text and "`gc`" not in text
    assert text.count(" left out, its settings differ: ") == 2
    assert "--image 3x9x9 --classes 2" in text  # what would fill the gap


def test_what_was_kept_but_does_not_fit_is_decoded_again(tmp_path):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4})
    first = data.load_dataset(str(folder))
    (kept,) = (tmp_path / "data").rglob("*.npz")
    for other in (np.zeros((8, 2, 7, 9), np.uint8), np.zeros((8, 3, 7, 9)), np.uint8(3)):
        np.savez(kept, images=other)
        assert torch.equal(data.load_dataset(str(folder)).train_images, first.train_images)


@pytest.mark.parametrize(
    ("counts", "size", "flags", "words"),
    [
        ({"cat": 39, "dog": 39}, 8, ["--batch-size", "58"], "use another --batch-size"),
        ({"cat": 2, "dog": 2}, 12, [], "or more images"),
        ({"cat": 3, "dog": 3}, 12, [], None),
        ({"cat": 12, "$\\frac$": 12}, 12, [], None),
    ],
)
def test_few_small_and_oddly_named(tmp_path, capsys, counts, size, flags, words):
    folder = make(tmp_path / "pets", counts, size=(size, size))
    flags = ["--model", "baseline", "--width", "16", "--epochs", "1", "--device", "cpu", *flags]
    code = train.main([*flags, "--dataset", str(folder), "--runs", str(tmp_path / "runs")])
    error = capsys.readouterr().err.splitlines()
    if words:
        assert code == 1 and len(error) == 2 and words in error[1]
    else:
        assert code == 0


def test_images_of_one_value_are_normalised_to_numbers(tmp_path):
    folder = tmp_path / "black"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(np.zeros((12, 12), np.uint8)).save(folder / name / f"{i}.png")
    flags = ["--model", "baseline", "--width", "16", "--normalize", "data", "--dry-run"]
    assert train.main([*flags, "--dataset", str(folder), "--device", "cpu"]) == 0


def test_mean_and_std_are_exact():
    images = torch.randint(0, 256, (50, 3, 5, 4), dtype=torch.uint8)
    pixels, labels = images.double() / 255, torch.zeros(50, dtype=torch.int64)
    ours = ImageData(images, labels, images, labels, ["a", "b"], "here")
    for found, expected in (
        (ours.mean, pixels.mean((0, 2, 3))), (ours.std, pixels.std((0, 2, 3), False)),
    ):  # fmt: skip
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


# --- In the layouts of torchvision and Tiny ImageNet ----------------------------------------------


@pytest.mark.parametrize(("name", "n"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path, monkeypatch, name, n):
    """torchvision reads pickles whose MD5 it knows: here those of files made for this test."""
    dataset = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    key, written = "labels" if n == 10 else "fine_labels", {}
    for file, _ in (*dataset.train_list, *dataset.test_list):
        pixels = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        written[file] = {"data": pixels, key: list(range(n))}
    written[dataset.meta["filename"]] = {dataset.meta["key"]: [f"class {i}" for i in range(n)]}
    sums = {}
    for file, content in written.items():
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = torchvision.datasets.utils.calculate_md5(folder / file)
    for part in ("train_list", "test_list"):
        files = [[file, sums[file]] for file, _ in getattr(dataset, part)]
        monkeypatch.setattr(dataset, part, files)
    monkeypatch.setitem(dataset.meta, "md5", sums[dataset.meta["filename"]])

    read = data.load_dataset(name, tmp_path)
    first = written[dataset.train_list[0][0]]["data"][0].reshape(3, 32, 32)
    assert torch.equal(read.train_images[0], torch.tensor(first))
    assert read.train_labels[:n].tolist() == list(range(n)) and len(read.classes) == n
    assert read.train_images.shape == (n * len(dataset.train_list), 3, 32, 32)
    assert len(read.mean) == len(read.std) == 3
    flags = ["--model", "cbam_blocks", "--width", "16", "--dataset", name, "--dry-run"]
    assert train.main([*flags, "--data-dir", str(tmp_path)]) == 0

    body = bytearray((folder / dataset.train_list[0][0]).read_bytes())
    body[-200] ^= 1  # in an image
    (folder / dataset.train_list[0][0]).write_bytes(body)
    with pytest.raises(UserError, match=f"torchvision's {name.upper()} is not below"):
        monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/")
        data.load_dataset(name, tmp_path)


def test_an_error_without_a_message_is_one_line(tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", failing)
    with pytest.raises(UserError, match="cannot be fetched or read") as raised:
        data.load_dataset("cifar10", tmp_path)
    assert is_one_line(str(raised.value)) and "RuntimeError" in str(raised.value)


@pytest.fixture
def tiny_imagenet(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    wnids = [f"n{i:08d}" for i in range(200)]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(2):
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(reversed(wnids)):
        image.save(folder / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))
    return folder


def test_tiny_imagenet_s_flat_validation_folder(tiny_imagenet):
    read = data.load_dataset("tiny_imagenet", tiny_imagenet.parent)
    assert read.train_images.shape == (400, 3, 64, 64) and read.test_images.shape[0] == 200
    assert len(read.classes) == 200 and len(read.test_labels.unique()) == 200
    names = sorted(f"val_{i}.JPEG" for i in range(200))
    expected = [199 - int(name[4:-5]) for name in names]
    assert read.test_labels.tolist() == expected


def test_tiny_imagenet_s_classes_are_called_by_its_words(tiny_imagenet):
    before = data.load_dataset("tiny_imagenet", tiny_imagenet.parent)
    assert before.classes == [f"n{i:08d}" for i in range(200)]
    lines = ["n00000001\tgoldfish, Carassius auratus", "n00000000\tcrane", "n00000002\tcrane, bird"]
    lines += ["n00000003\t\x1b[1mred", "n00000004\t", "n00000005", "n09999999\tgoldfish"]
    (tiny_imagenet / "words.txt").write_text("\n".join(lines))
    read = data.load_dataset("tiny_imagenet", tiny_imagenet.parent)
    called = ["crane (n00000000)", "goldfish", "crane (n00000002)"]
    assert read.classes == called + before.classes[3:]
    assert "crane (n00000000) 2 + 1, goldfish 2 + 1, crane (n00000002) 2 + 1" in read.source
    assert torch.equal(read.test_labels, before.test_labels) and read.digest == before.digest


def test_tiny_imagenet_wants_200_classes_in_both_parts(tiny_imagenet):
    annotations = tiny_imagenet / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(annotations.read_text().splitlines()[1:]))
    with pytest.raises(UserError, match="not both in train and in test: class n00000199"):
        data.load_dataset("tiny_imagenet", tiny_imagenet.parent)
    annotations.unlink()
    with pytest.raises(UserError, match="CS231n"):
        data.load_dataset("tiny_imagenet", tiny_imagenet.parent)
