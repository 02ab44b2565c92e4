"""No images: those of a federation whose server holds none, and where nobody asks for any."""

from collections.abc import Sequence

import numpy as np
import torch

from fedlight.data.dataset import Dataset, Images


def no_images(image_size: int, channels: int, classes: Sequence[str]) -> Dataset:
    """One blank image of the first class, since a data set has at least one."""
    blank = Images(torch.zeros(1, channels, image_size, image_size, dtype=torch.uint8), np.zeros(1, np.int64))
    return Dataset(blank, blank, tuple(classes))
