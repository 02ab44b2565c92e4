"""A folder of images, one sub-folder a class, of which a fixed fifth is for testing."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from fedlight.data.dataset import Dataset, Images
from fedlight.data.decoded import Range, decode
from fedlight.data.image_file import EXTENSIONS
from fedlight.data.layout import PublishedSplit, find_split
from fedlight.data.walk import sub_folders, walk
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import legible

ONE_CLASS = "all"
NAMED = 8  # classes, and kinds of files left out, that the line about a data set names


def load(
    root: str | None,
    cache: str,
    image_size: int,
    channels: int,
    skip_unreadable: bool = False,
    range: Range = "type",
) -> Dataset:
    """Reads the images, cut to their central square and resized.

    Folders named train and test are used as such; one for validation beside them is left out. Else every
    folder is a class, and a fifth of it is held out for testing. Links to files and folders are followed.

    Args:
        root: the folder; images directly in it, without sub-folders, are one class, "all".
        cache: the folder that decoded images go to.
        image_size: in pixels.
        channels: 1 for grey, 3 for RGB.
        skip_unreadable: whether files that cannot be read as images are left out; else they are an error.
        range: which values of the files become 0 and 255, as `decode` takes it.

    Returns:
        The data set; its first note counts images, classes, and what was left out by kind. A class of which
        no image was read is none.

    Raises:
        BadInput: no folder, a class without images, none with two, images that cannot be read, or folders
            that are named as parts of a set where it is not clear what to train and test on.
    """
    if root is None:
        raise BadInput(
            "data=image_folder needs a folder of images, one sub-folder a class: set data.root=FOLDER"
        )
    folder = Path(root)
    if not folder.is_dir():
        raise BadInput(f"data.root: no folder {root}")
    split = find_split(folder)
    parts = _from_split(folder, split) if split else _from_classes(folder)
    decoded = decode("image_folder", folder, parts.files, cache, image_size, channels, skip_unreadable, range)
    parts.left_out["unreadable image"] += int((~decoded.read).sum())
    parts.left_out["further frame"] += decoded.further_frames
    labels, cut, pixels = parts.labels, parts.cut, decoded.pixels
    if not decoded.read.all():
        pixels = pixels[torch.from_numpy(decoded.read)]
        labels, cut = labels[decoded.read], int(decoded.read[:cut].sum())
    if not 0 < cut < len(labels):
        raise BadInput(f"data.root: of {root} no image to train on, or none to test on, can be read")
    seen, labels = np.unique(labels, return_inverse=True)  # a class of which nothing was read is none
    lost = [name for label, name in enumerate(parts.classes) if label not in seen]
    dataset = Dataset(
        train=Images(pixels[:cut], labels[:cut]),
        test=Images(pixels[cut:], labels[cut:]),
        classes=tuple(parts.classes[label] for label in seen),
    )
    summary = f"data.root {legible(str(root))}: {_summary(dataset, lost, parts.left_out)}"
    return replace(dataset, notes=(summary, *decoded.notes))


class Parts(NamedTuple):
    """The files of a set, those to train on first.

    Attributes:
        files: image files.
        labels: of each, shape (files,).
        cut: how many are to train on; the others are to test on.
        classes: their names.
        left_out: how many of each kind were left out.
    """

    files: list[Path]
    labels: NDArray[np.int64]
    cut: int
    classes: list[str]
    left_out: Counter[str]


def _from_classes(root: Path) -> Parts:
    """Of a folder of classes, a fifth of each is held out for testing."""
    left_out: Counter[str] = Counter()
    files_of = _list(root, left_out)
    files = [file for members in files_of.values() for file in members]
    labels = np.repeat(np.arange(len(files_of)), [len(members) for members in files_of.values()])
    train, test = _split(labels)
    if not len(test):
        raise BadInput(
            f"data.root: no class in {root} has two images, so that one can be held out for testing"
        )
    chosen = np.concatenate([train, test])
    return Parts(
        [files[position] for position in chosen], labels[chosen], len(train), list(files_of), left_out
    )


def _from_split(root: Path, split: PublishedSplit) -> Parts:
    """Of a folder that is split already; each part in an order that depends on its names only."""
    left_out: Counter[str] = Counter()
    _refuse_mixed(root, _images(root, left_out, deep=False))
    train_of, test_of = _list(split.train, left_out), _list(split.test, left_out)
    if strange := sorted(test_of.keys() - train_of.keys()):
        raise BadInput(
            f"data.root: {split.test} holds the class {strange[0]}, and {split.train} has no images of it: "
            "remove it, or add images to train on"
        )
    classes, files, labels = list(train_of), [], []
    for files_of in (train_of, test_of):
        members = [(classes.index(name), file) for name, found in files_of.items() for file in found]
        order = np.random.RandomState(0).permutation(len(members))
        files += [members[position][1] for position in order]
        labels += [members[position][0] for position in order]
    for folder in split.unused:
        left_out[f"image in {legible(folder.name)}"] += len(_images(folder, Counter()))
    cut = sum(map(len, train_of.values()))
    return Parts(files, np.array(labels, np.int64), cut, classes, left_out)


def _list(root: Path, left_out: Counter[str]) -> dict[str, list[Path]]:
    """The image files of each class, both sorted by name; what else is there is counted."""
    classes, loose = sub_folders(root), _images(root, left_out, deep=False)
    if classes:
        _refuse_mixed(root, loose)
    files_of = {legible(path.name): _images(path, left_out) for path in classes} or {ONE_CLASS: loose}
    if len(files_of) < len(classes):
        raise BadInput(f"data.root: {root} holds folders whose names differ only in bytes that are not UTF-8")
    for name, files in files_of.items():
        if not files:
            folder = root / name if classes else root
            kinds = f"; left out: {_counts(left_out)}" if +left_out else ""
            raise BadInput(f"data.root: no images ({', '.join(EXTENSIONS)}) in {folder}{kinds}")
    return files_of


def _refuse_mixed(root: Path, loose: list[Path]) -> None:
    if loose:
        raise BadInput(
            f"data.root: {root} holds both sub-folders and images such as {legible(loose[0].name)}: "
            "move the images into a sub-folder, which is their class, or elsewhere"
        )


def _images(folder: Path, left_out: Counter[str], deep: bool = True) -> list[Path]:
    """The image files in a folder, or at any depth below it, sorted; what else is there is counted."""
    found = walk(folder, deep)
    if found.closed:
        closed = legible(str(found.closed[0]))
        raise BadInput(f"data.root: {closed} cannot be listed; permit it, or remove it")
    left_out.update(found.left_out)
    left_out.update(_kind(path) for path in found.files if not _is_image(path))
    return list(filter(_is_image, found.files))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _kind(path: Path) -> str:
    return legible(path.suffix.lower()) or "file without extension"


def _summary(dataset: Dataset, lost: list[str], left_out: Counter[str]) -> str:
    """Images, classes, and what was left out by kind."""
    counts = np.bincount([*dataset.train.labels, *dataset.test.labels], minlength=len(dataset.classes))
    named = [f"{name} {count:,}" for name, count in zip(dataset.classes, counts.tolist(), strict=True)]
    if len(named) > NAMED:
        named[NAMED:] = [f"and {len(named) - NAMED:,} more of {counts.min():,} to {counts.max():,}"]
    classes = f"{len(counts):,} class{'es' if len(counts) > 1 else ''}: {', '.join(named)}"
    missing = [f"class {name}, of which no image can be read" for name in lost[:NAMED]]
    if len(lost) > NAMED:
        missing.append(f"{len(lost) - NAMED:,} more such classes")
    without = ", ".join(filter(None, [_counts(left_out), *missing])) or "nothing"
    return (
        f"{len(dataset.train):,} images to train on, {len(dataset.test):,} to test on; {classes}; "
        f"left out: {without}"
    )


def _counts(left_out: Counter[str]) -> str:
    """Such as "3 .gif, 1 hidden file"."""
    kinds = (+left_out).most_common()
    shown = [f"{count:,} {_plural(kind) if count > 1 else kind}" for kind, count in kinds[:NAMED]]
    if len(kinds) > NAMED:
        shown.append(f"{sum(count for _, count in kinds[NAMED:]):,} of other kinds")
    return ", ".join(shown)


def _plural(kind: str) -> str:
    """Of a kind of file; an extension has none."""
    return kind if kind.startswith(".") else re.sub("link|image|file|folder|frame", r"\g<0>s", kind, count=1)


def _split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to train on and to test on, stratified; the image of a class of one is trained on."""
    alone = np.bincount(labels)[labels] == 1
    rest, single = np.flatnonzero(~alone), np.flatnonzero(alone)
    if not len(rest):
        return single, rest
    held_out = max(-(-len(rest) // 5), len(np.unique(labels[rest])))
    train, test = train_test_split(rest, test_size=held_out, stratify=labels[rest], random_state=0)
    return np.concatenate([train, single]), test
