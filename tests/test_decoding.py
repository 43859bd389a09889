"""Image files: what a viewer shows is what the net gets; and where the decoded images are kept."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import data
from kit import decoding
from kit.command_line import UserError

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image, ImageOps
from test_image_folder import in_a_folder_of_its_own, make  # noqa: F401

GREY = np.arange(12 * 8, dtype=np.uint8).reshape(8, 12)
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
CLEAR = np.arange(12) < 5  # columns that are transparent


def read(tmp_path, image, name, **how):
    """(C, H, W) of `image` as a data set has it, once saved under `name`; all are the same."""
    for i, of_class in enumerate(("a", "b")):
        for j in (0, 1):
            path = tmp_path / "set" / of_class / f"{i}{j}{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **how)
    dataset = data.load_dataset(str(tmp_path / "set"))
    (shown,) = torch.cat([dataset.train_images, dataset.test_images]).unique(dim=0)
    return shown.numpy()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".webp", ".tif", ".jpg", ".avif"])
def test_orientation_is_that_of_a_viewer(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.kron(GREY > 40, np.full((8, 8), 255)).astype(np.uint8)  # no 8x8 block is mixed
    lossless = {} if ending in (".png", ".tif") else {"quality": 95}
    lossless |= {"lossless": True} if ending == ".webp" else {}
    shown = read(tmp_path, Image.fromarray(upright), ending, exif=exif.tobytes(), **lossless)
    turned = Image.new("L", (96, 64))
    turned.putdata(list(upright.flatten()))
    turned.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned))
    assert expected.shape == ((96, 64) if orientation > 4 else (64, 96))
    assert shown.shape == (1, *expected.shape)
    assert abs(shown[0].astype(int) - expected).max() < 30


def test_orientations_in_turn_are_of_one_size(tmp_path, capsys):
    folder = make(tmp_path / "phone", {"a": 4, "b": 4}, size=(12, 8))
    for path in sorted(folder.rglob("*.png"))[::2]:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).rotate(90, expand=True).save(path, exif=exif)
    assert data.load_dataset(str(folder)).train_images.shape[2:] == (8, 12)
    assert "scaled" not in capsys.readouterr().err


def with_transparency(mode):
    """(a picture, how to save it): its left columns are transparent, and black or red beneath."""
    alpha = Image.fromarray(np.where(CLEAR, 0, 255).astype(np.uint8)[None].repeat(8, 0))
    grey, colour = GREY + 1, COLOUR | 1
    grey[:, CLEAR], colour[:, CLEAR] = 0, (200, 0, 0)
    image = Image.fromarray(grey if "L" in mode else colour)
    if mode in ("LA", "RGBA"):
        image.putalpha(alpha)
        return image, {}
    if mode == "P":  # one entry of the palette
        image = Image.fromarray(grey).convert("P")
        return image, {"transparency": 0}
    if mode == "P, bytes":  # every entry has an alpha of its own
        return Image.fromarray(grey).convert("P"), {"transparency": bytes([0] + [255] * 255)}
    return image, {"transparency": 0 if mode == "L" else (200, 0, 0)}


@pytest.mark.parametrize(
    ("mode", "ending"),
    [(mode, ".png") for mode in ("LA", "RGBA", "P", "P, bytes", "L", "RGB")]
    + [("RGBA", ".webp"), ("RGBA", ".tif"), ("P", ".gif"), ("RGBA", ".ico"), ("LA", ".tif")],
)
def test_transparent_pixels_are_white(tmp_path, mode, ending):
    image, how = with_transparency(mode)
    if ending == ".webp":
        how = {"lossless": True}
    if ending == ".ico":
        how = {"sizes": [image.size]}
    shown = read(tmp_path, image, ending, **how)
    assert (shown[:, :, CLEAR] == 255).all()
    expected = np.atleast_3d(image.convert("L" if len(shown) == 1 else "RGB")).transpose(2, 0, 1)
    assert np.array_equal(shown[:, :, ~CLEAR], expected[:, :, ~CLEAR])


@pytest.mark.parametrize("ending", [".tga", ".png"])
def test_alpha_that_is_0_everywhere(tmp_path, ending):
    """In a TGA it is a byte that is not used; a PNG is transparent."""
    clear = Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)]))
    shown, colour = read(tmp_path, clear, ending), COLOUR.transpose(2, 0, 1)
    assert np.array_equal(shown, colour) if ending == ".tga" else shown.min() > 254


def tiff(bits, photometric, data):
    """A TIFF of 4 x 1 pixels, as Pillow does not write them."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1,
            279: len(data)}  # fmt: skip
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + fields + bytes(4)


@pytest.mark.parametrize(
    ("bits", "photometric", "data"),
    [
        (8, 0, bytes([0, 64, 128, 255])),  # 0: white is zero
        (8, 1, bytes([0, 64, 128, 255])),
        (12, 1, bytes([0x00, 0x04, 0x00, 0x80, 0x0F, 0xFF])),  # 0, 1024, 2048, 4095
        (16, 0, np.array([0, 16384, 32768, 65535], "<u2").tobytes()),
        (16, 1, np.array([0, 16384, 32768, 65535], "<u2").tobytes()),
    ],
    ids=str,
)
def test_tiffs_of_any_depth_and_polarity(tmp_path, bits, photometric, data):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(bits, photometric, data))
    images, _ = decoding.decode(tmp_path, [path], None)
    expected = np.array([0, 64, 128, 255])
    assert abs(images.ravel() - (expected if photometric else 255 - expected)).max() <= 1


def test_a_damaged_png_is_found_by_its_checksums(tmp_path):
    """Pillow decodes most of these to other pixels."""
    path, smooth = tmp_path / "a.png", np.add.outer(np.arange(64), 2 * np.arange(64))
    Image.fromarray(smooth.astype(np.uint8)).save(path)
    whole = path.read_bytes()
    at = whole.index(b"IDAT") + 4
    for place in np.random.default_rng(0).integers(at, len(whole) - 16, 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="1 images cannot be read"):
            decoding.decode(tmp_path, [path], None)


def test_sides_that_are_cropped_away_are_said(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i, size in enumerate([(8, 8), (32, 8), (8, 8)]):
            Image.new("L", size, i).save(tmp_path / f"set/{name}/{i}.png")
    data.load_dataset(str(tmp_path / "set"), image_size=8)
    assert "not square, cropped in the middle: 2 (a/1.png, b/1.png)" in capsys.readouterr().err


def test_half_transparent_is_half_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    assert abs(read(tmp_path, image, ".png")[:, 0, 0].astype(int) - (227, 177, 127)).max() <= 1


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.fromarray(GREY > 40), ".png", 255 * (GREY > 40)),
        (Image.fromarray(GREY > 40), ".tif", 255 * (GREY > 40)),
        (Image.fromarray(GREY).convert("P"), ".gif", GREY),
        (Image.fromarray(GREY).convert("P"), ".png", GREY),
        (Image.fromarray(GREY).convert("RGB"), ".png", GREY),  # grey, whatever its mode
        (Image.fromarray(GREY).convert("RGB"), ".bmp", GREY),
        (Image.fromarray(COLOUR), ".ppm", COLOUR),
        (Image.fromarray(COLOUR).convert("CMYK"), ".tif", COLOUR),
        (Image.fromarray(COLOUR).convert("RGBX"), ".tif", COLOUR),
        (Image.fromarray(COLOUR), ".tga", COLOUR),
        (Image.fromarray(256 * GREY.astype(np.uint16) + 200), ".png", GREY),
        (Image.fromarray(256 * GREY.astype(np.uint16) + 200), ".tif", GREY),
        (Image.fromarray(256 * GREY.astype(np.uint16) + 200), ".pgm", GREY),
        (Image.fromarray(256 * GREY.astype(np.uint16) + 200), ".jp2", GREY),
    ],
)  # fmt: skip
def test_every_mode_as_a_viewer_shows_it(tmp_path, capsys, image, name, expected):
    shown = read(tmp_path, image, name)
    assert np.array_equal(shown, np.atleast_3d(expected).transpose(2, 0, 1))
    assert ("upper 8 of 16 bits: 4" in capsys.readouterr().err) == (image.mode == "I;16")


@pytest.mark.parametrize(("mode", "name"), [("CMYK", ".jpg"), ("YCbCr", ".jpg"), ("LAB", ".tif")])
def test_other_colours_become_rgb(tmp_path, mode, name):
    smooth = Image.new("RGB", (16, 16), (180, 90, 40))
    how = {"quality": 95} if name == ".jpg" else {}
    shown = read(tmp_path, smooth.convert(mode), name, **how)
    assert abs(shown[:, 8, 8].astype(int) - (180, 90, 40)).max() <= 4


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_what_has_no_one_look_is_refused_by_name(tmp_path, kind):
    image = Image.fromarray((GREY * 1000.0).astype(kind))
    with pytest.raises(UserError, match=r"cannot be read.*00\.tif \(mode [IF], more than 16 bits"):
        read(tmp_path, image, ".tif")


@pytest.mark.parametrize("ending", [".gif", ".tif", ".webp", ".png"])
def test_the_first_frame_counts_and_the_others_are_said(tmp_path, capsys, ending):
    frames = [Image.fromarray(np.full((8, 12), value, np.uint8)) for value in (90, 0, 255)]
    how = {"lossless": True} if ending == ".webp" else {}
    shown = read(tmp_path, frames[0], ending, save_all=True, append_images=frames[1:], **how)
    assert (shown == 90).all()
    assert f"first frame only: 4 (a/00{ending}" in capsys.readouterr().err
    data.load_dataset(str(tmp_path / "set"))  # as it is kept
    assert "first frame only: 4" in capsys.readouterr().err


def test_a_damaged_exif_counts_as_none(tmp_path):
    for exif in (b"Exif\0\0rubbish", b"rubbish"):
        shown = read(tmp_path, Image.fromarray(GREY), ".png", exif=exif)
        assert np.array_equal(shown[0], GREY)


# --- Other sizes than most ------------------------------------------------------------------------


def test_few_of_another_size_are_counted_and_named(tmp_path, capsys):
    folder = make(tmp_path / "odd", {"a": 15, "b": 15}, size=(12, 8))
    for name, size in (("a/a003", (13, 8)), ("b/b001", (24, 16))):
        Image.open(folder / f"{name}.png").resize(size).save(folder / f"{name}.png")
    assert data.load_dataset(str(folder)).train_images.shape[2:] == (8, 12)
    said = capsys.readouterr().err
    assert "another size, scaled and cropped to 12 x 8: 2 (a/a003.png, b/b001.png)" in said
    make(folder, {"a": 8}, size=(9, 9))  # less than three of four
    assert data.load_dataset(str(folder)).train_images.shape[2:] == (64, 64)
    assert "another size, scaled and cropped to 64 x 64: 30 (" in capsys.readouterr().err
    assert data.load_dataset(str(folder), image_size=10).train_images.shape[2:] == (10, 10)
    assert "scaled" not in capsys.readouterr().err


# --- What is kept ---------------------------------------------------------------------------------


def kept():
    return sorted(path.name for path in Path("data", ".decoded").iterdir())


def test_two_sizes_lie_side_by_side_and_nothing_in_the_folder(tmp_path, monkeypatch):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4})
    before = sorted(folder.rglob("*"))
    read = {size: data.load_dataset(str(folder), image_size=size) for size in (6, 5, None)}
    assert sorted(folder.rglob("*")) == before
    assert len(kept()) == 3 and all(f"pillow{Image.__version__}" in name for name in kept())
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", None)
        for size, first in read.items():
            again = data.load_dataset(str(folder), image_size=size)
            assert torch.equal(again.train_images, first.train_images)
    monkeypatch.setattr(decoding, "VERSION", "another")
    data.load_dataset(str(folder))
    assert len(kept()) == 3 and sum(name.endswith("-another.npz") for name in kept()) == 1


def test_what_is_kept_but_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4}, size=(100, 100))
    data.load_dataset(str(folder))
    monkeypatch.setattr(decoding, "available_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r"0.2 MB of 0.1 MB free"):
        data.load_dataset(str(folder))


def test_a_data_dir_that_cannot_be_written_costs_one_note(tmp_path, capsys):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4})
    (tmp_path / "data").write_text("a file")  # as root may write into any folder
    data.load_dataset(str(folder))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("note: decoded images cannot be kept")


def test_a_killed_writer_leaves_nothing_that_stays(tmp_path):
    folder = make(tmp_path / "pets", {"cat": 4, "dog": 4})
    code = f"""
import os, signal, data
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
data.load_dataset({str(folder)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPO)}, timeout=60
    )
    assert done.returncode == -signal.SIGKILL and len(kept()) == 1
    data.load_dataset(str(folder))
    (name,) = kept()
    assert name.endswith(".npz")
