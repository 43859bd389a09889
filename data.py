"""Data sets as uint8 tensors: loaded or downloaded, split, shuffled, augmented, normalised.

    python data.py                                # get Fashion-MNIST into data/ and verify it
    python data.py --data-dir /datasets           # ... or find it there
    python data.py --dataset cifar10
    python data.py --dataset path/to/folder       # any folder of images: see kit/image_folder.py
    python data.py --dataset path/to/NAME.npz     # MedMNIST, or a file in its format

The first call downloads 30 MB. There is no DataLoader: the images stay on the device as uint8, and
a batch is an index into them.

To add a data set: write a function `data_dir -> ImageData` and add a line to DATASETS.
"""

import os
import sys
from functools import partial
from inspect import signature
from pathlib import Path

from kit.augment import Augmentation
from kit.command_line import NAMES, UserError, exit_code, is_name, make_parser
from kit.datasets import ImageData, load_cifar, load_idx, load_npz, note
from kit.decoding import printable, shows
from kit.image_folder import load_folder, load_tiny_imagenet

import numpy as np
import torch
from torch import Tensor

DATASETS = {
    "fashion_mnist": partial(load_idx, "FashionMNIST"),
    "mnist": partial(load_idx, "MNIST"),
    "kmnist": partial(load_idx, "KMNIST"),
    "cifar10": partial(load_cifar, "CIFAR10"),
    "cifar100": partial(load_cifar, "CIFAR100"),
    "tiny_imagenet": load_tiny_imagenet,
}


def resolve(dataset: str, image_size: int | None = None) -> tuple[str, str]:
    """(a key of DATASETS or an absolute path, the name of its results). Raises ValueError."""
    is_folder = dataset not in DATASETS and not dataset.lower().endswith(".npz")
    if image_size is not None and not (is_folder and 1 <= image_size <= 4096):
        what = f"is for folders of images, from 1 to 4096: not {image_size} for {dataset!r}"
        raise ValueError(f"--image-size {what}")
    if dataset in DATASETS and is_name(dataset):
        return dataset, dataset
    folder = Path(os.path.abspath(dataset))  # a link is named after itself, not its target
    known = ", ".join(DATASETS)
    is_path = dataset and ("/" in dataset or folder.is_dir() or folder.suffix.lower() == ".npz")
    if not is_path and dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: choose from {known}, a folder or an .npz")
    if folder.name in DATASETS or not is_name(folder.name) or not shows(str(folder)):
        name = dataset if dataset in DATASETS else printable(folder)
        raise ValueError(f"{name}: rename it: {NAMES}; {known} are taken")
    return str(folder), folder.name


def load_dataset(
    name: str, data_dir: Path | str = "data", image_size: int | None = None, fetch: bool = True
) -> ImageData:
    """A data set of DATASETS, downloaded to `data_dir` if missing; a folder or an .npz.

    image_size: pixels, for folders of images. Without `fetch` nothing is written.
    """
    try:
        name, _ = resolve(name, image_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if name in DATASETS:
        load = DATASETS[name]
    elif name.lower().endswith(".npz"):
        load = partial(load_npz, Path(name))
    else:
        load = partial(load_folder, Path(name), image_size=image_size)
    asked = {"fetch": fetch} if "fetch" in signature(load).parameters else {}
    dataset = load(Path(data_dir), **asked)
    if not isinstance(dataset, ImageData):
        raise UserError(f"{name}: not an ImageData, but a {type(dataset).__name__}")
    if (brightest := dataset.train_images.max()) < 32:  # 12 of 16 bits, or floats in [0, 1]
        note(f"the brightest training pixel is {brightest} of 255: scale pixels to 0 to 255")
    note_copies("test", *dataset.keys[::-1])
    labels = np.append(dataset.train_labels, dataset.test_labels)
    # image: a number for each distinct image; first: where that number first occurs.
    _, first, image = np.unique(np.append(*dataset.hashes), return_index=True, return_inverse=True)
    if n := np.isin(image, image[labels != labels[first[image]]]).sum():
        note(f"{n:,} images have two labels (identical pixels, another class): accuracy is lowered")
    return dataset


def note_copies(part: str, keys: np.ndarray, train_keys: np.ndarray) -> None:
    if n := np.isin(keys, train_keys).sum():
        copies = f"{n:,} of {len(keys):,} {part} images are also training images"
        note(f"{copies} (identical pixels and class): {part} accuracy is inflated")


# --- Split, order, normalisation: the same for every model of one seed ----------------------------


def split_indices(n: int, seed: int, val_fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """A random split of range(n) into int64 (train_idx, val_idx), given by `seed` alone."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    n_val = max(1, round(n * val_fraction))
    return order[n_val:], order[:n_val]


def sampling_order(labels: Tensor) -> Tensor:
    """A permutation of the indices into `labels` (N,), the same for every model and seed. Any
    first n of them have nearly the overall class proportions."""
    order = np.random.default_rng(0).permutation(len(labels))
    drawn, rank = labels.numpy()[order], np.empty(len(labels))
    for label, size in zip(*np.unique(drawn, return_counts=True), strict=True):
        rank[drawn == label] = np.arange(size) / size  # within its class, from 0 to 1
    return torch.from_numpy(order[np.argsort(rank, kind="stable")])


def stratified(labels: Tensor, n: int) -> Tensor:
    """Sorted indices into `labels` (N,) of n images; larger samples contain smaller ones."""
    return sampling_order(labels)[:n].sort().values


def shuffled(indices: Tensor, seed: int, epoch: int) -> Tensor:
    """`indices` in the order of one epoch, given by (seed, epoch) alone: no state to save.

    Epochs start at 1: default_rng((seed, 0)) equals default_rng(seed), which draws the split.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(indices))
    return indices[torch.from_numpy(order)]


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32: (images / 255 - mean) / std.

    In eager mode bit for bit equal to torchvision's ToTensor and Normalize. 255 is a tensor because
    CUDA replaces division by a number with multiplication by its rounded reciprocal.
    """
    scale = torch.full((), 255.0, device=images.device)
    return (images / scale).sub_(mean).div_(std)


class Loader:
    """A run's images, all on its device as uint8, and the batches of its epochs."""

    def __init__(self, dataset: ImageData, settings, device: torch.device):
        self.seed, self.batch_size = settings.seed, settings.batch_size
        self.dataset, self.classes = dataset, dataset.classes
        self.train_idx, val_idx = split_indices(len(dataset.train_images), settings.seed)
        if settings.limit_train:
            self.train_idx = self.train_idx[: settings.limit_train]
            val_idx = val_idx[: max(settings.batch_size, settings.limit_train // 9)]
        self.n_train = len(self.train_idx)
        self.steps = -(-self.n_train // self.batch_size)  # per epoch, with the last partial batch
        if self.n_train < 2 or 1 in (self.batch_size, self.n_train % self.batch_size):
            raise UserError(
                f"{self.n_train:,} training images leave a batch of one image or none, and "
                "BatchNorm needs two: use another --batch-size, or more images"
            )
        note_copies("validation", *(dataset.keys[0][idx] for idx in (val_idx, self.train_idx)))
        test_idx = stratified(dataset.test_labels, settings.limit_test or len(dataset.test_labels))
        test_images, test_labels = dataset.test_images[test_idx], dataset.test_labels[test_idx]
        train_labels, val_labels = (dataset.train_labels[idx] for idx in (self.train_idx, val_idx))
        labels = {"training": train_labels, "validation": val_labels, "test": test_labels}
        for part, of_part in labels.items():
            counts = of_part.bincount(minlength=len(self.classes))
            absent = [name for name, n in zip(self.classes, counts, strict=True) if not n]
            if absent and not (settings.dry_run and part == "test"):  # of that it has a batch
                note(f"no {part} image of {', '.join(absent[:5])} ({len(absent)} classes)")
        self.images, self.labels = dataset.train_images.to(device), dataset.train_labels.to(device)
        self.channels = self.images.shape[1]
        self.validation = self.images[val_idx], self.labels[val_idx]
        self.test = test_images.to(device), test_labels.to(device)
        self.test_order = sampling_order(test_labels).to(device)
        self.mean, self.std = dataset.mean_and_std(settings.normalize, device)
        self.augmentation = Augmentation.of(settings)

    def __str__(self):
        size = "x".join(map(str, self.images.shape[1:]))
        return (
            f"{self.n_train:,} training, {len(self.validation[1]):,} validation, "
            f"{len(self.test[1]):,} test images of {size}, {self.dataset.source}"
        )

    def epoch(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """(idx, aug_params) of each batch, on the device; the last batch may be smaller."""
        device = self.images.device
        idx = shuffled(self.train_idx, self.seed, epoch).to(device)
        aug_params = self.augmentation.make_params(self.n_train, self.seed, epoch).to(device)
        return list(zip(idx.split(self.batch_size), aug_params.split(self.batch_size), strict=True))

    def batch(self, idx: Tensor, aug_params: Tensor):
        """(augmented and normalised images, float32 (N, C, H, W); labels (N,); with CutMix the
        weight (N,) of each image's own label, else None)."""
        images = self.augmentation.of_pixels(self.images[idx], aug_params)
        images, weight = self.augmentation.of_normalized(self.normalize(images), aug_params)
        return images, self.labels[idx], weight

    def normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.mean, self.std)

    def mean_over_images(self, losses: Tensor) -> float:
        """An epoch's mean loss from those of its batches, float64 (batches,)."""
        sizes = torch.full_like(losses, self.batch_size)
        sizes[-1] = self.n_train - (len(losses) - 1) * self.batch_size
        return (losses @ sizes).item() / self.n_train


@exit_code
def main(argv: list[str] | None = None) -> None:
    """Runs the script with `argv` as its command line."""
    parser = make_parser(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    known = f"{', '.join(DATASETS)}, a folder or .npz; {default}"
    add("--dataset", default="fashion_mnist", help=known)
    add("--data-dir", type=Path, default=Path("data"), help=default)
    add("--image-size", type=int, help="pixels; for folders of images")
    args = parser.parse_args(argv)
    try:
        resolve(args.dataset, args.image_size)
    except ValueError as error:
        parser.error(str(error))
    dataset = load_dataset(args.dataset, args.data_dir, args.image_size)
    size = " x ".join(map(str, dataset.train_images.shape[1:]))
    print(
        f"{args.dataset}: {dataset.source}: {len(dataset.train_images):,} training and "
        f"{len(dataset.test_images):,} test images, {size}, "
        f"{len(dataset.classes)} classes, data {dataset.digest}"
    )


if __name__ == "__main__":
    sys.exit(main())
