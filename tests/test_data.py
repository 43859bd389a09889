import gzip
import http.server
import shutil
import threading

import pytest
import torch
from conftest import REPO, is_one_line, script
from PIL import Image
from torchvision import transforms
from torchvision.datasets import FashionMNIST

import data
from kit import datasets
from kit.command_line import UserError

RAW = REPO / "data" / "FashionMNIST" / "raw"
FOLDERS = [RAW.parent.parent, RAW, datasets.DEBIAN_FOLDER]  # before a test takes the last one away
LABELS = "t10k-labels-idx1-ubyte"


@pytest.fixture
def raw_files(fashion_mnist, tmp_path):
    """A data folder with links to the four real files, in torchvision's layout."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in datasets.FASHION_MNIST_SHA256:
        original = datasets.find_file(name, FOLDERS)
        (raw / name).write_bytes(datasets.read_file(original))
    return raw


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without network, apt-get and Debian's copy of the data."""
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", tmp_path / "not-there")
    monkeypatch.setenv("PATH", str(tmp_path))


def test_fashion_mnist_is_whole(fashion_mnist):
    d = fashion_mnist
    assert d.train_images.shape == (60_000, 1, 28, 28) and d.train_images.dtype == torch.uint8
    assert d.test_images.shape == (10_000, 1, 28, 28) and d.test_images.dtype == torch.uint8
    assert d.train_labels.dtype == d.test_labels.dtype == torch.int64
    assert d.train_labels.bincount().tolist() == [6_000] * 10
    assert d.test_labels.bincount().tolist() == [1_000] * 10
    pixels = d.train_images.double() / 255
    assert d.mean == (pytest.approx(pixels.mean().item(), abs=5e-5),)
    assert d.std == (pytest.approx(pixels.std().item(), abs=5e-5),)


def test_same_images_and_classes_as_torchvision(fashion_mnist, raw_files):
    theirs = FashionMNIST(raw_files.parent.parent, train=False)
    assert torch.equal(fashion_mnist.test_images.squeeze(1), theirs.data)
    assert torch.equal(fashion_mnist.test_labels, theirs.targets)
    assert fashion_mnist.classes == theirs.classes


@pytest.mark.parametrize("sizes", [[50] * 10, [1, 2, 300, 40], [700, 5]])
def test_a_sample_has_every_class_in_proportion_and_holds_the_smaller_ones(sizes):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels))]
    smaller = set()
    for n in range(len(sizes), len(labels) + 1):
        sample = data.stratified(labels, n)
        assert sample.tolist() == sorted(set(sample.tolist())) and smaller <= set(sample.tolist())
        smaller = set(sample.tolist())
        counts = labels[sample].bincount(minlength=len(sizes)).tolist()
        fair = [n * size / len(labels) for size in sizes]
        assert sum(counts) == n and min(counts) >= 1
        assert all(abs(a - b) <= len(sizes) for a, b in zip(counts, fair, strict=True))


def test_the_digest_is_that_of_all_images_and_labels_alone(tmp_path):
    def images(change=None):
        made = [torch.arange(96, dtype=torch.uint8).reshape(6, 1, 4, 4), torch.arange(6) % 2]
        parts = [part.clone() for part in made * 2]
        if change is not None:
            parts[change].flatten()[-1] += 1
        return datasets.ImageData(*parts, ["a", "b"], str(change)).digest

    assert images() == images()
    assert len({images(change) for change in (None, 0, 1, 2, 3)}) == 5


def test_finds_packed_and_unpacked_files_and_says_where(raw_files, tmp_path):
    shutil.move(raw_files / LABELS, tmp_path / LABELS)  # straight in the data folder
    images = raw_files / "t10k-images-idx3-ubyte"
    images.with_name(images.name + ".gz").write_bytes(gzip.compress(images.read_bytes(), 1))
    images.unlink()
    dataset = data.load_dataset("fashion_mnist", tmp_path)
    assert dataset.test_images.shape == (10_000, 1, 28, 28)
    assert dataset.source == f"read from {raw_files}, {tmp_path}, sha256 verified"


@pytest.mark.parametrize("harm", ["one byte", "truncated gzip", "empty"])
def test_damaged_file_is_named_in_one_line(raw_files, tmp_path, harm):
    path = raw_files / LABELS
    body = path.read_bytes()
    if harm == "one byte":
        path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(body)[:-9])
    before = sorted(tmp_path.rglob("*"))
    done = script("data.py", "--data-dir", tmp_path)
    assert done.returncode == 1
    assert is_one_line(done.stderr) and str(path) in done.stderr and "Three ways" in done.stderr
    assert harm == "truncated gzip" or datasets.FASHION_MNIST_SHA256[LABELS] in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_file_without_network_is_one_line(nowhere, raw_files, tmp_path, capsys):
    (raw_files / LABELS).unlink()
    before = sorted(tmp_path.rglob("*"))
    assert data.main(["--data-dir", str(tmp_path)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "Three ways" in error[0]
    assert LABELS in error[0] and datasets.FASHION_MNIST_SHA256[LABELS] in error[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A mirror on this machine; its folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    yield folder
    server.shutdown()


def test_fetches_what_is_missing(nowhere, mirror, raw_files, tmp_path):
    body = (raw_files / LABELS).read_bytes()
    (raw_files / LABELS).unlink()
    (mirror / f"{LABELS}.gz").write_bytes(gzip.compress(body))
    dataset = data.load_dataset("fashion_mnist", tmp_path)
    assert "torchvision's mirror" in dataset.source
    assert (raw_files / LABELS).read_bytes() == body
    assert "mirror" not in data.load_dataset("fashion_mnist", tmp_path).source  # now from disk


def test_keeps_nothing_of_a_wrong_download(nowhere, mirror, raw_files, tmp_path):
    (raw_files / LABELS).unlink()
    (mirror / f"{LABELS}.gz").write_bytes(gzip.compress(b"an error page"))
    with pytest.raises(UserError, match="sha256"):
        data.load_dataset("fashion_mnist", tmp_path)
    assert [path for path in raw_files.iterdir() if LABELS in path.name] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs Debian or Ubuntu")
def test_fetches_the_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    names = list(datasets.FASHION_MNIST_SHA256)
    assert "Debian" in datasets.fetch_fashion_mnist(names, tmp_path / "raw")
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == sorted(names)


def test_unknown_data_set_is_named():
    with pytest.raises(UserError, match=r"'mnits'.*fashion_mnist"):
        data.load_dataset("mnits", "data")


def test_split_is_disjoint_complete_and_fixed_by_the_seed():
    train_idx, val_idx = data.split_indices(60_000, seed=3)
    assert (len(train_idx), len(val_idx)) == (54_000, 6_000)
    assert torch.equal(torch.cat([train_idx, val_idx]).sort().values, torch.arange(60_000))
    assert all(map(torch.equal, data.split_indices(60_000, seed=3), (train_idx, val_idx)))
    assert not torch.equal(
        data.split_indices(60_000, seed=4)[1].sort().values, val_idx.sort().values
    )
    assert [len(part) for part in data.split_indices(15, 0, val_fraction=0.2)] == [12, 3]


def test_order_is_a_permutation_fixed_by_seed_and_epoch():
    indices = torch.arange(1_000) * 7
    order = data.shuffled(indices, seed=1, epoch=2)
    assert torch.equal(order.sort().values, indices)
    assert torch.equal(order, data.shuffled(indices, seed=1, epoch=2))
    for seed, epoch in ((1, 1), (1, 3), (2, 2), (2, 1)):
        assert not torch.equal(order, data.shuffled(indices, seed, epoch))


def test_partial_batch_is_kept():
    train_idx, _ = data.split_indices(60_000, seed=0)
    sizes = [len(batch) for batch in data.shuffled(train_idx, seed=0, epoch=1).split(64)]
    assert sizes == [64] * 843 + [48]


def test_normalize_is_bit_equal_to_torchvision(fashion_mnist):
    theirs = transforms.Compose(
        [transforms.Resize(28), transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    )
    images = fashion_mnist.test_images[:300]
    expected = torch.stack([theirs(Image.fromarray(image.squeeze(0).numpy())) for image in images])
    half = torch.tensor(0.5).view(1, 1, 1)
    assert torch.equal(data.normalize(images, half, half), expected)


def test_normalize_uses_each_channel_s_own_mean_and_std():
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    expected = transforms.Normalize(mean, std)(images / 255)
    found = data.normalize(images, *(torch.tensor(v).view(3, 1, 1) for v in (mean, std)))
    assert torch.equal(found, expected)
