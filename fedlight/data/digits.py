"""scikit-learn's digits: 1,797 grey 8x8 images in 10 classes, part of the library."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fedlight.data.dataset import Dataset, Images


def load() -> Dataset:
    """Loads the digits, with a fixed stratified split into 1,437 training and 360 test images."""
    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None])
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return Dataset(
        train=Images(pixels[train], labels[train]),
        test=Images(pixels[test], labels[test]),
        classes=tuple(str(name) for name in digits.target_names),
    )
