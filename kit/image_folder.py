"""Any folder of images, and Tiny ImageNet: read once, checked, and kept as bytes.

    folder/train/<class>/*.png and folder/test/<class>/*.png (or val for test)
    folder/<class>/*.png        a sixth of each class, drawn once for all, becomes the test set

Images may lie deeper below their class. In grey if all are grey, else in RGB. Images of one size
keep it; others, and all with an --image-size, are scaled until their shorter side has that many
pixels (64 by default) and cropped in the middle. How a camera was held (EXIF) is not looked at.
Images come in the order of their file names, classes in that of theirs.

What was decoded is kept in the folder, as .decoded.<key>.npz, under a key of all file names and
contents, so that the next run starts at once and a changed folder is read anew.
"""

import hashlib
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kit.command_line import UserError
from kit.datasets import ImageData
from kit.files import write_atomically

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
DEFAULT_SIZE = 64
TEST_SHARE = 1 / 6  # as MNIST and Fashion-MNIST are divided

Labelled = list[tuple[Path, str]]  # images and their classes


def load_folder(folder: Path, image_size: int | None = None) -> ImageData:
    """The images below `folder`. Raises UserError in one line."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one with a folder of images for each class")
    if (folder / "train").is_dir():
        test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        if test is None:
            raise UserError(f"{folder} has a train folder, but neither test nor val beside it")
        return load(folder, in_class_folders(folder / "train"), in_class_folders(test), image_size)
    train, test = divided(in_class_folders(folder))
    return load(folder, train, test, image_size)


def load_tiny_imagenet(data_dir: Path) -> ImageData:
    """100,000 + 10,000 colour images of 64x64 in 200 classes (Le and Yang 2015).

    Its test images have no labels: the validation images are the test set. They lie in one flat
    folder, which a reader of class folders would take for a single class. Raises UserError.
    """
    folder = data_dir / "tiny-imagenet-200"
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(
            f"{annotations} is not there: get tiny-imagenet-200.zip (250 MB, from the pages of "
            f"Stanford's course CS231n) and unpack it in {data_dir}"
        )
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    test = sorted((folder / "val" / "images" / row[0], row[1]) for row in rows if len(row) > 1)
    train = in_class_folders(folder / "train")
    for part, images in (("train", train), ("val", test)):
        if (n := len({name for _, name in images})) != 200:
            raise UserError(f"{folder}: {n} classes in {part} instead of 200: unpack it again")
    return load(folder, train, test, None)


def in_class_folders(folder: Path) -> Labelled:
    """The images below each folder in `folder`, in the order of their names."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    images = []
    for path in classes:
        if not path.name.isprintable():  # nor are bytes that are not UTF-8
            raise UserError(f"{str(path)!r} cannot be written in a table: rename it")
        found = images_below(path)
        if not found:
            raise UserError(f"{path} has no images: add some, or delete it")
        images += [(image, path.name) for image in found]
    if len(classes) < 2:
        raise UserError(f"{folder} needs a folder of images for each of two classes or more")
    return sorted(images, key=lambda image: (image[0].name, image[1], image[0]))


def images_below(folder: Path) -> list[Path]:
    """Raises OSError for a folder that cannot be read: nothing is left out in silence."""

    def stop(error):
        raise error

    return [
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=stop)
        for name in names
        if name[0] != "." and Path(name).suffix.lower() in ENDINGS and Path(place, name).is_file()
    ]


def divided(images: Labelled) -> tuple[Labelled, Labelled]:
    """(train, test), stratified. Whatever the seed of a run, for all are judged on one test set."""
    generator = np.random.default_rng(0)
    by_class = {name: [] for name in sorted({name for _, name in images})}
    for image in images:
        by_class[image[1]].append(image)
    test = set()
    for name, of_class in by_class.items():
        if len(of_class) < 2:
            raise UserError(f"class {name} has a single image: it takes one to train, one to test")
        n_test = max(1, round(TEST_SHARE * len(of_class)))
        test.update(of_class[i] for i in generator.permutation(len(of_class))[:n_test])
    return [i for i in images if i not in test], [i for i in images if i in test]


def load(folder: Path, train: Labelled, test: Labelled, image_size: int | None) -> ImageData:
    """Decodes the images, or takes them from where they are kept."""
    classes = sorted({name for _, name in train})
    if classes != sorted({name for _, name in test}):
        odd = sorted({name for _, name in train} ^ {name for _, name in test})
        raise UserError(f"{folder}: not both in train and in test: class {', '.join(odd[:5])}")
    paths = [path for path, _ in train + test]
    key = key_of(folder, paths, image_size)
    kept = folder / f".decoded.{key}.npz"
    images = read_kept(kept, len(paths))
    if images is None:
        images = decode(folder, paths, image_size)
        keep(kept, images)
    train_images, test_images = torch.from_numpy(images).split([len(train), len(test)])
    train_labels, test_labels = (
        torch.tensor([classes.index(name) for _, name in part]) for part in (train, test)
    )
    source = f"read from {folder}, key {key}"
    return ImageData(train_images, train_labels, test_images, test_labels, classes, source)


def key_of(folder: Path, paths: list[Path], image_size: int | None) -> str:
    digest = hashlib.sha256(f"{image_size}".encode())
    for path in paths:
        digest.update(f"\0{path.relative_to(folder)}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def read_kept(path: Path, n: int) -> np.ndarray | None:
    """The images kept in `path`, uint8 (n, C, H, W), if it is whole. numpy looks at checksums."""
    if not path.is_file():
        return None
    try:
        images = np.load(path, allow_pickle=False)["images"]
    except Exception as error:  # a damaged file raises what it likes
        print(f"note: {path} is damaged ({error}) and made anew", file=sys.stderr)
        return None
    fits = images.dtype == np.uint8 and images.ndim == 4 and len(images) == n
    return images if fits and images.shape[1] in (1, 3) else None


def keep(path: Path, images: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=images)
    try:
        for old in path.parent.glob(".decoded.*.npz"):
            old.unlink()
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        print(f"note: decoded images cannot be kept ({error}): next time again", file=sys.stderr)


def decode(folder: Path, paths: list[Path], image_size: int | None) -> np.ndarray:
    """uint8 (N, C, H, W). Raises UserError that names the images that cannot be read."""
    print(f"decoding {len(paths):,} images below {folder}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        headers = list(pool.map(header, paths))
        raise_if_bad(paths, headers)
        sizes = {size for size, _ in headers}
        grey = all(mode in ("1", "L") for _, mode in headers)
        if image_size is None and len(sizes) > 1:
            image_size = DEFAULT_SIZE
        width, height = (image_size, image_size) if image_size else sizes.pop()
        shape = (len(paths), 1 if grey else 3, height, width)
        needed, there = int(np.prod(shape, dtype=np.int64)), available_memory()
        if needed > there / 2:  # it is there twice while it is written
            raise UserError(
                f"{folder}: {len(paths):,} images of {shape[1]} x {height} x {width} take "
                f"{needed / 1e6:,.1f} MB, twice while they are read, of {there / 1e6:,.1f} MB "
                "free: use a smaller --image-size, or fewer images"
            )
        images = np.empty(shape, np.uint8)

        def fill(i):
            try:
                images[i] = pixels(paths[i], grey, image_size)
            except Exception as error:  # a damaged file raises what it likes
                return error

        raise_if_bad(paths, list(pool.map(fill, range(len(paths)))))
    return images


def header(path: Path):
    """((width, height), mode) of an image, without decoding it; or what went wrong."""
    from PIL import Image  # here, for only folders need it

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, more than 8 bits a pixel")
            return image.size, image.mode
    except Exception as error:  # a damaged file raises what it likes
        return error


def pixels(path: Path, grey: bool, image_size: int | None) -> np.ndarray:
    """uint8 (C, H, W)."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image = image.convert("L" if grey else "RGB")
    if image_size and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if grey else array.transpose(2, 0, 1)


def raise_if_bad(paths: list[Path], found: list) -> None:
    bad = [(path, error) for path, error in zip(paths, found, strict=True)
           if isinstance(error, Exception)]  # fmt: skip
    if bad:
        some = "; ".join(
            f"{str(path) if str(path).isprintable() else ascii(str(path))} "
            f"({str(error).split(chr(10))[0] or type(error).__name__})"
            for path, error in bad[:5]
        )
        more = f"; and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        raise UserError(f"{len(bad):,} images cannot be read: mend or delete them: {some}{more}")


def available_memory() -> int:
    """Bytes that may be taken without pushing others out."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
