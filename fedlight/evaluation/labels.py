"""The classes of generated images, as the classifier sees them: coverage, and whether they are as asked."""

import numpy as np
import torch
from numpy.typing import NDArray
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


def label_accuracy(logits: Tensor, asked: Tensor, held: NDArray[np.bool_]) -> dict[str, float]:
    """The share of images in which the classifier sees the label that was asked for; chance is 1 / classes.

    Args:
        logits: of the classifier, float32, shape (n, classes).
        asked: int64 in 0..classes-1, shape (n,).
        held: whether a client has training images of a class, shape (clients, classes).

    Returns:
        `all`: of all images. `held`, `unseen`: of those whose label a client holds, and does not hold; the
        mean over the clients that have any, and absent without one.
    """
    right, labels = (logits.argmax(dim=1) == asked).numpy(), asked.numpy()
    found = {"all": float(right.mean())}
    for name, classes in (("held", held), ("unseen", ~held)):
        chosen = [right[row[labels]] for row in classes if row[labels].any()]
        if chosen:
            found[name] = float(np.mean([images.mean() for images in chosen]))
    return found
