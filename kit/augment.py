"""Batched data augmentation on the device, with random parameters per image.

torchvision.transforms.v2 draws one set of parameters per batch. Here an epoch's are drawn in
advance, from (seed, epoch), one row per image. So an augmentation is a pure function of images and
parameters: the same in every mode, capturable in a CUDA graph, with no state to save.

    augmentation = Augmentation(crop=4, flip=True, cutmix=1.0)
    params = augmentation.make_params(54_000, seed, epoch)   # (54000, columns)
    images = augmentation.of_pixels(images, params[:64])     # uint8 (64, C, H, W), then normalised
    images, label_weight = augmentation.of_normalized(images, params[:64])
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """The augmentations of a batch; 0 and False turn one off."""

    crop: int = 0  # pixels of black padding before a random crop
    flip: bool = False  # horizontally, with probability 1/2 per image
    randaugment: int = 0  # operations per image, one after the other
    erase: float = 0.0  # probability of erasing a rectangle, per image
    cutmix: float = 0.0  # alpha of Beta(alpha, alpha), the label weights

    @classmethod
    def of(cls, settings) -> "Augmentation":
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @property
    def columns(self) -> list[int]:
        """Columns of the random parameters per augmentation, in the order of the fields."""
        used = [bool(self.crop), self.flip, self.randaugment, bool(self.erase), bool(self.cutmix)]
        return [n * columns for n, columns in zip(used, (2, 1, 2, 5, 3), strict=True)]

    def make_params(self, n: int, seed: int, epoch: int) -> Tensor:
        """float32 (n, columns) in [0, 1), fixed by (seed, epoch): uniform, label weights Beta."""
        generator = np.random.default_rng((seed, epoch, 1))  # data.shuffled uses (seed, epoch)
        params = generator.random((n, sum(self.columns)), dtype=np.float32)
        if self.cutmix:  # its first column
            params[:, -3] = generator.beta(self.cutmix, self.cutmix, n)
        return torch.from_numpy(params)

    def of_pixels(self, images: Tensor, params: Tensor) -> Tensor:
        """Crop, flip, RandAugment: uint8 (N, C, H, W) -> the same; params (N, columns)."""
        crop, flip, operations, _, _ = params.split(self.columns, 1)
        if self.crop or self.flip:
            images = crop_and_flip(images, self.crop, crop, flip)
        for i in range(self.randaugment):
            images = randaugment(images, operations[:, 2 * i], operations[:, 2 * i + 1])
        return images

    def of_normalized(self, images: Tensor, params: Tensor) -> tuple[Tensor, Tensor | None]:
        """Erasing, CutMix: float (N, C, H, W) -> (the same, label weight (N,) or None).

        Erased pixels become 0: the mean with `--normalize data`, else mid-grey. CutMix mixes image
        i with image i - 1, with a weight per image; the paper uses one per batch.
        """
        *_, erased, mixed = params.split(self.columns, 1)
        if self.erase:
            images = erase(images, self.erase, erased)
        if not self.cutmix:
            return images, None
        own = (~cut(*images.shape[2:], mixed)).float()  # (N, H, W): 1 where image i is kept
        label_weight, own = own.mean((1, 2)), own[:, None]
        return images * own + images.roll(1, 0) * (1 - own), label_weight


def crop_and_flip(images, padding: int, offsets: Tensor, flips: Tensor):
    """Random crops of the padded images, at their original size, and random flips."""
    n, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(n, height)
    columns = torch.arange(width, device=device).expand(n, width)
    if padding:
        images = F.pad(images, (padding,) * 4)
        offsets = (offsets * (2 * padding + 1)).long()
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    if flips.shape[1]:
        columns = torch.where(flips < 0.5, columns.flip(1), columns)
    which = torch.arange(n, device=device)[:, None, None]
    cropped = images[which, :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return cropped.permute(0, 3, 1, 2).contiguous()


def rectangles(height: int, width: int, top, left, bottom, right) -> Tensor:
    """bool (N, H, W): top <= row < bottom and left <= column < right, each bound (N,)."""
    rows = torch.arange(height, device=top.device)[None, :, None]
    columns = torch.arange(width, device=top.device)[None, None, :]
    top, left, bottom, right = (bound[:, None, None] for bound in (top, left, bottom, right))
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def erase(images: Tensor, probability: float, u: Tensor) -> Tensor:
    """Random erasing (Zhong et al., AAAI 2020, arXiv 1708.04896): a rectangle of 2 to 33% of the
    area, 0.3 to 3.3 times as high as wide, as in torchvision, but clamped to fit."""
    height, width = images.shape[2:]
    area = height * width * (0.02 + 0.31 * u[:, 1])
    ratio = 0.3 * (3.3 / 0.3) ** u[:, 2]
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top = (u[:, 3] * (height - tall + 1)).floor()
    left = (u[:, 4] * (width - wide + 1)).floor()
    erased = rectangles(height, width, top, left, top + tall, left + wide)
    erased &= (u[:, 0] < probability)[:, None, None]
    return images.masked_fill(erased[:, None], 0)


def cut(height: int, width: int, u: Tensor) -> Tensor:
    """CutMix (Yun et al., ICCV 2019, arXiv 1905.04899): bool (N, H, W), a rectangle with a share
    of 1 - u[:, 0] of the area and a random centre, cropped at the border."""
    side = (1 - u[:, 0]).sqrt()
    tall, wide = (side * height).floor(), (side * width).floor()
    row, column = (u[:, 1] * height).floor(), (u[:, 2] * width).floor()
    top, left = row - (tall / 2).floor(), column - (wide / 2).floor()
    return rectangles(height, width, top, left, top + tall, left + wide)


# --- RandAugment ----------------------------------------------------------------------------------

# The operations of RandAugment (Cubuk et al., NeurIPS 2020, arXiv 1909.13719) at torchvision's
# default, magnitude 9 of 30: shear 0.09, translation 14% of the side, rotation 9 degrees, factors
# 1 - 0.27 or 1 + 0.27, posterize to 7 bits, solarize from 70%.
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color",
    "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
MAGNITUDE = 9 / 30


def randaugment(images: Tensor, which: Tensor, sign: Tensor) -> Tensor:
    """One operation per image: uint8 (N, C, H, W) -> the same. which, sign: (N,) in [0, 1)."""
    chosen = (which * len(OPERATIONS)).long()
    sign = torch.where(sign < 0.5, -1.0, 1.0)
    factor = (1 + sign * 0.9 * MAGNITUDE)[:, None, None, None]
    x = images.float()
    grey = luminance(x)
    results = {
        "brightness": x * factor,
        "color": blend(x, grey, factor),
        "contrast": blend(x, grey.floor().mean((2, 3), keepdim=True), factor),
        "sharpness": blend(x, smoothed(x), factor),
        "posterize": (images & (256 - 2 ** round(4 * MAGNITUDE))).float(),
        "solarize": torch.where(x >= 255 * (1 - MAGNITUDE), 255 - x, x),
        "autocontrast": autocontrast(x),
        "equalize": equalize(images).float(),
    }
    out = moved(x, chosen, sign)  # all operations run on all images; each image selects its own
    for name, result in results.items():
        takes_it = (chosen == OPERATIONS.index(name))[:, None, None, None]
        out = torch.where(takes_it, result, out)
    return out.clamp(0, 255).byte()


def moved(x: Tensor, chosen: Tensor, sign: Tensor) -> Tensor:
    """Shear (from the corner), shift, rotation (around the centre); nearest pixels."""
    height, width = x.shape[2:]
    most = (0.3, 0.3, 150 / 331 * width, 150 / 331 * height, math.pi / 6)
    shear_x, shear_y, shift_x, shift_y, angle = (
        torch.where(chosen == i, sign * MAGNITUDE * value, 0.0) for i, value in enumerate(most, 1)
    )  # in the order of OPERATIONS, after the identity
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # The source of the pixel at (column, row), both measured from the centre.
    to_column = (cosine, sine + shear_x, shear_x * height / 2 - shift_x.trunc())
    to_row = (shear_y - sine, cosine, shear_y * width / 2 - shift_y.trunc())
    rows = torch.arange(height, device=x.device)[:, None] - (height - 1) / 2
    columns = torch.arange(width, device=x.device)[None] - (width - 1) / 2

    def source(coefficients, length):
        a, b, c = (value[:, None, None] for value in coefficients)
        return (a * columns + b * rows + c + (length - 1) / 2).round().long()

    row, column = source(to_row, height), source(to_column, width)  # (N, H, W)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    which = torch.arange(len(x), device=x.device)[:, None, None]
    taken = x[which, :, row.clamp(0, height - 1), column.clamp(0, width - 1)]  # (N, H, W, C)
    return taken.permute(0, 3, 1, 2) * inside[:, None]


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return factor * x + (1 - factor) * other


def luminance(x: Tensor) -> Tensor:
    """(N, 1, H, W)."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def smoothed(x: Tensor) -> Tensor:
    """3x3 average with weight 5 in the centre, 1 elsewhere; the border stays unchanged."""
    inner = (F.avg_pool2d(x, 3, stride=1) * 9 + 4 * x[:, :, 1:-1, 1:-1]) / 13
    border = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device)
    border[1:-1, 1:-1] = False
    return torch.where(border, x, F.pad(inner.round(), (1, 1, 1, 1)))


def autocontrast(x: Tensor) -> Tensor:
    """Stretches each channel's values to the range 0 to 255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * (255 / (high - low).clamp(min=1)), x)


def equalize(images: Tensor) -> Tensor:
    """Histogram equalisation of each channel, as PIL does it: uint8 -> int64.

    Counts by sorting: on CUDA, scatter_add_ cannot be captured in a graph.
    """
    n, channels = images.shape[:2]
    values = images.reshape(n, channels, -1).long()
    levels = torch.arange(256, device=images.device).expand(n, channels, 256).contiguous()
    below = torch.searchsorted(values.sort(2).values, levels)  # (N, C, 256): darker pixels
    step = below.gather(2, values.amax(2, keepdim=True)) // 255  # PIL: pixels below the max / 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(2, values)
    return torch.where(step > 0, equalized, values).view_as(images)
