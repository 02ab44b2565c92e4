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
    """One split of a data set.

    Attributes:
        pixels: uint8 in 0..255, shape (n, channels, height, width).
        labels: int64 in 0..classes-1, shape (n,).
    """

    pixels: Tensor
    labels: NDArray[np.int64]

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
            raise BadInput(f"data: {len(self.pixels)} images with {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, count: int | None) -> "Images":
        """The first `count` images, or all where it is None."""
        return Images(self.pixels[:count], self.labels[:count])


@dataclass(frozen=True)
class Dataset:
    """A data set, split into what clients train on and what they are evaluated on.

    Attributes:
        train: dealt out to the clients.
        test: never seen in training.
        classes: the name of each label.
        notes: what the user is to know of what was read, a line each.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if not 0 <= split.labels.min() <= split.labels.max() < len(self.classes):
                raise BadInput(
                    f"data: labels from {split.labels.min()} to {split.labels.max()}, where the data set "
                    f"has {len(self.classes)} classes"
                )

    def numbered_by(self, names: Sequence[str]) -> "Dataset":
        """The same images, with the labels that a list of class names gives them.

        Args:
            names: of all classes, each once; label 0 is the first. A class without images stays one.

        Raises:
            BadInput: the data set has a class that is not among them.
        """
        if unknown := [name for name in self.classes if name not in names]:
            raise BadInput(
                f"data.classes has {', '.join(names)}, and these images have another class: "
                f"{', '.join(unknown)}; leave it out, or name it in data.classes"
            )
        label = np.array([names.index(name) for name in self.classes], np.int64)
        train, test = (Images(split.pixels, label[split.labels]) for split in (self.train, self.test))
        return replace(self, train=train, test=test, classes=tuple(names))
