"""A data set in memory; Fashion-MNIST, MNIST and KMNIST found or fetched, and verified; CIFAR.

The four idx files of Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), and of the two others of
the same names, may lie, packed or not, in --data-dir itself, in torchvision's layout below it
(FashionMNIST/raw/) or where Debian's dataset-fashion-mnist puts them. Others are passed over.
"""

import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path

from kit.command_line import UserError, in_one_line
from kit.files import check_writable, is_only_read, locked, write_atomically

import numpy as np
import torch


@dataclass
class ImageData:
    """A data set in memory."""

    train_images: torch.Tensor  # uint8 (N, C, H, W)
    train_labels: torch.Tensor  # int64 (N,)
    test_images: torch.Tensor  # uint8 (N, C, H, W)
    test_labels: torch.Tensor  # int64 (N,)
    classes: list[str]
    source: str  # where the files came from, for people to read
    mean: tuple[float, ...] = ()  # of the training images, per channel, pixels in [0, 1]
    std: tuple[float, ...] = ()

    def __post_init__(self):
        for part in ("train", "test"):
            images, labels = (len(getattr(self, f"{part}_{what}")) for what in ("images", "labels"))
            if images != labels:
                raise UserError(f"{self.source}: {images:,} {part} images, but {labels:,} labels")
        if not self.mean:
            self.mean, self.std = mean_and_std_of(self.train_images)

    @cached_property
    def digest(self) -> str:
        """Of all images and labels, whatever files they came from: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()[:16]

    @cached_property
    def n_copies(self) -> int:
        """Test images that are, pixel by pixel, among the training images, too."""
        train = {hash(image.tobytes()) for image in self.train_images.numpy()}
        return sum(hash(image.tobytes()) in train for image in self.test_images.numpy())

    def mean_and_std(self, normalize: str | None, device) -> tuple[torch.Tensor, torch.Tensor]:
        """By which images are normalised. "data": those of the data, (C, 1, 1) each; else 0.5 and
        0.5, as published, which scale pixels to [-1, 1] whatever the data."""
        if normalize != "data":
            return torch.full((), 0.5, device=device), torch.full((), 0.5, device=device)
        std = [max(value, 1 / 255) for value in self.std]  # images of a single value have none
        return tuple(torch.tensor(m, device=device)[:, None, None] for m in (self.mean, std))


def mean_and_std_of(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel of uint8 (N, C, H, W), pixels in [0, 1].

    From the counts of the 256 values: exact, and in little memory.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = share @ values
        means.append(mean.item())
        deviations.append((share @ (values - mean).square()).sqrt().item())
    return tuple(means), tuple(deviations)


def from_torchvision(name: str, data_dir: Path) -> ImageData:
    """The data set of torchvision's class `name`, which fetches it, too. Raises UserError."""
    import torchvision  # here, for it takes a second to import

    try:
        if fetch := not is_only_read(data_dir):
            data_dir.mkdir(parents=True, exist_ok=True)
        load = partial(getattr(torchvision.datasets, name), data_dir, download=fetch)
        with locked(data_dir):  # several runs may start at the same time
            train, test = load(train=True), load(train=False)
    except Exception as error:  # of networks, archives, checksums and pickles: they are many
        raise UserError(
            f"torchvision's {name} is not below {data_dir}, and cannot be fetched or read "
            f"({in_one_line(error)}): bring its files there, as torchvision has them, or try again"
        ) from error

    def tensors(part):
        images = torch.as_tensor(part.data)  # (N, H, W) if grey, (N, H, W, C) if not
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(part.targets, dtype=torch.int64)

    source = f"read from {data_dir} by torchvision's {name}"
    return ImageData(*tensors(train), *tensors(test), list(train.classes), source)


# --- Fashion-MNIST, MNIST, KMNIST: four idx files each --------------------------------------------

# sha256 of the uncompressed files: gzip headers differ from mirror to mirror, the content must not.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
KMNIST_SHA256 = {  # of the packed files, for those are published
    f"{file}-ubyte.gz": sha256
    for file, sha256 in {
        "train-images-idx3": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "train-labels-idx1": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "t10k-images-idx3": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "t10k-labels-idx1": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    }.items()
}
FASHION_MNIST_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
MNIST_CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IDX = {  # by the names of torchvision's classes and folders
    "FashionMNIST": (FASHION_MNIST_SHA256, FASHION_MNIST_CLASSES),
    "MNIST": (MNIST_SHA256, [f"{i} - {word}" for i, word in enumerate(MNIST_CLASSES)]),
    "KMNIST": (KMNIST_SHA256, ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]),
}
LARGEST = 2**26  # bytes that are read of a file, packed or not: training images have 47 MB
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
THREE_WAYS = (
    "Three ways to get it: run `python data.py` with a network (torchvision's mirror, then the "
    f"Debian package); `apt-get install {DEBIAN_PACKAGE}` on Debian or Ubuntu; or put the four "
    "idx files, packed (.gz) or not, into --data-dir"
)
TWO_WAYS = "Get it with a network, or put its four files, packed (.gz), into --data-dir"


def load_idx(name: str, data_dir: Path, origin: str = "") -> ImageData:
    """60,000 + 10,000 grey images of 28x28 in ten classes. Raises UserError in one line."""
    ways = THREE_WAYS if name == "FashionMNIST" else TWO_WAYS
    raw, fashion = data_dir / name / "raw", name == "FashionMNIST"
    places = [data_dir, raw] + [DEBIAN_FOLDER] * fashion
    (sha256, classes), bodies, used, bad = IDX[name], {}, {}, {}  # used: a dict keeps the order
    for file in sha256:
        for path in (place / (file + end) for place in places for end in ("", ".gz")):
            try:
                if path.is_file():
                    bodies[file] = verified(name, file, path.read_bytes(), path)
                    used[path.parent] = None
                    break
            except UserError as error:
                bad[path] = error
    missing = [file for file in sha256 if file not in bodies]
    for path, error in bad.items():  # nothing is fetched where something else lies
        if {path.name, path.name.removesuffix(".gz")} & set(missing):
            raise UserError(f"{error}. Move it away, or use another --data-dir. {ways}.")
    if paths := ", ".join(map(str, bad)):
        print(f"note: passed over, not the published files of {name}: {paths}", file=sys.stderr)
    if missing:
        check_writable(raw, f"choose another --data-dir. {ways}")
        with locked(raw):  # where another process may bring them meanwhile
            absent = [file for file in missing if not (raw / file).is_file()]
            origin = fetch(name, absent, raw, ways) if absent else ""
        return load_idx(name, data_dir, origin)
    source = f"read from {', '.join(map(str, used))}, sha256 verified{origin}"
    arrays = [parse_idx(bodies[file]) for file in sha256]
    return ImageData(
        arrays[0].unsqueeze(1), arrays[1].long(), arrays[2].unsqueeze(1), arrays[3].long(),
        classes, source, mean=(0.2860,) * fashion, std=(0.3530,) * fashion,
    )  # fmt: skip


def verified(name: str, file: str, body: bytes, where: Path | str) -> bytes:
    """The uncompressed content of `body`, if it is the published `file` of the data set `name`."""
    packed = body[:2] == b"\x1f\x8b"
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(body)).read(LARGEST) if packed else body
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where}: truncated or damaged gzip file ({error})") from error
    hashed = body if file.endswith(".gz") else content
    found, expected = hashlib.sha256(hashed).hexdigest(), IDX[name][0][file]
    if found != expected:
        raise UserError(
            f"{where}: not the published {file} of {name}: its {len(hashed):,} bytes have sha256 "
            f"{found}, expected {expected}"
        )
    return content


def parse_idx(body: bytes) -> torch.Tensor:
    """An idx file (zeros, type 8 = uint8, number of dimensions, big-endian sizes, data)."""
    sizes = np.frombuffer(body, dtype=">u4", count=body[3], offset=4).astype(int)
    values = np.frombuffer(body, dtype=np.uint8, offset=4 + 4 * body[3])
    return torch.from_numpy(values.reshape(sizes).copy())  # a copy, for torch wants it writable


def fetch(name: str, files: list[str], raw: Path, ways: str) -> str:
    """Brings them into `raw`, as torchvision has them; from where, in words."""
    import torchvision

    failures, mirrors = [], getattr(torchvision.datasets, name).mirrors
    sources = [(f"torchvision's mirror {url}", partial(download, url)) for url in mirrors]
    if name == "FashionMNIST":
        sources.append((f"the Debian package {DEBIAN_PACKAGE}", download_from_debian))
    for source, get in sources:
        print(f"{name} is not here yet: trying {source}", file=sys.stderr, flush=True)
        try:
            bodies = dict(get(files))
            contents = {file: verified(name, file, body, source) for file, body in bodies.items()}
        except (OSError, HTTPException, subprocess.SubprocessError, UserError) as error:
            failures.append(f"{source}: {error}")
            continue
        for file in files:
            write_atomically(raw / file, (bodies if file.endswith(".gz") else contents)[file])
        return f", just fetched from {source}"
    raise UserError(
        f"{files[0]} (expected sha256 {IDX[name][0][files[0]]}): not in --data-dir or below it, "
        f"{raw.parent.parent}, and it cannot be fetched ({'; '.join(failures)}). {ways}."
    )


def download(url: str, files: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (file, packed bytes) from a mirror."""
    for file in files:
        with urllib.request.urlopen(f"{url}{file.removesuffix('.gz')}.gz", timeout=30) as response:
            yield file, response.read(LARGEST)


def download_from_debian(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, packed bytes) from the Debian package, unpacked but not installed.

    With package lists of its own: it works without root, and where `apt-get update` never ran.
    """
    with tempfile.TemporaryDirectory(prefix="fashion-mnist-") as temporary:
        folder = Path(temporary)
        for needed in ("state/lists/partial", "cache/archives/partial", "unpacked"):
            (folder / needed).mkdir(parents=True)
        apt_get = ["apt-get", "-qq", f"-oDir::State={folder}/state"]
        apt_get += [f"-oDir::Cache={folder}/cache", "-oDir::State::status=/var/lib/dpkg/status"]
        apt_get += ["-oAPT::Sandbox::User="]  # root fetches as root: _apt cannot enter this folder
        unpack = ["sh", "-c", "dpkg-deb -x *.deb unpacked"]
        for command in ([*apt_get, "update"], [*apt_get, "download", DEBIAN_PACKAGE], unpack):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                words = done.stderr.split()
                raise UserError(" ".join(words) or f"{command[0]} exited with {done.returncode}")
        for name in names:
            path = folder / "unpacked" / DEBIAN_FOLDER.relative_to("/") / f"{name}.gz"
            yield name, path.read_bytes()
