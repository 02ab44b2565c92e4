"""What classes generated images are of, as the classifier sees them: their coverage."""

import torch
from torch import Tensor

PRESENT = 0.2  # of the share that each class would have, were all equally frequent


def coverage(logits: Tensor) -> dict[str, float]:
    """How many of the classes turn up among images, and how evenly.

    A class is there if at least 1 / (5 * classes) of the images are of it, so that the few images that the
    classifier mistakes for another class do not count as that class.

    Args:
        logits: of the classifier, float32, shape (n, classes).

    Returns:
        `share`: of the classes that are there, 0..1.
        `entropy`: of the distribution of the images over the classes, in nats, 0..ln(classes).
    """
    classes = logits.shape[1]
    shares = torch.bincount(logits.argmax(dim=1), minlength=classes).double() / len(logits)
    present = (shares >= PRESENT / classes).double().mean()
    return {"share": present.item(), "entropy": torch.special.entr(shares).sum().item()}
