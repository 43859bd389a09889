import contextlib
import gzip
import hashlib
import http.server
import shutil
import threading

import data
import train
from kit import datasets
from kit.command_line import UserError

import numpy as np
import pytest
import torch
from conftest import is_one_line, script, settings_of
from PIL import Image
from torchvision import transforms
from torchvision.datasets import MNIST, FashionMNIST

LABELS = "t10k-labels-idx1-ubyte"


def sha256(body):
    return hashlib.sha256(body).hexdigest()[:16]


def write_idx(folder, *arrays):
    """Four idx files of uint8 arrays; their sha256."""
    folder.mkdir(parents=True)
    for file, array in zip(datasets.IDX_FILES, arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / file).write_bytes(header + array.tobytes())
    return " ".join(sha256((folder / file).read_bytes()) for file in datasets.IDX_FILES)


@pytest.fixture
def raw_files(fashion_mnist, tmp_path):
    """A folder with the four real files, in torchvision's layout."""
    d, raw = fashion_mnist, tmp_path / "FashionMNIST" / "raw"
    parts = d.train_images[:, 0], d.train_labels, d.test_images[:, 0], d.test_labels
    sums = write_idx(raw, *(part.byte().numpy() for part in parts))
    assert sums == datasets.SHA256["FashionMNIST"]
    return raw


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without network, apt-get and Debian's copy of the data."""
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", tmp_path / "not-there")
    monkeypatch.setenv("PATH", str(tmp_path))


def test_fashion_mnist_is_whole(fashion_mnist):
    d = fashion_mnist
    assert d.digest == "023af56f2df4044c"
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
        return datasets.ImageData(*parts, list("abc"), str(change)).digest

    assert images() == images()
    assert len({images(change) for change in (None, 0, 1, 2, 3)}) == 5


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        (
            lambda x, y: (x.permute(0, 2, 3, 1), y),
            r"\(N, C, H, W\), not \(torch.uint8, 8, 16, 16, 3\)",
        ),
        (lambda x, y: (x[:, 0], y), r"\(N, C, H, W\), not \(torch.uint8, 8, 16, 16\)"),
        (lambda x, y: (x / 255, y), r"uint8 tensor .* not \(torch.float32, 8"),
        (lambda x, y: (x.numpy(), y), r"uint8 tensor .* not \(dtype\('uint8'\), 8"),
        (lambda x, y: (list(x), y), r"uint8 tensor .* not \(<class 'list'>,\)"),
        (lambda x, y: (x, y[:, None]), r"int64 tensor \(8,\), not \(torch.int64, 8, 1\)"),
        (lambda x, y: (x, y[:7]), r"int64 tensor \(8,\), not \(torch.int64, 7\)"),
        (lambda x, y: (x, torch.eye(4)[y]), r"int64 tensor \(8,\), not \(torch.float32, 8, 4\)"),
        (lambda x, y: (x, y + 1), r"labels must be from 0 to 3, not \[4\]"),
        (lambda x, y: (x, y - 1), r"labels must be from 0 to 3, not \[-1\]"),
        (lambda x, y: (x[:0], y[:0]), "labels must be from 0 to 3, not"),
        (lambda x, y: (x.to("meta"), y), "images and labels must be on the CPU"),
        (lambda x, y: (x, y.to("meta")), "images and labels must be on the CPU"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_slips_in_a_data_set_of_one_s_own_are_one_line(slip, words, part):
    whole = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 4
    parts = [*slip(*whole), *whole] if part == "train" else [*whole, *slip(*whole)]
    with pytest.raises(UserError, match=f"^here: {part} .*{words}") as raised:
        datasets.ImageData(*parts, list("abcd"), "here")
    assert is_one_line(str(raised.value))


@pytest.mark.parametrize(
    "classes", [range(4), ["a", "b", "c", "a"], np.array(list("abcd")), "abcd", ["a"]]
)
def test_classes_are_different_strings(classes):
    """Others would fail when result.json is written, after all of the training."""
    whole = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 4
    with pytest.raises(UserError, match=r"^here: classes must be a list of two or more"):
        datasets.ImageData(*whole, *whole, classes, "here")


def test_a_class_that_a_limit_leaves_out_is_named(capsys):
    images, labels = torch.zeros(200, 1, 8, 8, dtype=torch.uint8), torch.arange(200) % 3
    labels[data.split_indices(200, 0)[0][100]] = 3  # the only image of d, the 101st to train
    dataset = datasets.ImageData(images, labels, images[:8], torch.arange(8) % 4, list("abcd"), "")
    for limit, said in ((["--limit-train", "64"], True), ([], False)):
        settings = settings_of("--model", "se", "--device", "cpu", *limit)
        data.Loader(dataset, settings, torch.device("cpu"))
        error = capsys.readouterr().err
        assert ("no training image of d (1 classes)" in error) == said
        assert "no test image" not in error
    dataset.test_labels %= 3
    data.Loader(dataset, settings, torch.device("cpu"))
    assert "no test image of d (1 classes)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "load", "line"),
    [("my set", None, "my set: rename it: names have letters"),
     ("mine", lambda data_dir: (1, 2), "mine: not an ImageData, but a tuple")],
)  # fmt: skip
def test_slips_in_the_table_of_data_sets_are_one_line(monkeypatch, name, load, line):
    monkeypatch.setitem(data.DATASETS, name, load)
    with pytest.raises(UserError, match=line):
        data.load_dataset(name)


def test_training_and_test_images_are_of_one_size():
    images, labels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 4
    with pytest.raises(UserError, match="here: test images must be as large as training images"):
        datasets.ImageData(images, labels, images[:, :1], labels, list("abcd"), "here")


# --- MedMNIST's form ------------------------------------------------------------------------------


def npz(
    path, shape=(28, 28), labels=lambda n: np.arange(n, dtype=np.uint8)[:, None] % 3, **changes
):
    generator, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 60), ("val", 9), ("test", 12)):
        arrays[f"{part}_images"] = generator.integers(0, 256, (n, *shape), np.uint8)
        arrays[f"{part}_labels"] = labels(n)
    np.savez(path, **{k: array for k, array in (arrays | changes).items() if array is not None})
    return arrays


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (32, 40, 3), (64, 64, 1)])
def test_a_file_in_medmnist_s_form(tmp_path, capsys, shape):
    arrays = npz(tmp_path / "derma.npz", shape)
    read = data.load_dataset(str(tmp_path / "derma.npz"))
    assert "its 9 val images join the 60 training images" in capsys.readouterr().err
    images = np.concatenate([arrays["train_images"], arrays["val_images"]])
    expected = images.reshape(69, *shape[:2], -1).transpose(0, 3, 1, 2)
    assert np.array_equal(read.train_images, expected) and read.test_images.is_contiguous()
    assert read.train_labels.tolist() == [i % 3 for i in [*range(60), *range(9)]]
    assert read.test_labels.dtype == torch.int64 and read.classes == ["0", "1", "2"]
    flags = ["--dataset", str(tmp_path / "derma.npz"), "--runs", str(tmp_path / "runs")]
    flags += ["--model", "baseline", "--width", "8", "--epochs", "1", "--device", "cpu"]
    assert shape != (28, 28) or train.main([*flags, "--batch-size", "16"]) == 0
    assert shape != (28, 28) or (tmp_path / "runs/derma.npz/published/baseline/seed0").is_dir()


def test_labels_of_medmnist_s_form_are_the_classes(tmp_path):
    for labels in (lambda n: np.arange(n) % 2 * 4 + 1, lambda n: np.arange(n)[:, None] % 2 * 4 + 1):
        npz(tmp_path / "a.npz", labels=labels)
        read = data.load_dataset(str(tmp_path / "a.npz"))
        assert read.classes == ["1", "5"] and read.test_labels.tolist() == [0, 1] * 6


def test_pixels_from_0_to_1_and_capitals_in_a_file_s_name(tmp_path, capsys):
    """(images / 255).astype("uint8") is a mistake that trains."""
    sizes = {"train": 60, "val": 9}
    dark = {f"{part}_images": np.ones((n, 28, 28), np.uint8) for part, n in sizes.items()}
    npz(tmp_path / "a.npz", **dark)
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    assert data.main(["--dataset", str(tmp_path / "A.NPZ")]) == 0
    assert "the brightest training pixel is 1 of 255: scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (28, 28, 28)}, "volumes and several labels per image are not read"),
        (
            {"test_images": np.zeros((0, 28, 28), np.uint8), "test_labels": np.zeros(0, int)},
            "not uint8 (0, 28, 28)",
        ),
        ({"test_images": np.zeros((), np.uint8)}, "not uint8 ()"),
        ({"test_images": np.zeros((12, 0, 28), np.uint8)}, "not uint8 (12, 0, 28)"),
        ({"shape": (28, 28, 28, 3)}, "volumes and several labels per image are not read"),
        ({"shape": (28, 28, 4)}, "volumes and several labels per image are not read"),
        ({"train_images": np.zeros((60, 28, 28)), "val_images": np.zeros((9, 28, 28))}, "float64"),
        ({"labels": lambda n: np.eye(14, dtype=np.uint8)[np.arange(n) % 14]}, "several labels"),
        ({"labels": lambda n: np.arange(n) / 2}, "one whole number"),
        ({"test_labels": np.zeros(11, np.uint8)}, "one whole number"),
        ({"test_images": None}, "no file in MedMNIST's form"),
        ({"val_labels": np.array([{}] * 9)}, "no file in MedMNIST's form"),
        ({"val_images": np.zeros((9, 32, 32), np.uint8)}, "no file in MedMNIST's form"),
        ({"test_images": np.zeros((12, 32, 32), np.uint8)}, "as large as training images"),
    ],
)
def test_what_is_not_in_medmnist_s_form_is_one_line(tmp_path, capsys, changes, words):
    npz(tmp_path / "a.npz", **changes)
    assert data.main(["--dataset", str(tmp_path / "a.npz")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error and "a.npz" in error
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    assert data.main(["--dataset", str(tmp_path / "a.npz")]) == 1
    assert is_one_line(capsys.readouterr().err)


# --- Copies, and where the files are --------------------------------------------------------------


def test_test_images_among_the_training_images_are_counted(monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=generator)
    test = torch.cat([train[[3, 3, 7]], 255 - train[:4]])
    labels = torch.zeros(50, dtype=torch.int64)
    dataset = datasets.ImageData(train, labels, test, labels[:7], ["a", "b"], "here")
    monkeypatch.setitem(data.DATASETS, "mnist", lambda _: dataset)
    data.load_dataset("mnist")
    error = capsys.readouterr().err
    assert is_one_line(error) and "note: 3 of 7 test images are also training images" in error


def test_fashion_mnist_has_no_copies(fashion_mnist):
    assert not np.isin(*fashion_mnist.hashes).any()


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
    assert is_one_line(done.stderr) and str(path) in done.stderr and "--data-dir" in done.stderr
    assert harm == "truncated gzip" or "expected 0402a96d92fd2663" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_file_without_network_is_one_line(nowhere, raw_files, tmp_path, capsys):
    (raw_files / LABELS).unlink()
    before = sorted(tmp_path.rglob("*"))
    assert data.main(["--data-dir", str(tmp_path)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "apt-get install" in error[0] and "trying" not in error[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Four small files of the test's own, which pass for the published MNIST; their folder."""
    train, test = np.random.default_rng(0).integers(0, 256, (2, 60, 28, 28), np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    sums = write_idx(tmp_path / "planted", train, labels, test[:30], labels[:30])
    monkeypatch.setitem(datasets.SHA256, "MNIST", sums)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    return tmp_path / "planted"


def flipped(body, at=-1):
    return body[:at] + bytes([body[at] ^ 1]) + body[at:][1:]


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_what_it_says_and_one_flipped_byte_is_refused(planted, tmp_path, packed):
    read = data.load_dataset("mnist", planted)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in datasets.IDX_FILES:
        body = (planted / file).read_bytes()
        body = gzip.compress(body) if packed else body
        (raw / file).with_suffix(".gz" * packed).write_bytes(body)
    again = data.load_dataset("mnist", tmp_path)
    assert again.digest == read.digest and len(read.mean) == 1
    assert read.classes == MNIST.classes and read.train_images.shape == (60, 1, 28, 28)
    for file in raw.iterdir():
        body = file.read_bytes()
        content = gzip.decompress(body) if packed else body
        file.write_bytes(gzip.compress(flipped(content)) if packed else flipped(content))
        with pytest.raises(UserError, match=f"{file} is not the published .* of MNIST"):
            data.load_dataset("mnist", tmp_path)
        file.write_bytes(body)


def test_kmnist_s_training_images_alone_cannot_be_verified_unpacked(
    planted, monkeypatch, tmp_path, capsys
):
    """Of the packed file alone a sha256 is known. The other three are verified all the same."""
    images = planted / "train-images-idx3-ubyte"
    _, *sums = datasets.SHA256["MNIST"].split()
    monkeypatch.setitem(datasets.SHA256, "KMNIST", " ".join([datasets.PACKED, *sums]))
    monkeypatch.delitem(datasets.SHA256, "MNIST")  # whose images would not pass for these
    digest = data.load_dataset("kmnist", planted).digest
    assert f"note: {images} cannot be verified" in capsys.readouterr().err
    packed = gzip.compress(images.read_bytes())
    monkeypatch.setattr(datasets, "PACKED", sha256(packed))
    monkeypatch.setitem(datasets.SHA256, "KMNIST", " ".join([datasets.PACKED, *sums]))
    images.with_suffix(".gz").write_bytes(packed)  # beside it: this one is read
    assert data.load_dataset("kmnist", planted).digest == digest
    assert capsys.readouterr().err == ""
    images.with_suffix(".gz").write_bytes(flipped(packed, 100))
    images.unlink()
    with pytest.raises(UserError, match="is not the published"):
        data.load_dataset("kmnist", planted)
    images.with_suffix(".gz").unlink()
    images.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="is not the published"):
        data.load_dataset("kmnist", planted)


def test_fashion_mnist_never_passes_for_kmnist(raw_files, monkeypatch, tmp_path):
    _, *labels = datasets.SHA256["FashionMNIST"].split()
    monkeypatch.setitem(datasets.SHA256, "KMNIST", " ".join([datasets.PACKED, *labels]))
    with pytest.raises(UserError, match="train-images-idx3-ubyte is not the published"):
        data.load_dataset("kmnist", raw_files)


@pytest.fixture
def mirror(planted, monkeypatch, tmp_path):
    """A mirror of the planted files on this machine; its folder."""
    folder, resources = tmp_path / "mirror", []
    folder.mkdir()
    for file in datasets.IDX_FILES:
        packed = gzip.compress((planted / file).read_bytes())
        (folder / f"{file}.gz").write_bytes(packed)
        resources.append((f"{file}.gz", hashlib.md5(packed).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    yield folder
    server.shutdown()


def test_fetches_what_is_missing(mirror, planted, tmp_path, capsys):
    shutil.copy(planted / LABELS, tmp_path)  # one of four is there
    with pytest.raises(UserError, match="is not in"):
        data.load_dataset("mnist", tmp_path, fetch=False)
    assert not (tmp_path / "MNIST").exists()
    dataset = data.load_dataset("mnist", tmp_path)
    assert "MNIST is not here yet: trying torchvision's mirror" in capsys.readouterr().err
    assert dataset.digest == data.load_dataset("mnist", planted).digest
    names = [path.name for path in (tmp_path / "MNIST" / "raw").iterdir()]
    assert sorted(names) == sorted(datasets.IDX_FILES)
    data.load_dataset("mnist", tmp_path)  # now from disk
    assert capsys.readouterr().err == ""


def test_another_process_may_fetch_at_the_same_time(planted, tmp_path, monkeypatch):
    """This one waits for it, and takes what it has brought."""

    @contextlib.contextmanager
    def waited(folder):
        shutil.copytree(planted, folder, dirs_exist_ok=True)
        yield

    monkeypatch.setattr(datasets, "locked", waited)
    assert len(data.load_dataset("mnist", tmp_path).train_images) == 60


def test_keeps_nothing_of_a_wrong_download(mirror, tmp_path, monkeypatch):
    packed = gzip.compress(b"an error page")
    (mirror / f"{LABELS}.gz").write_bytes(packed)
    with pytest.raises(UserError, match="not found or corrupted"):
        data.load_dataset("mnist", tmp_path)
    resources = [(file, hashlib.md5(packed).hexdigest() if LABELS in file else md5)
                 for file, md5 in MNIST.resources]  # fmt: skip
    monkeypatch.setattr(MNIST, "resources", resources)  # though torchvision believes it
    with pytest.raises(UserError, match="cannot be fetched"):
        data.load_dataset("mnist", tmp_path)
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", ["top", "raw"])
def test_files_of_another_set_are_passed_over(raw_files, tmp_path, capsys, packed, where):
    """Beside the right ones, in the same place or in one that comes before it."""
    folder = tmp_path if where == "top" else raw_files
    others = gzip.compress(b"\0\0\x08\x01\0\0\0\1\7") if packed else b"\0\0\x08\x01\0\0\0\1\7"
    path = folder / (f"{LABELS}.gz" if packed else LABELS)
    if path.exists():  # the right one is packed, then
        path.with_name(f"{LABELS}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    path.write_bytes(others)
    dataset = data.load_dataset("fashion_mnist", tmp_path)
    assert dataset.test_labels.bincount().tolist() == [1_000] * 10
    error = capsys.readouterr().err
    said = is_one_line(error) and error.startswith("note: passed over") and str(path) in error
    assert said or (where, packed) == ("raw", True)  # that one was never looked at
    assert path.read_bytes() == others


def test_nothing_is_fetched_over_a_file_of_another_set(mirror, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / LABELS).write_bytes(b"another")
    with pytest.raises(UserError, match="use another --data-dir"):
        data.load_dataset("mnist", tmp_path)
    (raw / LABELS).rename(tmp_path / LABELS)
    with pytest.raises(UserError, match="use another --data-dir"):
        data.load_dataset("mnist", tmp_path)
    assert (tmp_path / LABELS).read_bytes() == b"another"
    (tmp_path / LABELS).unlink()
    assert len(data.load_dataset("mnist", tmp_path).train_images) == 60


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs Debian or Ubuntu")
def test_fetches_the_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets, "DEBIAN_FOLDER", tmp_path / "not-there")
    assert data.load_dataset("fashion_mnist", tmp_path).digest == "023af56f2df4044c"
    names = sorted(path.name for path in (tmp_path / "FashionMNIST" / "raw").iterdir())
    assert names == sorted(datasets.IDX_FILES)


def test_nothing_is_fetched_where_it_cannot_be_kept(nowhere, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert data.main(["--data-dir", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "cannot be written" in error and "--data-dir" in error
    assert "trying" not in error


def test_unknown_data_set_is_named():
    with pytest.raises(UserError, match=r"'mnits'.*fashion_mnist"):
        data.load_dataset("mnits", "data")


def test_split_is_disjoint_complete_and_fixed_by_the_seed():
    train_idx, val_idx = data.split_indices(60_000, seed=3)
    assert (len(train_idx), len(val_idx)) == (54_000, 6_000)
    assert torch.equal(torch.cat([train_idx, val_idx]).sort().values, torch.arange(60_000))
    assert all(map(torch.equal, data.split_indices(60_000, seed=3), (train_idx, val_idx)))
    other = data.split_indices(60_000, seed=4)[1]
    assert not torch.equal(other.sort().values, val_idx.sort().values)
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
