"""Each part of an augmentation against torchvision on single images, or against a slow loop."""

import math

from kit import augment
from kit.augment import OPERATIONS, Augmentation

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

MAGNITUDE = 9 / 30
EXACT = {"identity", "translate_x", "translate_y", "posterize", "solarize", "equalize"}


def some_images(n=64, channels=3, height=12, width=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def as_torchvision(name, image, sign):
    """The operation with torchvision's functions, as its RandAugment calls them at magnitude 9."""
    height, width = image.shape[1:]

    def affine(angle=0.0, translate=(0, 0), shear=(0.0, 0.0)):
        corner = [0, 0] if shear != (0.0, 0.0) else None
        return TF.affine(image, angle, list(translate), 1.0, list(shear), center=corner)

    match name:
        case "identity":
            return image
        case "shear_x":
            return affine(shear=(math.degrees(math.atan(sign * 0.3 * MAGNITUDE)), 0.0))
        case "shear_y":
            return affine(shear=(0.0, math.degrees(math.atan(sign * 0.3 * MAGNITUDE))))
        case "translate_x":
            return affine(translate=(int(sign * 150 / 331 * width * MAGNITUDE), 0))
        case "translate_y":
            return affine(translate=(0, int(sign * 150 / 331 * height * MAGNITUDE)))
        case "rotate":
            return affine(angle=sign * 30 * MAGNITUDE)
        case "brightness":
            return TF.adjust_brightness(image, 1 + sign * 0.9 * MAGNITUDE)
        case "color":
            return TF.adjust_saturation(image, 1 + sign * 0.9 * MAGNITUDE)
        case "contrast":
            return TF.adjust_contrast(image, 1 + sign * 0.9 * MAGNITUDE)
        case "sharpness":
            return TF.adjust_sharpness(image, 1 + sign * 0.9 * MAGNITUDE)
        case "posterize":
            return TF.posterize(image, 8 - round(9 / (30 / 4)))
        case "solarize":
            return TF.solarize(image, 255 * (1 - MAGNITUDE))
        case "autocontrast":
            return TF.autocontrast(image)
        case "equalize":
            return TF.equalize(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_torchvision_s(name, channels):
    images = some_images(40, channels, 28, 24)
    images[3], images[4] = 7, images[4] // 4  # of one value, and dark
    which = torch.full((40,), (OPERATIONS.index(name) + 0.5) / len(OPERATIONS))
    signs = torch.arange(40) % 2 / 2.0
    ours = augment.randaugment(images, which, signs)
    theirs = torch.stack([
        as_torchvision(name, image, -1 if sign < 0.5 else 1) for image, sign in zip(images, signs)
    ])  # fmt: skip
    moves = name in ("shear_x", "shear_y", "rotate")  # halfway between pixels either will do
    difference = (ours.int() - theirs.int()).abs()
    if moves:
        assert (difference > 0).float().mean() < 0.02
    else:
        # Cut off to whole numbers: where rounding makes 7 of 6.9999998, they are 6 and 7.
        assert difference.max() <= (name not in EXACT) and (difference > 0).float().mean() < 0.15


def test_each_image_takes_its_own_operation():
    images, n = some_images(140), len(OPERATIONS)
    which = (torch.arange(140) % n + 0.5) / n
    together = augment.randaugment(images, which, torch.zeros(140))
    alone = [
        augment.randaugment(images[i : i + 1], which[i : i + 1], torch.zeros(1)) for i in range(140)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_crop_and_flip_are_a_slow_loop():
    images, augmentation = some_images(), Augmentation(crop=3, flip=True)
    params = augmentation.make_params(64, seed=1, epoch=2)
    expected = torch.zeros_like(images)
    for i, (y, x, flip) in enumerate(params.tolist()):
        for row in range(12):
            for column in range(14):
                from_row = row + int(y * 7) - 3
                from_column = (13 - column if flip < 0.5 else column) + int(x * 7) - 3
                if 0 <= from_row < 12 and 0 <= from_column < 14:
                    expected[i, :, row, column] = images[i, :, from_row, from_column]
    assert torch.equal(augmentation.of_pixels(images, params), expected)
    assert 0.3 < (params[:, 2] < 0.5).float().mean() < 0.7


def test_erased_rectangles_are_of_torchvision_s_sizes():
    augmentation = Augmentation(erase=0.25)
    params = augmentation.make_params(20_000, seed=0, epoch=1)
    out, weight = augmentation.of_normalized(torch.ones(20_000, 1, 28, 28), params)
    erased = (out == 0)[:, 0]
    assert weight is None and 0.24 < erased.any(2).any(1).float().mean() < 0.26
    erased = erased[erased.any(2).any(1)]
    heights, widths = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(heights * widths, erased.sum((1, 2)))  # they are rectangles
    areas = erased.float().mean((1, 2))
    assert 0.01 < areas.min() < 0.04 and 0.30 < areas.max() < 0.35
    assert 0.16 < areas.mean() < 0.19
    everywhere = erased.float().mean(0)
    assert everywhere.min() > 0.002 and everywhere[14, 14] > everywhere[0, 0]


def test_the_label_weight_is_that_of_the_pixels():
    augmentation = Augmentation(cutmix=1.0)
    params = augmentation.make_params(500, seed=0, epoch=1)
    ones = torch.zeros(500, 2, 10, 12)
    ones[::2] = 1.0  # image i is 1 and its partner i - 1 is 0, or the other way round
    out, weight = augmentation.of_normalized(ones, params)
    own = torch.where(torch.arange(500) % 2 == 0, out.mean((1, 2, 3)), 1 - out.mean((1, 2, 3)))
    torch.testing.assert_close(own, weight)
    assert ((out == 0) | (out == 1)).all()
    assert 0.3 < weight.mean() < 0.8 and weight.min() >= 0 and weight.max() <= 1


def test_cut_rectangles_have_their_area_unless_the_border_cuts_them():
    u = torch.rand(2000, 3)
    cut = augment.cut(32, 32, u).float().mean((1, 2))
    assert ((1 - u[:, 0]) - cut > -1e-6).all() and ((1 - u[:, 0]) - cut).abs().median() < 0.2
    u[:, 1:] = 0.5
    assert ((1 - u[:, 0]) - augment.cut(32, 32, u).float().mean((1, 2))).abs().max() < 0.07


def test_random_parameters_are_fixed_by_seed_and_epoch():
    everything = Augmentation(4, True, 2, 0.25, 0.2)
    params = everything.make_params(100, seed=3, epoch=5)
    assert params.shape == (100, 2 + 1 + 4 + 5 + 3)
    assert torch.equal(params, everything.make_params(100, seed=3, epoch=5))
    assert not torch.equal(params, everything.make_params(100, seed=3, epoch=6))
    assert not torch.equal(params, everything.make_params(100, seed=4, epoch=5))
    assert params.min() >= 0 and params.max() <= 1
    weights = everything.make_params(50_000, 0, 1)[:, -3].double().numpy()
    assert np.var(weights) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.02)  # Beta(0.2, 0.2)
    assert Augmentation().make_params(100, 0, 1).shape == (100, 0)


def test_nothing_is_done_by_none():
    images, nothing = some_images(), Augmentation()
    params = nothing.make_params(64, 0, 1)
    assert torch.equal(nothing.of_pixels(images, params), images)
    assert nothing.of_normalized(images.float(), params)[1] is None


def test_it_is_one_graph_without_breaks():
    everything = Augmentation(4, True, 2, 0.25, 0.2)
    images, params = some_images(), everything.make_params(64, 0, 1)

    def function(images, params):
        return everything.of_normalized(everything.of_pixels(images, params).float(), params)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(images, params), function(images, params)):
        torch.testing.assert_close(ours, theirs)
