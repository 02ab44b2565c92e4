"""Feature extractors: networks that turn images into the features that every metric compares."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from fedlight.evaluation import classifier, clip, dinov2
from fedlight.runtime.cache import load_or_make
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import file_sha256
from fedlight.runtime.hashing import tensors_sha256
from fedlight.runtime.progress import track

DIMENSIONS = {"classifier": classifier.DIMENSION, "inception": 2048, "dinov2": 1024, "clip": 512}
"""Extractor -> number of its features; of dinov2 and clip with the published weights, see PUBLISHED."""
BATCH = 128


class Network(NamedTuple):
    """A pretrained network of torch-fidelity: its registered name and the layers that are used.

    The first layer has the features, the second, if there is one, the logits of the inception score.
    """

    name: str
    layers: list[str]


NETWORKS = {
    "inception": Network("inception-v3-compat", ["2048", "logits_unbiased"]),
    "dinov2": Network(dinov2.NAME, [dinov2.FEATURES]),
    "clip": Network(clip.NAME, [clip.FEATURES]),
}


class Features(NamedTuple):
    """An extractor's output for n images.

    Attributes:
        values: float32, shape (n, dimension), on the CPU.
        logits: float32, shape (n, classes), on the CPU; None where the extractor has none.
    """

    values: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Extractor:
    """One of torch-fidelity's feature extractors with its weights.

    Attributes:
        name: classifier, inception, dinov2 or clip.
        network: uint8 images -> (features, logits), or (features,).
        dimension: number of the features.
        channels: number of channels that the network takes.
        accuracy: share of test images that the classifier labels correctly, 0..1; None for the others.
        sha256: of the weights' file.
    """

    name: str
    network: FeatureExtractorBase
    dimension: int
    channels: int
    accuracy: float | None
    sha256: str

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(chain(self.network.parameters(), self.network.buffers())).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """The features of uint8 images, shape (n, channels, height, width); grey ones are expanded to RGB."""
        outputs: list[tuple[Tensor, ...]] = []
        batches = pixels.split(BATCH)
        for batch in track(batches, f"features of {len(pixels):,} images", len(batches)):
            expanded = batch.expand(-1, self.channels, -1, -1).to(self.device)
            outputs.append(tuple(layer.cpu() for layer in self.network(expanded)))
        values, *logits = (torch.cat(layer) for layer in zip(*outputs, strict=True))
        return Features(values, logits[0] if logits else None)


def check_classifier(classes: int, side: int) -> None:
    """Raises BadInput for fewer than two classes, and for images of too few pixels on a side."""
    if classes < 2:
        raise BadInput(
            "evaluation.extractor=classifier needs labels, and all images of the data set are of one class: "
            "put each class into a sub-folder of its own, or set evaluation.extractor=inception, or "
            "evaluation.samples=0 for no scores"
        )
    if side < classifier.MIN_SIDE:
        raise BadInput(
            f"evaluation.extractor=classifier needs images of at least {classifier.MIN_SIDE}x"
            f"{classifier.MIN_SIDE}, got {side}x{side}: set evaluation.extractor=inception, which enlarges "
            "them, or evaluation.samples=0 for no scores"
        )


def make_classifier(
    name: str,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    classes: int,
    cache: str,
    device: torch.device,
) -> Extractor:
    """The classifier of a data set, from the cache, or trained now and cached.

    Args:
        name: of the data set, the first part of the cached file's name.
        train_set: all training images, uint8, and their labels, int64.
        test_set: all test images and their labels.
        classes: number of labels.
        cache: fedlight's cache folder.
        device: of the extraction; training always uses the CPU.
    """
    content = tensors_sha256([*train_set, *test_set])[:16]
    path = Path(cache) / "classifier" / f"{name}-v{classifier.VERSION}-{content}.safetensors"

    def check(file: Path) -> Path:
        with safe_open(file, framework="pt") as opened:
            opened.metadata()["facts"]
        return file

    load_or_make(path, check, lambda temporary: classifier.train(temporary, train_set, test_set, classes))
    layers = [classifier.FEATURES, classifier.LOGITS]
    network = _create(Network(classifier.NAME, layers), path).to(device)
    channels = train_set[0].shape[1]
    return Extractor(
        "classifier", network, classifier.DIMENSION, channels, network.accuracy, file_sha256(path)
    )


def make_pretrained(name: str, weights: Path, device: torch.device) -> Extractor:
    """A pretrained extractor of torch-fidelity with the given weights.

    Args:
        name: a key of NETWORKS.
        weights: the file of its weights.
        device: of the extraction.

    Raises:
        BadInput: the file contains anything else, or would run code.
    """
    try:
        if name == "inception":
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity unpickles the file
        network = _create(NETWORKS[name], weights).to(device)
    except Exception as error:  # torch's readers have errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, UnpicklingError):  # torch advises to load the file in spite of it
            reason = "it contains something else than tensors"
        raise BadInput(
            f"evaluation.weights: {weights} does not hold the weights of {NETWORKS[name].name} ({reason})"
        ) from error
    dimension = getattr(network, "dimension", DIMENSIONS[name])
    return Extractor(name, network, dimension, 3, None, file_sha256(weights))


def _create(network: Network, weights: Path) -> FeatureExtractorBase:
    with torch.random.fork_rng(devices=[]):  # the network is initialised at random before it is loaded
        return create_feature_extractor(
            network.name, network.layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
        )
