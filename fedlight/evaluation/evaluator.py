"""The evaluator of a cell's images: one extractor and the real images that it compares with."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.memorisation import CopyCheck, Memorisation
from fedlight.evaluation.reference import Reference
from fedlight.evaluation.scores import score

Evaluated: TypeAlias = tuple[dict[str, float], Memorisation | None]
"""The scores of a model's images, and how near they lie to the training images, where that was asked."""


@dataclass(frozen=True)
class Evaluator:
    """Made once a cell, and used for every model of it.

    Attributes:
        extractor: what sees the images.
        reference: what the scores compare with.
        copies: looks for copies of training images, where memorisation is to be checked.
    """

    extractor: Extractor
    reference: Reference
    copies: CopyCheck | None = None

    def __call__(self, images: Tensor) -> Evaluated:
        """Scores generated images, uint8, shape (n, channels, height, width), and checks them for copies."""
        seen = self.extractor(images)
        return score(seen, self.reference), self.copies(seen.values) if self.copies else None
