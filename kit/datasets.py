"""A data set in memory; Fashion-MNIST found or fetched, and verified; torchvision's data sets.

Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): the four idx files may lie, packed or not, in
--data-dir itself, in torchvision's layout below it (FashionMNIST/raw/) or where the Debian package
dataset-fashion-mnist puts them.
"""

import functools
import gzip
import hashlib
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from kit.command_line import UserError
from kit.files import write_atomically


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
        if not self.mean:
            self.mean, self.std = mean_and_std_of(self.train_images)

    @functools.cached_property
    def digest(self) -> str:
        """Of all images and labels, whatever files they came from: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()[:16]

    def mean_and_std(
        self, normalize: str | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        train, test = (
            getattr(torchvision.datasets, name)(data_dir, train=part, download=True)
            for part in (True, False)
        )
    except Exception as error:  # of networks, archives, checksums and pickles: they are many
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise UserError(
            f"torchvision's {name} is not below {data_dir}, and cannot be fetched or read "
            f"({reason}): bring its files there, as torchvision lays them out, or try again"
        ) from error

    def tensors(part):
        images = torch.as_tensor(part.data)  # (N, H, W) if grey, (N, H, W, C) if not
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(part.targets, dtype=torch.int64)

    source = f"read from {data_dir} by torchvision's {name}"
    return ImageData(*tensors(train), *tensors(test), list(train.classes), source)


# --- Fashion-MNIST --------------------------------------------------------------------------------

# sha256 of the uncompressed files: gzip headers differ from mirror to mirror, the content must not.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
THREE_WAYS = (
    "Three ways to get it: run `python data.py` with a network (torchvision's mirror, then the "
    f"Debian package); `apt-get install {DEBIAN_PACKAGE}` on Debian or Ubuntu; or put the four "
    "idx files, packed (.gz) or not, into --data-dir"
)
FETCH_ERRORS = (  # what a download or an unpacking can end in
    OSError, EOFError, zlib.error, HTTPException, subprocess.SubprocessError, UserError,
)  # fmt: skip


def load_fashion_mnist(data_dir: Path) -> ImageData:
    """60,000 + 10,000 grey images of 28x28 in ten classes. Raises UserError in one line."""
    raw = data_dir / "FashionMNIST" / "raw"
    folders = [data_dir, raw, DEBIAN_FOLDER]
    missing = [name for name in FASHION_MNIST_SHA256 if find_file(name, folders) is None]
    fetched_from = fetch_fashion_mnist(missing, raw) if missing else None

    arrays, used = {}, {}
    for name in FASHION_MNIST_SHA256:
        path = find_file(name, folders)
        try:
            arrays[name] = parse_idx(verified(name, read_file(path), path))
        except UserError as error:
            raise UserError(f"{error}. Delete it. {THREE_WAYS}.") from error
        used[path.parent] = None  # a dict, not a set: keeps the order
    source = f"read from {', '.join(map(str, used))}, sha256 verified"
    if fetched_from:
        source += f", just fetched from {fetched_from}"
    train_images, train_labels, test_images, test_labels = arrays.values()
    return ImageData(
        train_images.unsqueeze(1), train_labels.long(), test_images.unsqueeze(1),
        test_labels.long(), FASHION_MNIST_CLASSES, source, mean=(0.2860,), std=(0.3530,),
    )  # fmt: skip


def find_file(name: str, folders: list[Path]) -> Path | None:
    candidates = [folder / (name + suffix) for folder in folders for suffix in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def read_file(path: Path) -> bytes:
    """The uncompressed content of `path`."""
    body = path.read_bytes()
    if path.suffix != ".gz":
        return body
    try:
        return gzip.decompress(body)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged gzip file ({error})") from error


def verified(name: str, body: bytes, where: Path | str) -> bytes:
    """`body` itself if its sha256 is the one published for `name`."""
    found, expected = hashlib.sha256(body).hexdigest(), FASHION_MNIST_SHA256[name]
    if found != expected:
        raise UserError(
            f"{where}: not the published {name}: its {len(body):,} uncompressed bytes have sha256 "
            f"{found}, expected {expected}"
        )
    return body


def parse_idx(body: bytes) -> torch.Tensor:
    """An idx file (zeros, type 8 = uint8, number of dimensions, big-endian sizes, data)."""
    sizes = np.frombuffer(body, dtype=">u4", count=body[3], offset=4).astype(int)
    values = np.frombuffer(body, dtype=np.uint8, offset=4 + 4 * body[3])
    return torch.from_numpy(values.reshape(sizes).copy())  # a copy, for torch wants it writable


def fetch_fashion_mnist(names: list[str], folder: Path) -> str:
    """Bring the files `names` into `folder`, uncompressed and verified; returns the source used."""
    failures = []
    for source, download in (
        ("torchvision's mirror", download_from_mirror),
        (f"the Debian package {DEBIAN_PACKAGE}", download_from_debian),
    ):
        print(f"Fashion-MNIST is not here yet: trying {source}", file=sys.stderr, flush=True)
        try:
            bodies = {name: verified(name, body, "download") for name, body in download(names)}
        except FETCH_ERRORS as error:
            failures.append(f"{source}: {error}")
            continue
        for name, body in bodies.items():
            write_atomically(folder / name, body)
        return source
    raise UserError(
        f"{names[0]} (expected sha256 {FASHION_MNIST_SHA256[names[0]]}): neither below "
        f"{folder.parent.parent} nor in {DEBIAN_FOLDER}, and it cannot be fetched "
        f"({'; '.join(failures)}). {THREE_WAYS}."
    )


def download_from_mirror(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, uncompressed bytes) from the mirror that torchvision itself uses."""
    from torchvision.datasets import FashionMNIST  # here, for it takes a second to import

    for name in names:
        with urllib.request.urlopen(f"{FashionMNIST.mirrors[0]}{name}.gz", timeout=30) as response:
            yield name, gzip.decompress(response.read())


def download_from_debian(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, uncompressed bytes) from the Debian package, unpacked but not installed.

    Package lists of its own, in a temporary folder, make it work without root and on a machine
    (or in an image) where `apt-get update` never ran.
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
            yield name, read_file(path)
