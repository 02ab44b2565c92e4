"""CelebA: 162,770 training and 19,962 test faces, colour, aligned (arXiv 1411.7766)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlight.data.dataset import Dataset, Images
from fedlight.data.download import download
from fedlight.data.image_cache import decode
from fedlight.data.pixel_range import Range
from fedlight.runtime.errors import BadInput

FOLDER = "celeba"
TRAIN, TEST = "0", "2"  # in list_eval_partition.txt; 1 is for validation
BITS = 4


def load(
    root: str | None,
    cache: str,
    image_size: int,
    channels: int,
    attributes: Sequence[str] | None,
    range: Range = "type",
) -> Dataset:
    """Reads the aligned faces, crops them to the central 178x178 and resizes them; there are 16 classes.

    Args:
        root: the folder that contains torchvision's folder celeba, or null: the cache, where torchvision
            downloads it to.
        cache: the folder for downloads and decoded images.
        image_size: in pixels.
        channels: 1 for grey, 3 for RGB.
        attributes: four of CelebA's binary attributes; label = sum of attribute_i * 2^i.
        range: which values of the files become 0 and 255, as in `decode`.

    Raises:
        BadInput: an attribute is unknown, a file is missing or broken, or the download failed.
    """
    folder = Path(cache if root is None else root) / FOLDER
    if root is None:
        advice = f"pip install 'fedlight[celeba]' for gdown, or set data.root to a folder that holds {FOLDER}"
        download(folder, _fetch, "CelebA", advice)
    elif not folder.is_dir():
        raise BadInput(
            f"data.root: no folder {FOLDER} in {root}; set data.root to the folder that contains it"
        )
    attributes = tuple(attributes or ())
    label_of = _read_labels(folder / "list_attr_celeba.txt", attributes)
    parts = _read_partition(folder / "list_eval_partition.txt")
    names = parts[TRAIN] + parts[TEST]
    unlabelled = [name for name in names if name not in label_of]
    if unlabelled:
        raise BadInput(f"data.root: {folder}/list_attr_celeba.txt lacks {unlabelled[0]}; fetch it again")
    files = [folder / "img_align_celeba" / name for name in names]
    decoded = decode("celeba", folder, files, cache, image_size, channels, range_=range)
    pixels = decoded.pixels
    labels = np.array([label_of[name] for name in names], np.int64)
    train = len(parts[TRAIN])
    return Dataset(
        train=Images(pixels[:train], labels[:train]),
        test=Images(pixels[train:], labels[train:]),
        classes=class_names(attributes),
        notes=decoded.notes,
    )


def class_names(attributes: Sequence[str] | None) -> tuple[str, ...]:
    """The name of each label: the attributes that are true, such as "Male+Smiling", or "none"."""
    return tuple(
        "+".join(name for bit, name in enumerate(attributes or ()) if label >> bit & 1) or "none"
        for label in range(2**BITS)
    )


def _fetch(folder: str) -> None:
    from torchvision.datasets import CelebA

    CelebA(folder, download=True)


def _read_labels(path: Path, attributes: Sequence[str]) -> dict[str, int]:
    """Reads the label of each file.

    The first line is the number of files, the second the attributes' names; then there is a line a file.
    """
    _, header, *rows = _read_rows(path)
    if len(set(attributes)) != BITS or len(attributes) != BITS or not set(attributes) <= set(header):
        raise BadInput(
            f"data.attributes must be {BITS} different ones of {', '.join(header)}, got {list(attributes)}"
        )
    columns = [1 + header.index(attribute) for attribute in attributes]
    labels = {}
    for row in rows:
        if len(row) != 1 + len(header) or not {row[column] for column in columns} <= {"1", "-1"}:
            raise BadInput(f"data.root: {path} is broken at '{' '.join(row[:3])} ...'; fetch it again")
        labels[row[0]] = sum((row[column] == "1") << bit for bit, column in enumerate(columns))
    return labels


def _read_partition(path: Path) -> dict[str, list[str]]:
    """Reads the file names of each part."""
    parts: dict[str, list[str]] = {"0": [], "1": [], "2": []}
    for name, *part in _read_rows(path):
        if len(part) != 1 or part[0] not in parts:
            raise BadInput(f"data.root: {path} is broken at '{' '.join([name, *part])}'; fetch it again")
        parts[part[0]].append(name)
    if not parts[TRAIN] or not parts[TEST]:
        raise BadInput(f"data.root: {path} must name images to train on ({TRAIN}) and to test on ({TEST})")
    return parts


def _read_rows(path: Path) -> list[list[str]]:
    """Reads the words of each line."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"data.root: {path} cannot be read ({error})") from error
    if len(rows) < 2:
        raise BadInput(f"data.root: {path} is truncated; fetch it again")
    return rows
