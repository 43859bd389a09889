"""Folders as people bring them: which are parts, which are classes, and what is left out."""

import itertools
import os
import re
import shutil
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import data
import train
from kit import image_folder, tensorboard_log
from kit.command_line import UserError

import numpy as np
import pytest
import torch
from conftest import is_one_line, settings_of
from PIL import Image
from test_image_folder import in_a_folder_of_its_own, make  # noqa: F401

FLAGS = ["--model", "baseline", "--width", "16", "--epochs", "1", "--device", "cpu"]


def note(capsys):
    """The one line that says what was left out, or nothing."""
    lines = capsys.readouterr().err.splitlines()
    notes = [line for line in lines if not line.startswith("decoding ")]
    assert len(notes) <= 1
    return notes[0] if notes else ""


# --- Parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to_train", "to_test"),
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("Train", "TEST"),
        ("TRAIN", "Validation"),
        ("train", "valid"),
        ("train", "dev"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("training_set/training_set", "test_set/test_set"),
        ("train-images", "val-images"),
        ("TrainData", "TestData"),
        ("animals/train", "animals/test"),
        ("archive/animals/train/images", "archive/animals/test/images"),
        ("1_train", "2_test"),
        ("imgs train", "imgs test"),
        ("imagesTrain", "imagesTest"),
    ],
)
def test_parts_are_known_by_their_names(tmp_path, capsys, to_train, to_test):
    folder = tmp_path / "set"
    make(folder / to_train, {"cat": 6, "dog": 4})
    make(folder / to_test, {"cat": 3, "dog": 2}, seed=1)
    read = data.load_dataset(str(folder))
    assert read.classes == ["cat", "dog"]
    assert read.train_labels.bincount().tolist() == [6, 4]
    assert read.test_labels.bincount().tolist() == [3, 2]
    assert "cat 6 + 3, dog 4 + 2" in read.source and note(capsys) == ""
    for part in (to_train, to_test):
        assert os.path.basename(part) in read.source or "images" in part


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("train/cat", "train/dog"), "set: among train there"),
        (("train/cat", "train/dog", "prueba/cat", "prueba/dog"), "among prueba, train there"),
        (("test/cat", "test/dog", "entrenamiento/cat", "entrenamiento/dog"), "entrenamiento, test"),
        (("train/cat", "train/dog", "cat", "dog"), "one to test (test or val)"),
        (("train/cat", "train/dog", "test"), "each with a folder of images for each class"),
        (("train", "test"), "among test, train there"),
        (("Training", "Testing"), "among Testing, Training there"),
        (("training_set", "test_set"), "among test_set, training_set there"),
        (("trainA", "trainB", "testA", "testB"), "among testA, testB, trainA, trainB there"),
        (("train/train", "test1/test1"), "among test1, train there"),
        (("train", "validation", "cat"), "among cat, train, validation there"),
        (("train_1/cat", "train_1/dog", "train_2/cat", "train_2/dog", "test/cat", "test/dog"),
         "train_1, train_2: which one"),
    ],
)  # fmt: skip
def test_parts_that_lack_their_like_are_refused_by_name(tmp_path, capsys, parts, words):
    for part in parts:
        make(tmp_path / "set" / part, {".": 3})
    assert data.main(["--dataset", str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and words in error


@pytest.mark.parametrize(
    ("extra", "left"),
    [
        ({"val": "dog", "test": "dog"}, "folder beside the parts: 1 (val)"),
        ({"test": "dog", "annotations": "xml"}, "folder beside the parts: 1 (annotations)"),
        ({"val": "dog", "test": "."}, "folder beside the parts: 1 (test)"),  # without labels
        ({"test": "dog", "train_old": "dog"}, "folder beside the parts: 1 (train_old)"),
    ],
)
def test_folders_beside_the_parts_are_named(tmp_path, capsys, extra, left):
    folder = tmp_path / "set"
    make(folder / "train", {"cat": 4, "dog": 4})
    for i, (name, what) in enumerate(extra.items()):
        counts = {"cat": 3, "dog": 3} if what == "dog" else {what: 3}
        make(folder / name, counts, seed=i + 1)
    read = data.load_dataset(str(folder))
    assert len(read.train_labels) == 8 and len(read.test_labels) == 6
    assert left in note(capsys)


# --- Names ----------------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "names",
    [
        ["bus", "train"],
        ["test", "train_station", "bus"],
        ["val", "dog"],
        ["valid", "invalid"],
        ["猫", "犬"],
        ["हिन्दी", "עברית"],
        ["👩\u200d🚀", "نمی\u200cدانم"],  # noqa: RUF001
        ["a\u3000b", "a\u00a0b"],
        ["a|b", "<b>", "$x$", "-x", "a  b", "#1", "%s", "{}"],
        [NFC, "the"],
    ],
)
def test_names_of_classes_are_text(tmp_path, names):
    folder = make(tmp_path / "set", dict.fromkeys(names, 6))
    read = data.load_dataset(str(folder))
    assert read.classes == sorted(names)
    assert read.train_labels.bincount().tolist() == [5] * len(names)


def test_classes_may_be_called_train_and_hold_folders(tmp_path):
    make(tmp_path / "set" / "train", {"steam": 6, "diesel": 6})
    make(tmp_path / "set" / "bus", {"city": 12}, seed=1)
    assert data.load_dataset(str(tmp_path / "set")).classes == ["bus", "train"]


def test_two_forms_of_one_name_are_one_class(tmp_path):
    assert NFC != NFD
    make(tmp_path / "a" / "train", {NFC: 4, "dog": 4})
    make(tmp_path / "a" / "test", {NFD: 2, "dog": 2}, seed=1)
    assert data.load_dataset(str(tmp_path / "a")).classes == [NFC, "dog"]
    make(tmp_path / "b", {NFC: 6, NFD: 6, "dog": 6})
    read = data.load_dataset(str(tmp_path / "b"))
    assert read.classes == [NFC, "dog"]
    assert (read.train_labels.bincount() + read.test_labels.bincount()).tolist() == [12, 6]


def test_a_link_goes_by_its_own_name(tmp_path):
    make(tmp_path / "elsewhere", {"n02123045": 6, "n02099601": 6})
    (tmp_path / "set").mkdir()
    for name, target in (("cat", "n02123045"), ("dog", "n02099601")):
        os.symlink(tmp_path / "elsewhere" / target, tmp_path / "set" / name)
    assert data.load_dataset(str(tmp_path / "set")).classes == ["cat", "dog"]
    os.symlink(tmp_path / "set", tmp_path / "link to the set")
    with pytest.raises(UserError, match="needs a folder of images"):  # the set is not wrapped
        data.load_dataset(str(make(tmp_path / "one", {"cat": 4})))


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x1b[1mb", "a\u2028b", os.fsdecode(b"a\xff")])
def test_a_class_that_cannot_be_shown_is_refused(tmp_path, capsys, name):
    make(tmp_path / "set", {"cat": 4, name: 4})
    assert data.main(["--dataset", str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "control character, or bytes that are not UTF-8" in error


@pytest.mark.parametrize("name", ["花", "Blüten", unicodedata.normalize("NFD", "Blüten"), "हिन्दी"])
def test_a_data_set_may_have_any_letters(tmp_path, capsys, name):
    folder = make(tmp_path / name, {"cat": 20, "dog": 20}, size=(12, 12))
    assert train.main([*FLAGS, "--dataset", str(folder), "--runs", str(tmp_path / "runs")]) == 0
    (result,) = (tmp_path / "runs").rglob("result.json")
    assert result.parents[3].name == name
    capsys.readouterr()
    assert train.main([*FLAGS, "--dataset", str(folder), "--runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.startswith("already complete")


@pytest.mark.parametrize("name", ["two words", "a$b", "a'b", "-a", ".a"])
def test_a_data_set_s_name_is_refused_with_what_names_may_have(tmp_path, capsys, name):
    make(tmp_path / name, {"cat": 4, "dog": 4})
    with pytest.raises(SystemExit, match="2"):
        data.main(["--dataset", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert is_one_line(error) and f"{name}: rename it: names have letters, digits and" in error


def test_a_path_that_leads_nowhere_is_one_line(tmp_path, capsys):
    os.symlink("loop", tmp_path / "loop")
    assert data.main(["--dataset", str(tmp_path / "loop")]) == 1
    assert is_one_line(error := capsys.readouterr().err) and "is no folder" in error
    for path in ("/", "a\0b/c"):
        with pytest.raises(SystemExit, match="2"):
            data.main(["--dataset", path])
        assert is_one_line(capsys.readouterr().err)


# --- What is read, and what is left out -----------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        (".jfif", "JPEG"), (".jpe", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"),
        (".JPG", "JPEG"), (".Png", "PNG"), ("", "PNG"), ("", "WEBP"), ("", "BMP"),
        (".tga", "TGA"), (".pcx", "PCX"), (".dib", "DIB"), (".qoi", "QOI"), (".mpo", "MPO"),
        (".png", "GIF"),
    ],
)  # fmt: skip
def test_whatever_pillow_reads_is_read(tmp_path, capsys, ending, form):
    folder = make(tmp_path / "set", {"a": 4, "b": 4}, size=(16, 16))
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path).convert("RGB")
        path.unlink()
        image.save(path.with_suffix(ending), form)
    read = data.load_dataset(str(folder))
    assert len(read.train_images) + len(read.test_images) == 8
    assert note(capsys) == ""


HIDDEN = [".ipynb_checkpoints/a.png", ".DS_Store", "._a.png", "__MACOSX/a.png", "Thumbs.db"]


@pytest.mark.parametrize("where", ["", "cat", "cat/deep/er"])
@pytest.mark.parametrize(
    "name", [*HIDDEN, ".git/a.png", "@eaDir/a.png", "desktop.ini", "#recycle/a.png"]
)
def test_nothing_hidden_is_read(tmp_path, capsys, where, name):
    folder = make(tmp_path / "set", {"cat": 6, "dog": 6})
    make(folder / "cat" / "deep", {"er": 1}, seed=1)
    before = data.load_dataset(str(folder)).digest
    path = folder / where / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "cat" / "cat000.png", path)
    capsys.readouterr()
    assert data.load_dataset(str(folder)).digest == before
    shown = os.path.join(where, name.split("/")[0])
    assert f"left out: hidden: 1 ({shown})" in note(capsys)


def leave_something(folder):
    """In every class: what is neither read nor a class."""
    for name in ("cat", "dog"):
        (folder / name / "labels.txt").write_text("no image")
        (folder / name / "README").write_text("no image, and no ending")
        (folder / name / "paper.pdf").write_text("Pillow writes it, but cannot read it")
        os.symlink("/nowhere/else.png", folder / name / "dangling.png")
        os.symlink("loop.png", folder / name / "loop.png")
        os.symlink(folder, folder / name / "up")
        os.symlink(".", folder / name / "here")
    (folder / "list.csv").write_text("beside the classes")
    (folder / "docs").mkdir()
    (folder / "docs" / "notes.txt").write_text("a folder that is no class")


def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path, capsys):
    folder = make(tmp_path / "set", {"cat": 6, "dog": 6})
    before = data.load_dataset(str(folder)).digest
    assert note(capsys) == ""
    leave_something(folder)
    for _ in range(2):  # when it is decoded, and as it is kept
        assert data.load_dataset(str(folder)).digest == before
        said = note(capsys)
        assert "ending not read: 7 (cat/README, cat/labels.txt" in said
        assert "link to nothing, or no file: 4 (cat/dangling.png, cat/loop.png, dog/d" in said
        assert "circular link: 4 (cat/here, cat/up, dog/here, ...)" in said
        assert "file beside the folders: 1 (list.csv)" in said
        assert "folder without images: 1 (docs)" in said


def test_the_data_dir_may_be_in_the_folder(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / "set", {"cat": 6, "dog": 6})
    monkeypatch.chdir(folder)
    before = data.load_dataset(str(folder)).digest
    for where, said in (
        ("data", "data folder: 1 (data)"),
        (".", "data folder: 1 (data); hidden: 1 (.decoded)"),
    ):
        for _ in range(2):
            assert data.load_dataset(str(folder), where).digest == before
        assert said in capsys.readouterr().err


def test_links_that_lead_into_each_other_end(tmp_path, capsys):
    folder = make(tmp_path / "set", {"cat": 6, "dog": 6})
    os.symlink(folder / "dog", folder / "cat" / "to_dog")
    os.symlink(folder / "cat", folder / "dog" / "to_cat")
    read = data.load_dataset(str(folder))
    assert len(read.train_images) + len(read.test_images) == 24
    assert "circular link: 2 (cat/to_dog/to_cat, dog/to_cat/to_dog)" in capsys.readouterr().err


@pytest.mark.parametrize("file", [None, "a.heic", ".DS_Store", "drawing.svg"])
def test_a_class_without_images_that_can_be_read_is_refused(tmp_path, capsys, file):
    folder = make(tmp_path / "set", {"cat": 6, "dog": 6, "bird": 0})
    if file:
        (folder / "bird" / file).write_bytes(b"something")
    assert data.main(["--dataset", str(folder)]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "bird has no images that Pillow reads" in error


def test_classes_of_files_that_pillow_does_not_read_are_no_missing_classes(tmp_path, capsys):
    folder = make(tmp_path / "set", {"cat": 0, "dog": 0})
    for name in ("cat", "dog"):
        (folder / name / "1.dcm").write_bytes(b"something")
    assert data.main(["--dataset", str(folder)]) == 1
    error = capsys.readouterr().err
    assert is_one_line(error) and "Pillow does not read 2 of its files" in error


def test_the_first_lines_of_both_scripts_say_what_was_found(tmp_path, capsys):
    names = [f"class{i:02d}" for i in range(13)]
    make(tmp_path / "set" / "Training", dict.fromkeys(names, 4), size=(12, 12))
    make(tmp_path / "set" / "valid", dict.fromkeys(names, 2), size=(12, 12), seed=1)
    assert data.main(["--dataset", str(tmp_path / "set")]) == 0
    said = [capsys.readouterr().out]
    assert train.main([*FLAGS, "--dataset", str(tmp_path / "set"), "--dry-run"]) == 0
    said.append(capsys.readouterr().out)
    for text in said:
        assert "training set Training, test set valid" in text
        assert ", ".join(f"{name} 4 + 2" for name in names[:10]) + ", and 3 more" in text


# --- What is taken for an image or a class, and is none -------------------------------------------


def mask(path, size):
    """White on black, like a segmentation mask; of a healthy organ it is all black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], np.uint8)
    if "normal" not in path.name:
        pixels[20:50, 20:60] = 255
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("image", "its_mask"),
    [
        ("{c}/images/{i}.png", "{c}/masks/{i}.png"),
        ("{c}/scan/{i}.png", "{c}/annotation/{i}_gt.png"),
        ("{c}/{c} ({i}).png", "{c}/{c} ({i})_mask.png"),
        ("{c}/{c} ({i}).png", "{c}/{c} ({i})_mask_1.png"),
        ("{c}/{i}.png", "{c}/mask_{i}.png"),
        ("{c}/{i}.png", "{c}/masks/{i}.png"),
        ("{c}/image_{i}.png", "{c}/mask_{i}.png"),
        ("{c}/images/image_{i}.png", "{c}/masks/mask_{i}.png"),
        ("{c}/x{i}.bmp", "{c}/x{i}.png"),
        ("{c}/x{i}.png", "{c}/x{i}.bmp"),
        ("train/{c}/p{i}/slice.png", "train/{c}/p{i}/slice_seg.png"),
    ],
)
def test_masks_are_no_images(tmp_path, capsys, image, its_mask):
    generator, folder = np.random.default_rng(0), tmp_path / "scans"
    for c in ("normal", "tumour"):
        for i in range(8):
            path = folder / image.format(c=c, i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (90 + i % 2 * 40, 70 + i % 2 * 40) if "mask" in its_mask else (80, 80)
            Image.fromarray(generator.integers(0, 255, size[::-1], np.uint8)).save(path)
            mask(folder / its_mask.format(c=c, i=i), size)
    if "train" in image:
        make(folder / "test", {"normal": 2, "tumour": 2}, size=(80, 80), seed=1)
    read = data.load_dataset(str(folder))
    assert len(read.train_images) + len(read.test_images) == 16 + 4 * ("train" in image)
    error = capsys.readouterr().err
    assert "left out: mask of the image beside it: 16 (" in error
    assert "are called like another" not in error  # nor are their images variants of the masks


@pytest.mark.parametrize(
    "other", ["{c}/{i}_flip.png", "{c}/{i}.tif", "{c}/two/{i}.png", "{c}/{i} (1).png"]
)
@pytest.mark.parametrize("tones", [2, 200])
def test_copies_and_drawings_are_no_masks(tmp_path, capsys, other, tones):
    generator = np.random.default_rng(0)
    for c in ("a", "b"):
        for i in range(8):
            for name in ("{c}/one/{i}.png" if "two" in other else "{c}/{i}.png", other):
                path = tmp_path / "set" / name.format(c=c, i=i)
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, tones, (8, 8), np.uint8) * (255 // (tones - 1))
                Image.fromarray(pixels).save(path)
    read = data.load_dataset(str(tmp_path / "set"))
    assert len(read.train_images) + len(read.test_images) == 32
    error = capsys.readouterr().err
    assert "mask" not in error
    # Variants by their names: which of them are one image's nobody can know, but it is said.
    first = other.format(c="a", i=0)
    expected = "flip" in other or "tif" in other
    assert (f"16 images ({first}, ...) are called like another" in error) == expected


@pytest.mark.parametrize(
    ("image", "its_mask", "doubtful"),
    [("{c}/{c}{i}.png", "masks/{c}{i}.png", ["masks"]),
     ("{c}/{i}.png", "{c}_mask/{i}.png", ["normal_mask", "tumour_mask"])],
)  # fmt: skip
def test_a_class_that_may_be_masks_is_named(tmp_path, capsys, image, its_mask, doubtful):
    generator = np.random.default_rng(0)
    for c in ("normal", "tumour"):
        for i in range(8):
            path = tmp_path / "set" / image.format(c=c, i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (80, 80), np.uint8)).save(path)
            mask(tmp_path / "set" / its_mask.format(c=c, i=i), (80, 80))
    data.load_dataset(str(tmp_path / "set"))
    error = capsys.readouterr().err
    assert re.findall("note: class (.*): its images have two tones", error) == doubtful


def test_few_images_with_masks_are_divided_without_them(tmp_path):
    """The sixth that is tested would be a mask in some classes."""
    generator = np.random.default_rng(0)
    for c in "abcdefgh":
        for i in range(3):
            path = tmp_path / "set" / c / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (80, 80), np.uint8)).save(path)
            mask(path.with_name(f"{i}_mask.png"), (80, 80))
    read = data.load_dataset(str(tmp_path / "set"))
    assert read.train_labels.bincount().tolist() == [2] * 8
    assert read.test_labels.bincount().tolist() == [1] * 8


def test_frames_of_many_videos_take_linear_time():
    """They share their names: to compare all with all took minutes."""

    def seconds(videos):
        names = itertools.product("ab", range(videos), (1, 2))
        paths = [Path(f"/set/{c}/video{k}/{i}.png") for c, k, i in names]
        images = np.zeros((len(paths), 1, 4, 4), np.uint8)  # of two tones: partners are looked at
        labelled, taken = {path: path.parts[2] for path in paths}, []
        for _ in range(3):
            start = time.perf_counter()
            assert image_folder.masks_and_variants(labelled, images) == (set(), set())
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert seconds(800) < 30 * seconds(80)  # a hundred times, if it were quadratic


@pytest.mark.parametrize("where", ["set", "copy/of/it"])
def test_a_copy_of_the_whole_set_inside_it_is_no_class(tmp_path, capsys, where):
    folder = make(tmp_path / "set", {"rose": 8, "tulip": 8})
    shutil.copytree(folder, tmp_path / "again")
    shutil.move(tmp_path / "again", folder / where)
    read = data.load_dataset(str(folder))
    assert read.classes == ["rose", "tulip"]
    assert f"copy of the folder around it: 1 ({where.split('/')[0]})" in capsys.readouterr().err


def test_folders_that_may_be_folds_are_named(tmp_path, capsys):
    for i in range(3):
        make(tmp_path / "set" / f"fold{i}", {"cat": 4, "dog": 4}, seed=i)
    data.load_dataset(str(tmp_path / "set"))
    assert "note: fold0, fold1, fold2 all hold cat, dog: if those are" in capsys.readouterr().err
    make(tmp_path / "set" / "fold0", {"owl": 4}, seed=9)
    data.load_dataset(str(tmp_path / "set"))
    assert "note: fold0, fold1, fold2 all hold cat, dog: if those are" in capsys.readouterr().err
    fold = tmp_path / "set" / "fold0"
    shutil.copy(fold / "cat/cat000.png", fold / "x.png")  # an image of its own: a class
    data.load_dataset(str(tmp_path / "set"))
    assert "all hold" not in capsys.readouterr().err


def test_copies_across_the_validation_split_are_counted(tmp_path, capsys):
    folder = make(tmp_path / "set" / "train", {"cat": 20, "dog": 20}, size=(12, 12))
    make(tmp_path / "set" / "test", {"cat": 4, "dog": 4}, size=(12, 12), seed=1)

    def said(*flags):
        settings = settings_of("--model", "se", "--dataset", str(tmp_path / "set"), *flags)
        capsys.readouterr()
        data.Loader(data.load_dataset(settings.dataset), settings, torch.device("cpu"))
        return capsys.readouterr().err

    assert "validation images" not in said()
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, path.with_name(f"{path.stem}_1.png"))
    assert " of 8 validation images are also training images (identi" in said()
    # Only images that are used count.
    few = said("--limit-train", "40", "--batch-size", "2")
    assert "4 of 4 validation images are also training images" in few


def test_copies_with_another_label_inflate_nothing(tmp_path, capsys):
    folder = make(tmp_path / "set" / "train", {"cat": 20, "dog": 20}, size=(12, 12))
    make(tmp_path / "set" / "test", {"cat": 4, "dog": 4}, size=(12, 12), seed=1)
    shutil.copy(folder / "cat/cat000.png", tmp_path / "set/test/dog/x.png")
    data.load_dataset(str(tmp_path / "set"))
    error = capsys.readouterr().err
    assert "inflated" not in error and "2 images have two labels" in error


def test_images_with_two_labels_and_rare_classes_are_named(tmp_path, capsys):
    folder = make(tmp_path / "set" / "train", {"cat": 30, "dog": 30, "owl": 1}, size=(12, 12))
    make(tmp_path / "set" / "test", {"cat": 4, "dog": 4, "owl": 1}, size=(12, 12), seed=1)
    shutil.copy(folder / "cat/cat000.png", folder / "dog/x.png")
    shutil.copy(folder / "cat/cat000.png", folder / "cat/y.png")
    shutil.copy(folder / "cat/cat001.png", folder.parent / "test/owl/z.png")
    assert train.main([*FLAGS, "--dataset", str(tmp_path / "set"), "--dry-run"]) == 0
    error = capsys.readouterr().err
    assert "note: 5 images have two labels (identical pixels, another class)" in error
    assert " image of owl (1 classes)" in error


# --- A part of a data set -------------------------------------------------------------------------


def test_a_part_of_the_test_set_has_every_class_for_every_seed(tmp_path):
    folder = tmp_path / "pets"
    for part, n in (("train", 20), ("test", 40)):
        make(folder / part, {"cat": n, "dog": n, "zebra": n}, size=(12, 12), seed=n)
    for seed in ("0", "1"):
        flags = ["--dataset", str(folder), "--limit-test", "30", "--seed", seed]
        assert train.main([*FLAGS, *flags, "--runs", str(tmp_path / "runs")]) == 0
    labels = [np.load(path) for path in (tmp_path / "runs").rglob("test_labels.npy")]
    assert np.bincount(labels[0]).tolist() == [10, 10, 10]
    assert np.array_equal(*labels)


def test_tensorboard_shows_every_class_and_the_same_images_for_every_model(monkeypatch):
    labels = torch.arange(6).repeat_interleave(50)  # sorted, as by the names of files
    images = torch.arange(300).view(300, 1, 1, 1).expand(-1, 1, 4, 4)
    shown = []
    for name, found in (
        ("draw_confusion", lambda *_: None),
        ("draw_misclassified", lambda images, *_: shown.append(images[:, 0, 0, 0])),
        ("hparams", lambda *_: ()),
    ):
        monkeypatch.setattr(tensorboard_log, name, found)
    writer = SimpleNamespace(add_scalar=lambda *_: None, add_figure=lambda *_: None)
    loader = SimpleNamespace(
        test=(images, labels), test_order=data.sampling_order(labels), classes=list("abcdef")
    )
    config = dict.fromkeys(("model", "seed"))
    every_other = torch.where(torch.arange(300) % 2 == 0, labels, (labels + 1) % 6)
    for predictions in ((labels + 1) % 6, (labels + 2) % 6, every_other):
        tensorboard_log.log_test(writer, config, 1, loader, predictions)
    assert torch.equal(*shown[:2])
    for wrong in shown:
        assert len(wrong) == 12 and len(labels[wrong].unique()) >= 5
    first, _, third = (wrong.tolist() for wrong in shown)
    assert set(first) & set(third) == {i for i in first if i % 2}
