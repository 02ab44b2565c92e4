"""A folder of images: one sub-folder a class with a fifth held out for testing, or train and test folders."""

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
from fedlight.data.folder_files import list_files, list_sub_folders
from fedlight.data.folder_layout import PublishedSplit, find_split
from fedlight.data.image_cache import decode
from fedlight.data.image_file import EXTENSIONS
from fedlight.data.pixel_range import Range
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import legible

ONE_CLASS = "all"
NAMED = 8  # classes, and kinds of left-out files, that the summary names


def load(
    root: str | None,
    cache: str,
    image_size: int,
    channels: int,
    skip_unreadable: bool = False,
    range: Range = "type",
) -> Dataset:
    """Reads the images, crops them to their central square and resizes them.

    Folders named train and test are the training and the test set; a validation folder beside them is left
    out. Otherwise every folder is a class, and a fifth of its images is held out for testing. Links to files
    and folders are followed.

    Args:
        root: the folder; images directly in it, without sub-folders, are one class, "all".
        cache: the folder for decoded images.
        image_size: in pixels.
        channels: 1 for grey, 3 for RGB.
        skip_unreadable: whether unreadable files are left out; otherwise they are an error.
        range: which values of the files become 0 and 255, as in `decode`.

    Returns:
        The data set; its first note counts images, classes, and left-out files by kind. A class without a
        readable image is left out.

    Raises:
        BadInput: the folder is missing, a class has no images, no class has two, an image cannot be read, or
            folders are named as parts of a set and it is ambiguous what to train and test on.
    """
    if root is None:
        raise BadInput(
            "data=image_folder needs a folder of images, one sub-folder a class: set data.root=FOLDER"
        )
    folder = Path(root)
    if not folder.is_dir():
        raise BadInput(f"data.root: no folder {root}")
    split = find_split(folder)
    parts = _list_split(folder, split) if split else _list_classes(folder)
    decoded = decode("image_folder", folder, parts.files, cache, image_size, channels, skip_unreadable, range)
    parts.left_out["unreadable image"] += int((~decoded.read).sum())
    parts.left_out["further frame"] += decoded.further_frames
    labels, cut, pixels = parts.labels, parts.cut, decoded.pixels
    if not decoded.read.all():
        pixels = pixels[torch.from_numpy(decoded.read)]
        labels, cut = labels[decoded.read], int(decoded.read[:cut].sum())
    if not 0 < cut < len(labels):
        raise BadInput(
            f"data.root: no image to train on or no image to test on in {root} can be read; repair them"
        )
    present, labels = np.unique(labels, return_inverse=True)
    unreadable_classes = [name for label, name in enumerate(parts.classes) if label not in present]
    dataset = Dataset(
        train=Images(pixels[:cut], labels[:cut]),
        test=Images(pixels[cut:], labels[cut:]),
        classes=tuple(parts.classes[label] for label in present),
    )
    summary = f"data.root {legible(str(root))}: {_summarise(dataset, unreadable_classes, parts.left_out)}"
    return replace(dataset, notes=(summary, *decoded.notes))


class Parts(NamedTuple):
    """The files of a set: the training images, then the test images.

    Attributes:
        files: image files.
        labels: int64, shape (files,).
        cut: number of training images.
        classes: names of the labels.
        left_out: number of left-out files of each kind.
    """

    files: list[Path]
    labels: NDArray[np.int64]
    cut: int
    classes: list[str]
    left_out: Counter[str]


def _list_classes(root: Path) -> Parts:
    """The files of a folder of classes; a fifth of each class is held out for testing."""
    left_out: Counter[str] = Counter()
    by_class = _list_by_class(root, left_out)
    files = [file for members in by_class.values() for file in members]
    labels = np.repeat(np.arange(len(by_class)), [len(members) for members in by_class.values()])
    train, test = hold_out(labels)
    if not len(test):
        raise BadInput(
            f"data.root: no class in {root} has two images, so that one can be held out for testing"
        )
    chosen = np.concatenate([train, test])
    return Parts(
        [files[position] for position in chosen], labels[chosen], len(train), list(by_class), left_out
    )


def _list_split(root: Path, split: PublishedSplit) -> Parts:
    """The files of a published set; the order of each part depends on its file names only."""
    left_out: Counter[str] = Counter()
    _reject_loose(root, _list_images(root, left_out, recursive=False))
    train, test = _list_by_class(split.train, left_out), _list_by_class(split.test, left_out)
    if untrained := sorted(test.keys() - train.keys()):
        raise BadInput(
            f"data.root: {split.test} holds the class {untrained[0]}, and {split.train} has no images of it: "
            "remove it, or add images to train on"
        )
    classes, files, labels = list(train), [], []
    for part in (train, test):
        members = [(classes.index(name), file) for name, paths in part.items() for file in paths]
        order = np.random.RandomState(0).permutation(len(members))
        files += [members[position][1] for position in order]
        labels += [members[position][0] for position in order]
    for folder in split.unused:
        left_out[f"image in {legible(folder.name)}"] += len(_list_images(folder, Counter()))
    return Parts(files, np.array(labels, np.int64), sum(map(len, train.values())), classes, left_out)


def _list_by_class(root: Path, left_out: Counter[str]) -> dict[str, list[Path]]:
    """The image files of each class, classes and files sorted by name; adds other files to `left_out`."""
    classes, loose = list_sub_folders(root), _list_images(root, left_out, recursive=False)
    if classes:
        _reject_loose(root, loose)
    by_class = {legible(path.name): _list_images(path, left_out) for path in classes} or {ONE_CLASS: loose}
    if len(by_class) < len(classes):
        raise BadInput(f"data.root: {root} holds folders whose names differ only in bytes that are not UTF-8")
    for name, files in by_class.items():
        if not files:
            folder = root / name if classes else root
            kinds = f"; left out: {_format_counts(left_out)}" if +left_out else ""
            raise BadInput(f"data.root: no images ({', '.join(EXTENSIONS)}) in {folder}{kinds}")
    return by_class


def _reject_loose(root: Path, loose: list[Path]) -> None:
    """Raises BadInput where images lie directly in a folder of classes."""
    if loose:
        raise BadInput(
            f"data.root: {root} holds both sub-folders and images such as {legible(loose[0].name)}: "
            "move the images into a sub-folder, which is their class, or elsewhere"
        )


def _list_images(folder: Path, left_out: Counter[str], recursive: bool = True) -> list[Path]:
    """The image files in a folder and below it, sorted; adds other files to `left_out`."""
    listing = list_files(folder, recursive)
    if listing.forbidden:
        forbidden = legible(str(listing.forbidden[0]))
        raise BadInput(f"data.root: {forbidden} cannot be listed; permit it, or remove it")
    left_out.update(listing.left_out)
    left_out.update(_kind(path) for path in listing.files if not _is_image(path))
    return list(filter(_is_image, listing.files))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _kind(path: Path) -> str:
    return legible(path.suffix.lower()) or "file without extension"


def _summarise(dataset: Dataset, unreadable_classes: list[str], left_out: Counter[str]) -> str:
    """Numbers of images and classes, and of left-out files by kind."""
    counts = np.bincount([*dataset.train.labels, *dataset.test.labels], minlength=len(dataset.classes))
    named = [f"{name} {count:,}" for name, count in zip(dataset.classes, counts.tolist(), strict=True)]
    if len(named) > NAMED:
        named[NAMED:] = [f"and {len(named) - NAMED:,} more of {counts.min():,} to {counts.max():,}"]
    classes = f"{len(counts):,} class{'es' if len(counts) > 1 else ''}: {', '.join(named)}"
    missing = [f"class {name}, of which no image can be read" for name in unreadable_classes[:NAMED]]
    if len(unreadable_classes) > NAMED:
        missing.append(f"{len(unreadable_classes) - NAMED:,} more such classes")
    without = ", ".join(filter(None, [_format_counts(left_out), *missing])) or "nothing"
    return (
        f"{len(dataset.train):,} images to train on, {len(dataset.test):,} to test on; {classes}; "
        f"left out: {without}"
    )


def _format_counts(left_out: Counter[str]) -> str:
    """Numbers of files by kind, such as "3 .gif, 1 hidden file"."""
    kinds = (+left_out).most_common()
    shown = [f"{count:,} {_pluralise(kind) if count > 1 else kind}" for kind, count in kinds[:NAMED]]
    if len(kinds) > NAMED:
        shown.append(f"{sum(count for _, count in kinds[NAMED:]):,} of other kinds")
    return ", ".join(shown)


def _pluralise(kind: str) -> str:
    """The plural of a kind of file; an extension has none."""
    return kind if kind.startswith(".") else re.sub("link|image|file|folder|frame", r"\g<0>s", kind, count=1)


def hold_out(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Holds out a fifth of each class for testing; the only image of a class is for training.

    Args:
        labels: int64, shape (n,).

    Returns:
        Positions to train on, shuffled, and to test on; without a class of two images there are none to test.
    """
    is_single = np.bincount(labels)[labels] == 1
    rest, single = np.flatnonzero(~is_single), np.flatnonzero(is_single)
    if not len(rest):
        return single, rest
    held_out = max(-(-len(rest) // 5), len(np.unique(labels[rest])))
    train, test = train_test_split(rest, test_size=held_out, stratify=labels[rest], random_state=0)
    return np.concatenate([train, single]), test
