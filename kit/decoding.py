"""Image files decoded to uint8 as a viewer shows them, and cached below --data-dir.

EXIF orientation, palettes and transparency (on white) are applied. All colour modes become RGB, or
grey if all images are grey. 16 bits are cut to the upper 8, and only the first frame is used.
Colour profiles are ignored. Truncation is detected, and any damage to PNGs, which have checksums.
"""

import hashlib
import io
import math
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import compress
from pathlib import Path

from kit.command_line import UserError, in_one_line
from kit.datasets import note
from kit.files import locked, write_atomically

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps

VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # of this decoder
DEFAULT_SIZE = 64
MOST = 0.75  # if this share of the images has one size, all are resized to it
KEPT = ".decoded"  # the folder in --data-dir; hidden, as that may be the data set's own folder
# No format, and formats that Pillow only writes, or only recognises.
NOT_DECODED = {None, "PDF", "PALM", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def is_image(path: Path) -> bool:
    """Whether Pillow reads it, by suffix; without one, by content."""
    if path.suffix not in ("", "."):
        return Image.registered_extensions().get(path.suffix.lower()) not in NOT_DECODED
    with suppress(Exception), Image.open(path):  # a file that is no image can raise anything
        return True
    return False


def decoded(
    folder: Path, paths: list[Path], image_size: int | None, data_dir: Path, keep: bool
) -> tuple[np.ndarray, str]:
    """(uint8 (N, C, H, W), remarks for the user), from the cache in `data_dir` if present.

    The cache's name encodes all that it depends on. keep: the cache may be written.
    """
    digest, above, size = hashlib.sha256(), len(str(folder)), image_size or "own"
    for path in paths:  # path.relative_to would take a third of the time
        digest.update(f"\0{str(path)[above:]}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    key = digest.hexdigest()[:16]
    kept = data_dir / KEPT / f"{folder.name}.{key}.{size}.pillow{PIL.__version__}-{VERSION}.npz"
    if os.path.isfile(kept):  # False, not an error, if the name is too long
        raise_if_large(kept, kept.stat().st_size)
        try:
            with np.load(kept) as file:
                return file["images"], str(file["said"])
        except Exception as error:  # a damaged file can raise anything
            note(f"{kept} is damaged ({in_one_line(error)}): decoding again")
    images, said = decode(folder, paths, image_size)
    if keep:
        try:
            buffer = io.BytesIO()
            np.savez(buffer, images=images, said=said)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with locked(kept.parent, f"{folder.name}.*"):
                for outdated in kept.parent.glob(f"{folder.name}.{'?' * len(key)}.{size}.*.npz"):
                    outdated.unlink(missing_ok=True)
                write_atomically(kept, buffer.getbuffer())
        except OSError as error:
            note(f"decoded images cannot be kept ({error}): next time again")
    return images, said


def decode(folder: Path, paths: list[Path], image_size: int | None) -> tuple[np.ndarray, str]:
    """(uint8 (N, C, H, W), remarks for the user); see `decoded`."""
    print(f"decoding {len(paths):,} images below {folder}", file=sys.stderr, flush=True)
    sizes, modes, frames, deep = zip(*in_threads(header, paths), strict=True)
    (size, most), n = Counter(sizes).most_common(1)[0], len(paths)
    if image_size or most < MOST * n:
        size = (image_size or DEFAULT_SIZE,) * 2
    grey = all(mode[0] in "1LI" and mode != "LAB" for mode in modes)
    shape = (n, 1 if grey else 3, size[1], size[0])
    raise_if_large(folder, 2 * math.prod(shape))  # a second copy while they are cached
    images = np.empty(shape, np.uint8)

    def fill(path, image):
        shown = np.asarray(pixels(path, grey, size))
        image[:] = shown if grey else shown.transpose(2, 0, 1)

    in_threads(fill, paths, images)
    if not grey and all((image == image[:1]).all() for image in images):
        images = images[:, :1].copy()
    said = {"first frame only": [n > 1 for n in frames], "upper 8 of 16 bits": deep}
    if image_size:
        said["not square, cropped in the middle"] = [width != height for width, height in sizes]
    else:
        other = f"another size, scaled and cropped to {size[0]} x {size[1]}"
        said[other] = [each != size for each in sizes]
    found = {what: [*compress(paths, which)] for what, which in said.items()}
    return images, counted(found, folder)


def in_threads(function: Callable, paths: list[Path], *more) -> list:
    """The function's result for each path. Raises UserError that names the damaged ones."""

    def tried(path, *rest):
        try:
            return function(path, *rest)
        except Exception as error:  # a damaged file can raise anything
            bad[path] = in_one_line(error)

    bad = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings(action="ignore"):
        found = list(pool.map(tried, paths, *more))
    if bad:
        some = "; ".join(f"{printable(path)} ({bad[path]})" for path in sorted(bad)[:5])
        rest = f"; and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        raise UserError(f"{len(bad):,} images cannot be read: mend or delete them: {some}{rest}")
    return found


def header(path: Path):
    """((width, height), mode, number of frames, more than 8 bits?), without decoding."""
    with Image.open(path) as image:
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
            raise ValueError(f"mode {image.mode}, more than 16 bits a pixel")
        size, turned = image.size, 1
        with suppress(Exception):  # damaged EXIF is ignored
            # Not image.getexif(), which decodes a PNG.
            turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        if turned in (5, 6, 7, 8) and image.format != "TIFF":  # Pillow rotates TIFFs itself
            size = size[::-1]
        mode, frames, raw = image.mode, getattr(image, "n_frames", 1), str(image.tile[:1])
        if image.format == "PNG":
            image.verify()  # its checksums, which decoding ignores
        return size, mode, frames, mode[0] == "I" or ";16" in raw


def pixels(path: Path | str, grey: bool, size: tuple[int, int]) -> Image.Image:
    """As a viewer shows it, in mode L or RGB, resized and centre-cropped to (width, height)."""
    # Not by name: Pillow would memory-map a TIFF, wrongly if it has to be rotated.
    with open(path, "rb") as file, Image.open(file) as image:
        image.load()
        of = image.format
        with suppress(Exception):  # damaged EXIF is ignored
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] == "I":
            deep = np.asarray(image)
            deep = np.where(deep == image.info.get("transparency"), 65_535, deep)
            if of == "TIFF":  # beyond 8 bits Pillow does neither
                deep = deep << 4 if image.tag_v2.get(258) == (12,) else deep
                deep = 65_535 - deep if image.tag_v2.get(262) == 0 else deep  # 0 is white
            image = Image.fromarray((deep >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image, white = image.convert("RGBA"), Image.new("RGBA", image.size, "white")
            # TGA and BMP have a fourth byte that may be unused: all 0 means no alpha.
            if image.getchannel("A").getextrema()[1] or of not in ("TGA", "BMP"):
                image = Image.alpha_composite(white, image)
        return ImageOps.fit(image.convert("L" if grey else "RGB"), size, Image.Resampling.BILINEAR)


def raise_if_large(where: Path, needed: int) -> None:
    """Checks memory before allocating images."""
    if needed > (free := available_memory()):
        sizes = f"the images take {needed / 1e6:,.1f} MB of {free / 1e6:,.1f} MB free"
        raise UserError(f"{where}: {sizes}: use a smaller --image-size, or fewer images")


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    meminfo = Path("/proc/meminfo").read_text()
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo)[1])


def counted(found: dict, folder: Path) -> str:
    """'hidden: 2 (cat/.git, dog/.git); ...', naming the first three of each."""
    words = []
    for what, paths in sorted(found.items()):
        names = [printable(path.relative_to(folder)) for path in sorted(paths)[:3]]
        more = ", ..." if len(paths) > 3 else ""
        words += [f"{what}: {len(paths):,} ({', '.join(names)}{more})"] if paths else []
    return "; ".join(words)


def printable(path: Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))


def shows(text: str) -> bool:
    """Whether it has no control characters and is valid UTF-8."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
