"""Metrics of the classes that the classifier assigns to generated images: coverage and label accuracy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PRESENT = 0.2  # smallest share of a covered class, relative to the share under equal frequencies


def coverage(logits: Tensor) -> dict[str, float]:
    """The share of the classes that occur among images, and the evenness of their distribution.

    A class is covered if at least 1 / (5 * classes) of the images are assigned to it: a few misclassified
    images do not make a class covered.

    Args:
        logits: of the classifier, float32, shape (n, classes).

    Returns:
        `share`: of covered classes, 0..1.
        `entropy`: of the distribution of the images over the classes, in nats, 0..ln(classes).
    """
    classes = logits.shape[1]
    shares = torch.bincount(logits.argmax(dim=1), minlength=classes).double() / len(logits)
    present = (shares >= PRESENT / classes).double().mean()
    return {"share": present.item(), "entropy": torch.special.entr(shares).sum().item()}


def label_accuracy(logits: Tensor, class_labels: Tensor, seen: NDArray[np.bool_]) -> dict[str, float]:
    """The share of images that the classifier assigns to the label that they were conditioned on.

    Args:
        logits: of the classifier, float32, shape (n, classes).
        class_labels: that the images were conditioned on, int64 in 0..classes-1, shape (n,).
        seen: whether a client has training images of a class, bool, shape (clients, classes).

    Returns:
        `all`: of all images. `held` and `unseen`: of the images of seen and of unseen classes, averaged over
        the clients that have any, and absent if none has. All are in 0..1; chance is 1 / classes.
    """
    correct, labels = (logits.argmax(dim=1) == class_labels).numpy(), class_labels.numpy()
    accuracies = {"all": float(correct.mean())}
    for name, classes in (("held", seen), ("unseen", ~seen)):
        by_client = [correct[row[labels]] for row in classes if row[labels].any()]
        if by_client:
            accuracies[name] = float(np.mean([images.mean() for images in by_client]))
    return accuracies
