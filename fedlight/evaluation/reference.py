"""The reference of the scores: features of real images, extracted once and cached."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlight.evaluation.density import neighbour_radii
from fedlight.evaluation.extractor import Extractor, Features
from fedlight.runtime.cache import load_or_make
from fedlight.runtime.hashing import tensors_sha256


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, the input of FID.

    Attributes:
        mean: float64, shape (dimension,).
        covariance: float64, shape (dimension, dimension), divided by n - 1.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """The moments of features of shape (n, dimension), n at least 2."""
        exact = values.double()
        return cls(exact.mean(dim=0), torch.cov(exact.T))


@dataclass(frozen=True)
class Reference:
    """Features of real images, with their moments."""

    features: Features
    moments: Moments

    @cached_property
    def radii(self) -> Tensor:
        """The distance of each image to its neighbours, for density and coverage."""
        return neighbour_radii(self.features.values)


def make_reference(pixels: Tensor, extractor: Extractor, cache: str) -> Reference:
    """The reference of uint8 images, shape (n, channels, height, width), from the cache or computed now.

    The cached file is named by hashes of the images and of the weights, and by the kind of device, since
    rounding differs between devices.
    """
    device = extractor.device.type
    hardware = device if device != "cpu" else f"cpu{torch.get_num_threads()}"
    key = f"{tensors_sha256([pixels])[:16]}-{extractor.sha256[:16]}-{hardware}"
    path = Path(cache) / "reference" / f"{extractor.name}-{key}.safetensors"

    def make(temporary: Path) -> None:
        features = extractor(pixels)
        moments = Moments.of(features.values)
        tensors = {"values": features.values, "mean": moments.mean, "covariance": moments.covariance}
        if features.logits is not None:
            tensors["logits"] = features.logits
        save_file(tensors, temporary)

    stored = load_or_make(path, load_file, make)
    features = Features(stored["values"], stored.get("logits"))
    return Reference(features, Moments(stored["mean"], stored["covariance"]))
