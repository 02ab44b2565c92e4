"""The evaluator of a cell: it scores generated images against real ones."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.evaluation.bootstrap import fid_standard_error
from fedlight.evaluation.downstream import Downstream
from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.label_metrics import coverage, label_accuracy
from fedlight.evaluation.memorisation import CopyCheck, Memorisation
from fedlight.evaluation.reference import Moments, Reference
from fedlight.evaluation.scores import frechet, score

Evaluated: TypeAlias = tuple[dict[str, float], Memorisation | None]
"""The scores of a model's images, and their memorisation check; None where it is not configured."""


@dataclass(frozen=True)
class Evaluator:
    """Scores the images of every model of a cell.

    Attributes:
        extractor: computes the features of images.
        reference: the real images that the scores compare with.
        labels: of the reference's images, int64, shape (n,).
        seen: whether a client has training images of a class, bool, shape (clients, classes).
        copies: the check for copies of training images; None where it is not configured.
        bootstrap: number of resamples for the standard error of FID; None where it is not configured.
        downstream: trains classifiers on generated and on real images; None where it is not configured.
    """

    extractor: Extractor
    reference: Reference
    labels: Tensor
    seen: NDArray[np.bool_]
    copies: CopyCheck | None = None
    bootstrap: int | None = None
    downstream: Downstream | None = None

    def __call__(self, images: Tensor, client: int | None, class_labels: Tensor | None) -> Evaluated:
        """Scores generated images, uint8, shape (n, channels, height, width), and checks them for copies.

        Args:
            images: of one model.
            client: number of the client whose model it is; None for the global model.
            class_labels: that the images were conditioned on, int64, shape (n,); None for an unconditional
                model.

        Returns:
            The metrics of `score`; with the classifier as extractor also those of `coverage` and
            `label_accuracy`, named `coverage.NAME` and `label_accuracy.NAME`; for a client's model also
            `own_fid`, the FID to the real images of the client's seen classes, if these outnumber the
            features; if they are configured, `fid_standard_error` of the bootstrap and
            `downstream_accuracy.generated` and `.own`. And the memorisation check, or None.
        """
        features = self.extractor(images)
        metrics = score(features, self.reference)
        if self.extractor.name == "classifier" and features.logits is not None:
            metrics |= {f"coverage.{name}": value for name, value in coverage(features.logits).items()}
            if class_labels is not None:
                seen = self.seen if client is None else self.seen[[client]]
                accuracy = label_accuracy(features.logits, class_labels, seen)
                metrics |= {f"label_accuracy.{name}": value for name, value in accuracy.items()}
        if client is not None:
            real = self.reference.features.values[torch.from_numpy(self.seen[client])[self.labels]]
            if len(real) > self.extractor.dimension:
                metrics["own_fid"] = frechet(Moments.of(features.values), Moments.of(real))
        if self.bootstrap is not None:
            metrics["fid_standard_error"] = fid_standard_error(
                features.values, self.reference.moments, self.bootstrap
            )
        if self.downstream and class_labels is not None:
            metrics["downstream_accuracy.generated"] = self.downstream.generated(images, class_labels)
            metrics["downstream_accuracy.own"] = self.downstream.own(client)
        return metrics, self.copies(features.values) if self.copies else None
