"""Data sets as uint8 tensors: found or fetched, split, shuffled, normalised.

    python data.py                                # get Fashion-MNIST into data/ and verify it
    python data.py --data-dir /datasets           # ... or find it there
    python data.py --dataset cifar10
    python data.py --dataset path/to/folder       # any folder of images: see image_folder.py

A second at most once the files are on disk; 30 MB to download before. There is no DataLoader: a
data set this size stays on the device as bytes, and a batch is an index into it.

To add a data set: write a function `data_dir -> ImageData`, add one line to DATASETS.
"""

import argparse
import re
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fashion_mnist import load_fashion_mnist
from image_data import DataError, ImageData, moments
from image_folder import load_folder, load_tiny_imagenet


def load_from_torchvision(name: str, data_dir: Path) -> ImageData:
    """The data set of torchvision's class `name`, which fetches it, too. Raises DataError."""
    import torchvision  # here, for it takes a second to import

    try:
        train, test = (
            getattr(torchvision.datasets, name)(data_dir, train=part, download=True)
            for part in (True, False)
        )
    except Exception as error:  # of networks, archives, checksums and pickles: they are many
        raise DataError(
            f"torchvision's {name} is not below {data_dir}, and cannot be fetched or read "
            f"({type(error).__name__}: {first_line(error)}): bring its files there, as torchvision "
            "lays them out, or try again with a network"
        ) from error

    def tensors(part):
        images = torch.as_tensor(part.data)  # (N, H, W) if grey, (N, H, W, C) if not
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(part.targets, dtype=torch.int64)

    (train_images, train_labels), (test_images, test_labels) = tensors(train), tensors(test)
    mean, std = moments(train_images)
    source = f"read from {data_dir} by torchvision's {name}"
    return ImageData(
        train_images, train_labels, test_images, test_labels, list(train.classes), mean, std, source
    )


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


DATASETS = {
    "fashion_mnist": load_fashion_mnist,
    "mnist": partial(load_from_torchvision, "MNIST"),
    "kmnist": partial(load_from_torchvision, "KMNIST"),
    "cifar10": partial(load_from_torchvision, "CIFAR10"),
    "cifar100": partial(load_from_torchvision, "CIFAR100"),
    "tiny_imagenet": load_tiny_imagenet,
}


def is_folder(name: str) -> bool:
    """Whether a --dataset is a folder of images rather than a name of DATASETS."""
    return name not in DATASETS and ("/" in name or (name != "" and Path(name).is_dir()))


def name_of(dataset: str) -> str:
    """What a data set is called in run folders and reports: "flowers" for path/to/flowers."""
    return Path(dataset).resolve().name if is_folder(dataset) else dataset


def what_is_wrong_with(dataset: str, image_size: int | None) -> str | None:
    """Why there can be no such --dataset and --image-size; None if there can."""
    if not is_folder(dataset):
        if dataset not in DATASETS:
            return f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}, or a folder"
        if image_size is not None:
            return f"--image-size is for folders of images, not for {dataset}"
        return None
    if not str(Path(dataset).resolve()).isprintable():
        return "--dataset: a path with characters that cannot be printed: rename it"
    name = name_of(dataset)
    if name in DATASETS:
        return f"{dataset}: its results would be taken for those of the data set {name}: rename it"
    if not re.fullmatch(r"[\w.+-]+", name, re.ASCII):
        return f"{dataset}: rename it, to letters, digits and . _ + - alone"
    if image_size is not None and not 1 <= image_size <= 4096:
        return f"--image-size {image_size} is not from 1 to 4096"
    return None


def load_dataset(
    name: str, data_dir: Path | str = "data", image_size: int | None = None
) -> ImageData:
    """The data set `name` of DATASETS, fetched into `data_dir` where it is missing; or the folder.

    image_size: to which the images of a folder are brought. Raises DataError with one line that
    says what is wrong and what to do.
    """
    if is_folder(name):
        return load_folder(Path(name), image_size)
    if name not in DATASETS:
        raise DataError(what_is_wrong_with(name, image_size))
    return DATASETS[name](Path(data_dir))


# --- Split, order, normalisation: the same for every model of one seed ----------------------------


def split_indices(
    n: int, seed: int, val_fraction: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random split of range(n) into int64 (train_idx, val_idx), fixed by `seed` alone."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    n_val = max(1, round(n * val_fraction))
    return order[n_val:], order[:n_val]


def shuffled(indices: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """`indices` in the order of one epoch, fixed by (seed, epoch) alone: there is no state to save.

    Epochs count from 1, for numpy makes the same stream of `seed` and of `(seed, 0)`, and the split
    has used that one.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(indices))
    return indices[torch.from_numpy(order)]


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W) -> float32: (images / 255 - mean) / std, on the device of `images`.

    `mean` and `std`: float32, broadcastable to (C, 1, 1), on the same device. Bit for bit what
    torchvision's ToTensor and Normalize give. The 255 is a tensor because CUDA turns a division by
    a Python number into a multiplication by its rounded reciprocal.
    """
    scale = torch.full((), 255.0, device=images.device)
    return (images / scale).sub_(mean).div_(std)


def main(argv: list[str] | None = None) -> int:
    """The script, with `argv` in place of the command line; the exit code."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is then a single line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset",
        default="fashion_mnist",
        metavar="NAME",
        help=f"{', '.join(DATASETS)}, or a folder of images; default: fashion_mnist",
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: data")
    parser.add_argument("--image-size", type=int, help="pixels; for folders of images")
    parser.add_argument("--shape", action="store_true", help="print C, H, W, number of classes")
    args = parser.parse_args(argv)
    if unknown := what_is_wrong_with(args.dataset, args.image_size):
        parser.error(unknown)
    try:
        dataset = load_dataset(args.dataset, args.data_dir, args.image_size)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    channels, height, width = dataset.train_images.shape[1:]
    if args.shape:
        print(channels, height, width, len(dataset.classes))
        return 0
    print(
        f"{args.dataset}: {dataset.source}: {len(dataset.train_images):,} "
        f"training and {len(dataset.test_images):,} test images, {channels} x {height} x {width}, "
        f"{len(dataset.classes)} classes"
    )
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    sys.exit(main())
