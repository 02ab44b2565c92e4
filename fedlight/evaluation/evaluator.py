"""The evaluator of a cell's images: one extractor and the real images that it compares with."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.evaluation.extractor import DIMENSIONS, Extractor
from fedlight.evaluation.labels import coverage, label_accuracy
from fedlight.evaluation.memorisation import CopyCheck, Memorisation
from fedlight.evaluation.reference import Moments, Reference
from fedlight.evaluation.scores import frechet, score

Evaluated: TypeAlias = tuple[dict[str, float], Memorisation | None]
"""The scores of a model's images, and how near they lie to the training images, where that was asked."""


@dataclass(frozen=True)
class Evaluator:
    """Made once a cell, and used for every model of it.

    Attributes:
        extractor: what sees the images.
        reference: what the scores compare with.
        labels: of the reference's images, int64, shape (n,).
        held: whether a client has training images of a class, shape (clients, classes).
        copies: looks for copies of training images, where memorisation is to be checked.
    """

    extractor: Extractor
    reference: Reference
    labels: Tensor
    held: NDArray[np.bool_]
    copies: CopyCheck | None = None

    def __call__(self, images: Tensor, client: int | None, asked: Tensor | None) -> Evaluated:
        """Scores generated images, uint8, shape (n, channels, height, width), and checks them for copies.

        Args:
            images: of one model.
            client: whose own model it is; None for the global one.
            asked: the labels that a conditional model was asked for, int64, shape (n,).

        Returns:
            The metrics of `score`; where the extractor is the classifier, those of `coverage` and
            `label_accuracy`, as `coverage.NAME`; and a client's `own_fid`: against real images of the classes
            that it holds, where these are more than the features.
        """
        seen = self.extractor(images)
        metrics = score(seen, self.reference)
        if self.extractor.name == "classifier":
            metrics |= {f"coverage.{name}": value for name, value in coverage(seen.logits).items()}
            if asked is not None:
                held = self.held if client is None else self.held[[client]]
                right = label_accuracy(seen.logits, asked, held)
                metrics |= {f"label_accuracy.{name}": value for name, value in right.items()}
        if client is not None:
            own = self.reference.features.values[torch.from_numpy(self.held[client])[self.labels]]
            if len(own) > DIMENSIONS[self.extractor.name]:
                metrics["own_fid"] = frechet(Moments.of(seen.values), Moments.of(own))
        return metrics, self.copies(seen.values) if self.copies else None
