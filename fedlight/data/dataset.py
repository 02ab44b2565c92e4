"""A data set in memory or memory-mapped: images and labels as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.runtime.errors import BadInput


@dataclass(frozen=True)
class Images:
    """The images of one split of a data set.

    Attributes:
        pixels: uint8 in 0..255, shape (n, channels, height, width).
        labels: int64 in 0..classes-1, shape (n,).
        groups: whose image each is (site, patient, writer), int64 from 0, shape (n,); None where the data set
            does not say.
    """

    pixels: Tensor
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise BadInput(
                "data: pixels must be torch.uint8 of shape (n, channels, height, width), got "
                f"{self.pixels.dtype} of shape {tuple(self.pixels.shape)}"
            )
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise BadInput(
                "data: labels must be numpy.int64 of shape (n,), got "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if len(self.pixels) == 0 or len(self.labels) != len(self.pixels):
            raise BadInput(
                "data: there must be at least one image and one label for each, got "
                f"{len(self.pixels)} images and {len(self.labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def numbered_by(self, label: NDArray[np.int64]) -> "Images":
        """The images whose label has a new one, 0 or more, in `label`."""
        new = label[self.labels]
        kept = new >= 0
        groups = None if self.groups is None else self.groups[kept]
        return Images(self.pixels[torch.from_numpy(kept)], new[kept], groups)

    def first(self, count: int | None) -> "Images":
        """The first `count` images; all for None."""
        groups = None if self.groups is None else self.groups[:count]
        return Images(self.pixels[:count], self.labels[:count], groups)


@dataclass(frozen=True)
class Dataset:
    """A data set, split into training and test images.

    Attributes:
        train: assigned to the clients.
        test: never trained on.
        classes: the name of each label.
        notes: lines for the user about the files that were read.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if not 0 <= split.labels.min() <= split.labels.max() < len(self.classes):
                raise BadInput(
                    f"data: labels must be in 0..{len(self.classes) - 1}, got {split.labels.min()} to "
                    f"{split.labels.max()}"
                )

    def select_classes(self, names: Sequence[str]) -> "Dataset":
        """The images of some classes, with labels that number these.

        Args:
            names: of the classes, without duplicates; the first becomes label 0.

        Raises:
            BadInput: the data set has no such class, or a split has no image of these classes.
        """
        if unknown := [name for name in names if name not in self.classes]:
            raise BadInput(
                f"data.only names {', '.join(unknown)}, and the data set has {', '.join(self.classes)}"
            )
        label = np.full(len(self.classes), -1, np.int64)
        label[[self.classes.index(name) for name in names]] = np.arange(len(names))
        train, test = (split.numbered_by(label) for split in (self.train, self.test))
        return replace(self, train=train, test=test, classes=tuple(names))

    def numbered_by(self, names: Sequence[str]) -> "Dataset":
        """The same images, with labels that number the given class names.

        Args:
            names: of all classes, without duplicates; the first is label 0. It may list classes that have no
                images here.

        Raises:
            BadInput: the data set has a class that is not listed.
        """
        if unknown := [name for name in self.classes if name not in names]:
            raise BadInput(
                f"data.classes has {', '.join(names)}, and these images have another class: "
                f"{', '.join(unknown)}; leave it out, or name it in data.classes"
            )
        label = np.array([names.index(name) for name in self.classes], np.int64)
        train, test = (replace(split, labels=label[split.labels]) for split in (self.train, self.test))
        return replace(self, train=train, test=test, classes=tuple(names))
