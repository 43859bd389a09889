"""Data sets in memory: Fashion-MNIST, MNIST, KMNIST and CIFAR, downloaded if missing, verified.

The four idx files of Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), MNIST or KMNIST, gzipped
or not, are found in --data-dir, in torchvision's layout below it (FashionMNIST/raw/) or in the
folder of Debian's dataset-fashion-mnist. torchvision downloads missing ones.
"""

import gzip
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kit.command_line import UserError, in_one_line
from kit.files import check_writable, locked, write_atomically

import numpy as np
import torch

IDX_FILES = [f"{part}-{what}" for part in ("train", "t10k")
             for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]  # fmt: skip
PACKED = "51467d22d8cc7292"  # KMNIST's training images: only the .gz has a published sha256
SHA256 = {  # first 16 digits, of the unpacked files: gzip headers differ between mirrors
    "FashionMNIST": "c59f468a2f672dc8 bad3541b69d91243 5b4141f0afbad91e 0402a96d92fd2663",
    "MNIST": "ba891046e6505d7a 65a50cbbf4e90670 0fa7898d509279e4 ff7bcfd416de3373",
    "KMNIST": f"{PACKED} 2a16eeae62da984b 76fbd229ce87db80 a11dc742be8e781a",
}
CLASSES = {
    "FashionMNIST": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot",
    "MNIST": "0 - zero,1 - one,2 - two,3 - three,4 - four,5 - five,6 - six,7 - seven,8 - eight,"
    "9 - nine",
    "KMNIST": "o,ki,su,tsu,na,ha,ma,ya,re,wo",
}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FROM_DEBIAN = """
mkdir -p state/lists/partial cache/archives/partial
apt() {  # root fetches as root: _apt cannot enter this folder
  apt-get -qq -oDir::State="$PWD/state" -oDir::State::status=/var/lib/dpkg/status \\
    -oDir::Cache="$PWD/cache" -oAPT::Sandbox::User= "$@"
}
apt update; apt download dataset-fashion-mnist
dpkg-deb -x *.deb .; gunzip usr/share/datasets/*/*.gz
"""
WAYS = (
    "use another --data-dir, or put the four published files into it, packed (.gz) or not "
    "(Fashion-MNIST: or `apt-get install dataset-fashion-mnist`)"
)


def note(what: str) -> None:
    print(f"note: {what}", file=sys.stderr)


@dataclass
class ImageData:
    train_images: torch.Tensor  # uint8 (N, C, H, W)
    train_labels: torch.Tensor  # int64 (N,)
    test_images: torch.Tensor  # uint8 (N, C, H, W)
    test_labels: torch.Tensor  # int64 (N,)
    classes: list[str]
    source: str  # human-readable origin of the files
    mean: tuple[float, ...] = ()  # of the training images, per channel, pixels in [0, 1]
    std: tuple[float, ...] = ()

    def __post_init__(self):
        """Names mistakes in a user's own data set."""
        names = self.classes
        different = {name for name in names if isinstance(name, str)}
        if type(names) is not list or len(different) < max(2, len(names)):
            words = f"classes must be a list of two or more different strings, not {names!r:.80}"
            raise UserError(f"{self.source}: {words}")
        for part in ("train", "test"):
            found = [getattr(self, f"{part}_{what}") for what in ("images", "labels")]
            kinds = [(getattr(x, "dtype", type(x)), *getattr(x, "shape", ())) for x in found]
            (kind, *shape), n_classes, wrong = kinds[0], len(self.classes), None
            if kind != torch.uint8 or len(shape) != 4 or shape[1] > 4 >= shape[3]:
                wrong = f"images must be a uint8 tensor (N, C, H, W), not {kinds[0]}"
            elif shape[1:] != list(self.train_images.shape[1:]):
                wrong = f"images must be as large as training images, not {kinds[0]}"
            elif kinds[1] != (torch.int64, shape[0]):
                wrong = f"labels must be an int64 tensor ({shape[0]},), not {kinds[1]}"
            elif any(x.device.type != "cpu" for x in found):
                wrong = "images and labels must be on the CPU"
            elif (odd := set(found[1].tolist()) - set(range(n_classes))) or not shape[0]:
                wrong = f"labels must be from 0 to {n_classes - 1}, not {sorted(odd)[:5]}"
            if wrong:
                raise UserError(f"{self.source}: {part} {wrong}")
        if not self.mean:  # exact, from each channel's histogram
            counts = [c.flatten().bincount(minlength=256) for c in self.train_images.unbind(1)]
            share = torch.stack(counts).double() / counts[0].sum()
            values = torch.arange(256, dtype=torch.float64) / 255
            mean = share @ values
            std = (share * (values - mean[:, None]).square()).sum(1).sqrt()
            self.mean, self.std = tuple(mean.tolist()), tuple(std.tolist())

    @cached_property
    def digest(self) -> str:
        """sha256 of all images and labels, whatever their files: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()[:16]

    @cached_property
    def hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) for the training and for the test images. Copies have the same hash."""
        parts = self.train_images.numpy(), self.test_images.numpy()
        return tuple(np.array([hash(image.tobytes()) for image in part]) for part in parts)

    @cached_property
    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """The same with labels: copies have the same key only in the same class."""
        train, test = self.hashes
        return train ^ self.train_labels.numpy(), test ^ self.test_labels.numpy()

    def mean_and_std(self, normalize: str | None, device) -> tuple[torch.Tensor, torch.Tensor]:
        """For normalisation. "data": the training images', (C, 1, 1) each; else 0.5 and 0.5, as
        published: pixels in [-1, 1]."""
        if normalize != "data":
            return torch.full((), 0.5, device=device), torch.full((), 0.5, device=device)
        std = [max(value, 1 / 255) for value in self.std]  # it is 0 if all pixels are equal
        return tuple(torch.tensor(m, device=device)[:, None, None] for m in (self.mean, std))


def load_cifar(name: str, data_dir: Path, fetch: bool = True) -> ImageData:
    """CIFAR10 or CIFAR100, loaded by torchvision, which verifies the MD5."""
    import torchvision  # here because it takes a second

    load, parts = getattr(torchvision.datasets, name), []
    try:
        if fetch:
            data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir):  # several runs may start at once
            for part in (load(data_dir, train, download=fetch) for train in (True, False)):
                parts.append(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
                parts.append(torch.tensor(part.targets))
    except Exception as error:  # network, archive, checksum or pickle: there are many
        raise UserError(
            f"torchvision's {name} is not below {data_dir}, and cannot be fetched or read "
            f"({in_one_line(error)}): bring its files there, as torchvision has them, or try again"
        ) from error
    return ImageData(*parts, part.classes, f"read from {data_dir} by torchvision, MD5 verified")


def load_npz(path: Path, _: Path) -> ImageData:
    """A file in MedMNIST's format (Yang et al. 2023): train_images (N, H, W) or (N, H, W, 3),
    train_labels (N,) or (N, 1), and the same for val and test."""
    try:
        with np.load(path) as file:
            train, val, test = ((file[f"{part}_images"], file[f"{part}_labels"])
                                for part in ("train", "val", "test"))  # fmt: skip
        train_and_val = [np.concatenate(arrays) for arrays in zip(train, val, strict=True)]
        parts, values = [], np.unique(np.append(train_and_val[1], test[1]))
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{path} is no file in MedMNIST's form, with train_images, train_labels, val_* and "
            f"test_*: {in_one_line(error)}"
        ) from None
    for images, labels in (train_and_val, test):
        grey_or_rgb = images.ndim >= 3 and images.shape[3:] in ((), (1,), (3,))
        one_label = labels.dtype.kind in "iu" and images.shape[:1] == (labels.size,)
        if images.dtype != np.uint8 or not (grey_or_rgb and one_label and images.size):
            found = f"{images.dtype} {images.shape} with labels {labels.dtype} {labels.shape}"
            raise UserError(
                f"{path}: needs uint8 images (N, H, W) or (N, H, W, 3) with one whole number each, "
                f"not {found}: volumes and several labels per image are not read"
            )
        images = images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
        parts.append(torch.from_numpy(np.ascontiguousarray(images)))
        parts.append(torch.from_numpy(np.searchsorted(values, labels.ravel())))
    how = f"its {len(val[0]):,} val images join the {len(train[0]):,} training images"
    note(f"{path}: {how}, from which the seed's split is drawn")
    return ImageData(*parts, [str(value) for value in values], f"read from {path}")


# --- Fashion-MNIST, MNIST, KMNIST: four idx files each --------------------------------------------


def load_idx(name: str, data_dir: Path, fetch: bool = True) -> ImageData:
    """60,000 + 10,000 grey images of 28x28 in ten classes."""
    raw, fashion = data_dir / name / "raw", name == "FashionMNIST"
    found, others = find_idx(name, [data_dir, raw] + [DEBIAN_FOLDER] * fashion)
    if missing := [file for file in IDX_FILES if file not in found]:
        wrong = [why for path, why in others.items() if path.name.removesuffix(".gz") in missing]
        if wrong or not fetch:  # never download next to unknown files of that name
            absent = f"{missing[0]} of {name} is not in {data_dir} or below it"
            raise UserError(f"{[*wrong, absent][0]}: {WAYS}")
        fetch_idx(name, raw)
        return load_idx(name, data_dir, fetch=False)
    if others:
        note(f"passed over, not the published files of {name}: {', '.join(map(str, others))}")
    folders = dict.fromkeys(str(path.parent) for path, _ in found.values())
    source = f"read from {', '.join(folders)}" + ", sha256 verified" * (name != "KMNIST")
    parts = [part if part.dim() == 4 else part.long() for _, part in found.values()]
    mean, std = (0.2860,) * fashion, (0.3530,) * fashion
    return ImageData(*parts, CLASSES[name].split(","), source, mean, std)


def find_idx(name: str, folders: list[Path]) -> tuple[dict, dict[Path, str]]:
    """({file: (path, tensor)} of published files, {path: why not} of others so named)."""
    found, others = {}, {}
    for file, expected in zip(IDX_FILES, SHA256[name].split(), strict=True):
        ends = (".gz", "") if expected == PACKED else ("", ".gz")
        for path in (folder / (file + end) for folder in folders for end in ends):
            if file in found or not os.path.isfile(path):
                continue
            try:
                body = path.read_bytes()
                content = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
                known = body if expected == PACKED else content
                sha256 = hashlib.sha256(known).hexdigest()[:16]
                unknown = expected == PACKED and body is content and sha256 not in str(SHA256)
                if sha256 != expected and not unknown:
                    raise ValueError(f"its sha256 is {sha256}..., expected {expected}...")
                sizes = (-1, 1, 28, 28) if "images" in file else (-1,)
                header = 16 if "images" in file else 8  # 4 bytes, plus 4 per dimension
                values = np.frombuffer(content, np.uint8, offset=header).reshape(sizes)
                found[file] = path, torch.tensor(values)
                if unknown:
                    note(f"{path} cannot be verified, only {file}.gz can")
            except Exception as error:  # a damaged file can raise anything
                others[path] = f"{path} is not the published {file} of {name}: {in_one_line(error)}"
    return found, others


def fetch_idx(name: str, raw: Path) -> None:
    """Downloads the files to `raw`, from the first source that has them."""
    import torchvision

    mirror, failures = getattr(torchvision.datasets, name), []
    sources = {"torchvision's mirror": lambda new: Path(mirror(new, download=True).raw_folder)}
    if name == "FashionMNIST":
        sources["the Debian package dataset-fashion-mnist"] = from_debian
    check_writable(raw, WAYS)
    socket.setdefaulttimeout(30)  # torchvision sets none
    with locked(raw), tempfile.TemporaryDirectory() as new:
        if len(find_idx(name, [raw])[0]) == len(IDX_FILES):
            return  # another process downloaded them meanwhile
        for source, get in sources.items():
            print(f"{name} is not here yet: trying {source}", file=sys.stderr, flush=True)
            try:
                found, others = find_idx(name, [get(Path(new))])
                if len(found) < len(IDX_FILES):
                    raise ValueError(" ".join(others.values()) or "files are missing")
                for path, _ in found.values():
                    if not (raw / path.name).exists():
                        write_atomically(raw / path.name, path.read_bytes())
                return
            except Exception as error:  # network, archive or checksum: there are many
                failures.append(f"{source}: {in_one_line(error)}")
    raise UserError(f"{name} is not there and cannot be fetched ({'; '.join(failures)}): {WAYS}")


def from_debian(folder: Path) -> Path:
    """The Debian package, unpacked but not installed.

    It uses its own package lists, so it needs neither root nor an earlier `apt-get update`.
    """
    command, how = ["sh", "-ec", FROM_DEBIAN], {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=folder, timeout=600, **how)
    if done.returncode != 0:
        raise ValueError(done.stderr or f"apt-get exited with {done.returncode}")
    return next(folder.glob("usr/share/datasets/*"))
