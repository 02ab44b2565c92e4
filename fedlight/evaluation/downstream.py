"""Downstream accuracy: of classifiers that are trained on generated images, and on real ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from fedlight.data.dataset import Dataset
from fedlight.data.partition import Indices
from fedlight.evaluation import classifier
from fedlight.runtime.cache import load_or_make
from fedlight.runtime.errors import BadInput
from fedlight.runtime.hashing import tensors_sha256

MIN_STEPS = 200  # of the optimizer: a client of few images must not look poor for want of steps


@dataclass(frozen=True)
class Downstream:
    """Trains classifiers on labelled images, and tests each on all real test images.

    Every classifier is the network of the classifier extractor, trained in the same way; it uses one CPU
    thread and its own random seed. Accuracies on real images are cached by the content of these images.

    Attributes:
        dataset: with the training images that are assigned to clients.
        client_indices: for each client the positions of its training images.
        compared: the clients whose own images a global model is compared with.
        cache: fedlight's cache folder.
    """

    dataset: Dataset
    client_indices: Sequence[Indices]
    compared: Sequence[int]
    cache: str

    def generated(self, images: Tensor, labels: Tensor) -> float:
        """The accuracy of a classifier that is trained on generated images, 0..1.

        Args:
            images: uint8, shape (n, channels, height, width).
            labels: that they were conditioned on, int64, shape (n,).
        """
        return self._measure((images, labels), "training a classifier on generated images")

    def own(self, client: int | None) -> float:
        """The accuracy of a classifier that is trained on a client's own real images.

        Args:
            client: its number; None for the mean over the clients in `compared`.
        """
        clients = self.compared if client is None else [client]
        return mean(self._real(torch.from_numpy(self.client_indices[k])) for k in clients)

    def all(self) -> float:
        """The accuracy of a classifier that is trained on all real training images."""
        return self._real(torch.arange(len(self.dataset.train)))

    def _real(self, positions: Tensor) -> float:
        """The accuracy of a classifier that is trained on the training images at these positions."""
        train, test = self.dataset.train, self._test_set
        chosen = train.pixels[positions], torch.from_numpy(train.labels)[positions]
        content = tensors_sha256([*chosen, *test])[:16]
        path = Path(self.cache) / "downstream" / f"v{classifier.VERSION}-{content}.json"

        def read(file: Path) -> float:
            return float(json.loads(file.read_text(encoding="utf-8"))["accuracy"])

        def make(temporary: Path) -> None:
            accuracy = self._measure(chosen, "training a classifier on real images")
            temporary.write_text(json.dumps({"accuracy": accuracy}) + "\n", encoding="utf-8")

        return load_or_make(path, read, make)

    def _measure(self, train_set: tuple[Tensor, Tensor], what: str) -> float:
        steps = max(MIN_STEPS, classifier.count_steps(len(train_set[1])))
        classes = len(self.dataset.classes)
        return classifier.measure_accuracy(train_set, self._test_set, classes, steps, what)

    @property
    def _test_set(self) -> tuple[Tensor, Tensor]:
        return self.dataset.test.pixels, torch.from_numpy(self.dataset.test.labels)


def check_downstream(side: int) -> None:
    """Raises BadInput for images of too few pixels on a side."""
    if side < classifier.MIN_SIDE:
        raise BadInput(
            f"evaluation.downstream=true needs images of at least {classifier.MIN_SIDE}x"
            f"{classifier.MIN_SIDE}, got {side}x{side}: set it to false"
        )
