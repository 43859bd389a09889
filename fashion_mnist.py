"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): found or fetched, and verified.

The four idx files may lie, packed or not, in --data-dir itself, in torchvision's layout below it
(FashionMNIST/raw/) or where the Debian package dataset-fashion-mnist puts them.
"""

import gzip
import hashlib
import http.client
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from files import write_atomically
from image_data import DataError, ImageData

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
    OSError,
    EOFError,
    zlib.error,
    http.client.HTTPException,
    subprocess.SubprocessError,
    DataError,
)


def load_fashion_mnist(data_dir: Path) -> ImageData:
    """60,000 + 10,000 grey images of 28x28 in ten classes. Raises DataError in one line."""
    raw = data_dir / "FashionMNIST" / "raw"
    folders = [data_dir, raw, DEBIAN_FOLDER]
    missing = [name for name in FASHION_MNIST_SHA256 if find_file(name, folders) is None]
    fetched_from = fetch_fashion_mnist(missing, raw) if missing else None

    arrays, used = {}, {}
    for name in FASHION_MNIST_SHA256:
        path = find_file(name, folders)
        try:
            arrays[name] = parse_idx(verified(name, read_file(path), path))
        except DataError as error:
            raise DataError(f"{error}. Delete it. {THREE_WAYS}.") from error
        used[path.parent] = None  # a dict, not a set: keeps the order
    source = f"read from {', '.join(map(str, used))}, sha256 verified"
    if fetched_from:
        source += f", just fetched from {fetched_from}"
    return ImageData(
        train_images=arrays["train-images-idx3-ubyte"].unsqueeze(1),
        train_labels=arrays["train-labels-idx1-ubyte"].long(),
        test_images=arrays["t10k-images-idx3-ubyte"].unsqueeze(1),
        test_labels=arrays["t10k-labels-idx1-ubyte"].long(),
        classes=FASHION_MNIST_CLASSES,
        mean=(0.2860,),
        std=(0.3530,),
        source=source,
    )


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
        raise DataError(f"{path}: truncated or damaged gzip file ({error})") from error


def verified(name: str, body: bytes, where: Path | str) -> bytes:
    """`body` itself if its sha256 is the one published for `name`."""
    found, expected = hashlib.sha256(body).hexdigest(), FASHION_MNIST_SHA256[name]
    if found != expected:
        raise DataError(
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
    raise DataError(
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
        apt_get = [
            "apt-get",
            "-qq",
            f"-oDir::State={folder}/state",
            f"-oDir::Cache={folder}/cache",
            "-oDir::State::status=/var/lib/dpkg/status",
            "-oAPT::Sandbox::User=",  # root fetches as root: _apt cannot enter this folder
        ]
        for command in (
            [*apt_get, "update"],
            [*apt_get, "download", DEBIAN_PACKAGE],
            ["sh", "-c", "dpkg-deb -x *.deb unpacked"],
        ):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                words = done.stderr.split()
                raise DataError(" ".join(words) or f"{command[0]} exited with {done.returncode}")
        for name in names:
            path = folder / "unpacked" / DEBIAN_FOLDER.relative_to("/") / f"{name}.gz"
            yield name, read_file(path)
