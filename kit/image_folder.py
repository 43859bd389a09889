"""Image folders and Tiny ImageNet: finds training and test set, classes and images.

    folder/train/<class>/*.png and folder/test/<class>/*.png     (or val for test)
    folder/<class>/*.png        a fixed random sixth of each class becomes the test set

The sets may be called Training and Testing, train_set and valid, seg_train/seg_train and so on.
Images may be in subfolders of their class, and links are followed. One line counts and names
everything that is skipped. Images are sorted by file name.
"""

import mimetypes
import os
import re
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from itertools import groupby
from pathlib import Path

from kit.command_line import UserError
from kit.datasets import ImageData, note
from kit.decoding import KEPT, counted, decoded, is_image, printable, shows

import numpy as np
import torch

FEW = 4  # images of one name that are looked at: where frames share names there are many
DIVIDED = "a sixth of each class is the test set"
TEST_SHARE = 1 / 6  # as MNIST and Fashion-MNIST are divided
ANNOTATIONS, WORDS = "val/val_annotations.txt", "words.txt"  # Tiny ImageNet's
PART = re.compile(
    "(?:(?P<train>train|training|trainval)|(?P<test>test|testing)|"
    "(?P<val>val|valid|validation|dev|eval|evaluation))(?:s|set|data|images)?"
)
# The last word of a name, and the first.
SUFFIX, PREFIX = re.compile(r"[ _.-]+[a-zA-Z]+[ _.-]*\d*$"), re.compile("^[a-zA-Z]+[ _.-]+")
UNREAD, BESIDE = "ending not read", "file beside the folders"
HIDDEN = {  # like names that begin with a dot: left by operating systems
    "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir",
    "$recycle.bin", "system volume information", "lost+found", "#recycle", "@recycle", "#snapshot",
}  # fmt: skip

Labelled = dict[Path, str]  # {image: class}
LeftOut = defaultdict[str, set[Path]]  # {reason: paths}


def load_tiny_imagenet(data_dir: Path, fetch: bool = True) -> ImageData:
    """100,000 + 10,000 colour images of 64x64 in 200 classes (Le and Yang 2015)."""
    folder = data_dir / "tiny-imagenet-200"
    if not (folder / ANNOTATIONS).is_file():
        raise UserError(
            f"{folder / ANNOTATIONS} is not there: get tiny-imagenet-200.zip (250 MB, from the "
            f"pages of Stanford's course CS231n) and unpack it in {data_dir}"
        )
    return load_folder(folder, data_dir, fetch=fetch)


def load_folder(
    folder: Path, data_dir: Path, image_size: int | None = None, fetch: bool = True
) -> ImageData:
    """The images below `folder`. Notes what was skipped. Raises a one-line UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one with a folder of images for each class")
    left_out = defaultdict(set)
    train, test, how = train_and_test(folder, left_out)
    images, said = decoded(folder, [*train, *test], image_size, data_dir, keep=fetch)
    masks, variants = masks_and_variants(train | test, images)
    if len(variants) > 0.1 * len(images):
        some = f"{len(variants):,} images ({printable(min(variants).relative_to(folder))}, ...)"
        note(f"{some} are called like another but for a word or the format: variants of a training "
             "image in the test set inflate accuracy")  # fmt: skip
    if masks:
        left_out["mask of the image beside it"] = masks
        kept = {path: i for i, path in enumerate((*train, *test)) if path not in masks}
        train, test = ({p: part[p] for p in part if p in kept} for part in (train, test))
        if how == DIVIDED:  # with the masks
            train, test = divided(in_order(train | test))
        images = images[[kept[path] for path in (*train, *test)]]
    n_train, n_test = Counter(train.values()), Counter(test.values())
    classes = sorted(n_train)
    if odd := sorted(n_train.keys() ^ n_test.keys()):
        raise UserError(f"{folder}: not both in train and in test: class {', '.join(odd[:5])}")
    if left := counted(left_out, folder):
        said = f"left out: {left}" + f"; {said}" * bool(said)
    if said:
        note(f"in {folder}: {said}")
    names = in_words(folder, classes)
    shown = [f"{names[i]} {n_train[c]:,} + {n_test[c]:,}" for i, c in enumerate(classes[:10])]
    shown += [f"and {len(classes) - 10:,} more"] * (len(classes) > 10)
    source = f"read from {folder}: {how}; training + test images: {', '.join(shown)}"
    images, n = torch.from_numpy(images), len(train)
    labels = torch.tensor([classes.index(c) for c in (*train.values(), *test.values())])
    return ImageData(images[:n], labels[:n], images[n:], labels[n:], names, source)


def in_words(folder: Path, classes: list[str]) -> list[str]:
    """Class names; Tiny ImageNet's from words.txt, where n01443537 is a goldfish."""
    rows = fields_of(folder / WORDS) if (folder / ANNOTATIONS).is_file() else []
    words = {name: word for name, all_, *_ in rows if shows(word := all_.split(",")[0])}
    called = {name: words.get(name) or name for name in classes}
    n = Counter(called.values())
    return [word if n[word] == 1 else f"{word} ({name})" for name, word in called.items()]


def fields_of(file: Path) -> list[list[str]]:
    """Tab-separated fields of each line; [] without the file."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [line.split("\t") for line in lines if "\t" in line]


# --- Sets, classes, images ------------------------------------------------------------------------


def train_and_test(folder: Path, left_out: LeftOut) -> tuple[Labelled, Labelled, str]:
    """The images of both sets, and how they were found."""
    if rows := sorted(fields_of(folder / ANNOTATIONS)):  # Tiny ImageNet: no labels in test
        test = {folder / "val/images" / name: of for name, of, *_ in rows}
        train = in_class_folders(folder / "train", left_out)
        return train, test, "training set train, test set val"
    root = unwrapped(folder, left_out)
    if parts := find_parts(root, left_out):
        names = [part.relative_to(folder) for part in parts]
        train, test = (in_class_folders(unwrapped(part, left_out), left_out) for part in parts)
        return train, test, f"training set {names[0]}, test set {names[1]}"
    return *divided(in_class_folders(root, left_out)), DIVIDED


def entries(folder: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """(folders, files) in `folder`, sorted by name. Raises OSError."""
    folders, files = [], []
    for path in (folder / name for name in sorted(os.listdir(folder))):
        if path.name[0] == "." or path.name.casefold() in HIDDEN:
            left_out["hidden"].add(path)
        elif os.path.isfile(path):
            files.append(path)
        elif not os.path.isdir(path):
            left_out["link to nothing, or no file"].add(path)
        elif path.is_symlink() and any(os.path.samefile(path, above) for above in path.parents):
            left_out["circular link"].add(path)
        elif os.path.isdir(path / KEPT):
            left_out["data folder"].add(path)
        else:
            folders.append(path)
    return folders, files


def unwrapped(folder: Path, left_out: LeftOut) -> Path:
    """`folder`, or the one nested in it: seg_train/seg_train, flowers/flowers."""
    folders, files = entries(folder, left_out)
    if len(folders) != 1 or any(map(is_image, files)) or not entries(folders[0], left_out)[0]:
        return folder
    if part_of(folders[0].name) not in (None, part_of(folder.name)):
        return folder
    left_out[BESIDE].update(files)
    return unwrapped(folders[0], left_out)


def part_of(name: str) -> str | None:
    """train, test or val, if the name has a word for one of them."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    found = {match.lastgroup for word in words if (match := PART.fullmatch(word.lower()))}
    return found.pop() if len(found) == 1 else None


def find_parts(folder: Path, left_out: LeftOut) -> tuple[Path, Path] | None:
    """(training set, test set), or None if the folders are classes, even if one is "train"."""
    folders, files = entries(folder, left_out)
    kinds = {path: kind for path in folders if (kind := part_of(path.name))}
    exact = [path for path in kinds if PART.fullmatch(path.name.casefold())]

    def the_one(kind):
        """The one with classes in it; exact names take precedence."""
        found = [path for path in kinds if kinds[path] == kind and len(names_in(path)) > 1]
        found = [path for path in found if path in exact] or found
        if len(found) > 1:
            raise UserError(f"{folder}: {names_of(found)}: which one? Rename the others")
        return found[0] if found else None

    train, test = the_one("train"), the_one("test") or the_one("val")
    beside = set(folders) - {train, test}
    if train and test:
        left_out["folder beside the parts"].update(beside)
        left_out[BESIDE].update(files)
        return train, test
    if part := train or test:
        around = {name for path in beside for name in (path.name, *names_in(path))}
        alone = len(kinds) > 1 or not beside or around & names_in(part)
    else:
        alone = {"train"} < set(kinds.values()) and len(kinds) in (len(folders), len(exact))
    if alone:
        raise UserError(
            f"{folder}: among {names_of(folders)} there must be one folder to train (train) and "
            "one to test (test or val), each with a folder of images for each class: rename or add"
        )
    return None


def names_in(folder: Path) -> set[str]:
    """Names of the folders in `folder` or the one nested in it."""
    ignored = defaultdict(set)
    return {path.name for path in entries(unwrapped(folder, ignored), ignored)[0]}


def names_of(paths: list[Path]) -> str:
    return ", ".join(printable(Path(path.name)) for path in paths[:10])


def in_class_folders(folder: Path, left_out: LeftOut) -> Labelled:
    """The images below each folder in `folder`, sorted by file name."""
    folders, files = entries(folder, left_out)
    left_out[BESIDE].update(files)
    images, inside, names = {}, {}, {path.name for path in folders}
    for path in folders:
        name = unicodedata.normalize("NFC", path.name)  # a Mac may have written it as NFD
        if not shows(name):
            what = "a control character, or bytes that are not UTF-8"
            raise UserError(f"{str(path)!a}: {what}: rename it")
        found = images_below(path, left_out)
        inner = {above.relative_to(path).parts for above in {image.parent for image in found}}
        if len(names & set().union(*inner)) > 1:
            left_out["copy of the folder around it"].add(path)
            continue
        if found:
            inside[path] = {"".join(parts[:1]) for parts in inner}  # "": directly in it
        kinds = {part_of("".join(parts[:1])) for parts in inner}
        if "train" in kinds and kinds & {"test", "val"}:
            raise UserError(f"{path} has parts of its own: move the classes into the parts")
        images |= dict.fromkeys(found, name)
        if not found:
            unread = [file.name for file in left_out[UNREAD] if path in file.parents]
            kinds = [str(mimetypes.guess_type(file)[0]) for file in unread]
            if not unread or any(kind.startswith("image/") for kind in kinds):
                raise UserError(
                    f"{printable(path)} has no images that Pillow reads: add some, or delete it"
                )
            left_out["folder without images"].add(path)
    common = set.intersection(*inside.values()) if len(inside) > 1 else set()
    if len(common) > 1 and "" not in set().union(*inside.values()):
        same = ", ".join(sorted(common)[:5])
        note(f"{names_of([*inside])} all hold {same}: if those are the classes, put them into "
             "folders called train and test")  # fmt: skip
    if len(set(images.values())) < 2:
        unread = len(left_out[UNREAD])
        also = f"; Pillow does not read {unread:,} of its files" * (unread > 0)
        raise UserError(f"{folder} needs a folder of images for each of two classes or more{also}")
    return in_order(images)


def in_order(images: Labelled) -> Labelled:
    order = sorted(images, key=lambda i: (unicodedata.normalize("NFC", i.name), images[i], i))
    return {image: images[image] for image in order}


def images_below(folder: Path, left_out: LeftOut) -> list[Path]:
    folders, files = entries(folder, left_out)
    images = [path for path in files if is_image(path)]
    left_out[UNREAD].update(set(files).difference(images))
    for path in folders:
        images += images_below(path, left_out)
    return images


def divided(images: Labelled) -> tuple[Labelled, Labelled]:
    """(train, test), stratified. Independent of a run's seed: all runs share one test set."""
    generator, test = np.random.default_rng(0), set()
    for name, group in groupby(sorted(images, key=images.get), images.get):
        of_class = list(group)
        if len(of_class) < 2:
            raise UserError(f"class {name} has a single image: it takes one to train, one to test")
        n_test = max(1, round(TEST_SHARE * len(of_class)))
        test.update(of_class[i] for i in generator.permutation(len(of_class))[:n_test])
    train = {path: name for path, name in images.items() if path not in test}
    return train, {path: name for path, name in images.items() if path in test}


def without_a_word(stem: str) -> dict[str, str]:
    """{word: the rest of the name}; "": the whole name."""
    found = [match for pattern in (SUFFIX, PREFIX) if (match := pattern.search(stem))]
    return {word[0]: stem[: word.start()] + stem[word.end() :] for word in found} | {"": stem}


def masks_and_variants(labelled: Labelled, images: np.ndarray) -> tuple[set[Path], set[Path]]:
    """(masks, possible variants of another image). Notes a class that may be masks.

    An image's partners have the rest of its name, without one word, in its class and in the same
    folder or one beside or around it: x.png for x_mask.png, image_7.png for mask_7.png,
    images/x.png or ../x.png for masks/x.png. A series is the images of one folder with one word.
    It is masks if it has two tones and its partners have more. Images may be variants if a partner
    has exactly that name, such as x.png for x_flip.png, or for x.tif.
    """
    paths, named, others = [*labelled], defaultdict(list), defaultdict(dict)
    series, doubtful = defaultdict(list), Counter()

    @cache
    def two_tones(i):
        tones = np.sort(np.bincount(images[i].ravel() >> 3, minlength=32))
        return tones[-2:].sum() > 0.9 * images[i].size

    for i, (path, of) in enumerate(labelled.items()):
        for name in {path.stem, PREFIX.sub("", path.stem)}:
            if len(others[name]) < FEW:
                others[name].setdefault(of, i)
            for place in {path.parent, path.parents[1]}:
                if len(named[place, of, name]) < FEW:
                    named[place, of, name].append(i)
    for i, (path, of) in enumerate(labelled.items()):
        rests = without_a_word(path.stem)
        for word, rest in rests.items():
            places = path.parent, path.parents[1]
            partners = {j for place in places for j in named.get((place, of, rest), ())} - {i}
            if partners:
                is_mask = two_tones(i) and not all(map(two_tones, partners))
                exact = {paths[j] for j in partners if paths[j].stem == rest}
                if not word:  # another format beside it
                    exact = {p for p in exact if p.parent == path.parent and p.suffix < path.suffix}
                key = path.parent, path.suffix, re.sub(r"\d", "", word)
                series[key].append((path, is_mask, exact))
        elsewhere = (item for rest in rests.values() for item in others.get(rest, {}).items())
        doubtful[of] += any(
            two_tones(i) and not two_tones(j) for other, j in elsewhere if other != of
        )
    for of, n in Counter(labelled.values()).items():
        if doubtful[of] > 0.9 * n:
            note(f"class {of}: its images have two tones and the names of images in other classes: "
                 "if they are masks, take them out")  # fmt: skip
    masks = {path for each in series.values() if np.mean([is_mask for _, is_mask, _ in each]) > 0.9
             for path, *_ in each}  # fmt: skip
    every = (image for each in series.values() for image in each)
    return masks, {path for path, _, exact in every if path not in masks and exact - masks}
