"""Feature extractors: networks that turn images into the features that every metric compares."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from fedlight.evaluation import classifier
from fedlight.runtime.cache import load_or_make
from fedlight.runtime.errors import BadInput
from fedlight.runtime.files import file_sha256
from fedlight.runtime.hashing import tensors_sha256
from fedlight.runtime.progress import track

INCEPTION = "inception-v3-compat"
INCEPTION_LAYERS = ["2048", "logits_unbiased"]
DIMENSIONS = {"classifier": classifier.DIMENSION, "inception": 2048}  # of the features
BATCH = 128


class Features(NamedTuple):
    """An extractor's output for n images.

    Attributes:
        values: float32, shape (n, dimension), on the CPU.
        logits: float32, shape (n, classes), on the CPU.
    """

    values: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Extractor:
    """One of torch-fidelity's feature extractors with its weights.

    Attributes:
        name: classifier or inception.
        network: uint8 images -> (features, logits).
        channels: number of channels that the network takes.
        accuracy: share of test images that the classifier labels correctly, 0..1; None for inception.
        sha256: of the weights' file.
    """

    name: str
    network: FeatureExtractorBase
    channels: int
    accuracy: float | None
    sha256: str

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """The features of uint8 images, shape (n, channels, height, width); grey ones are expanded to RGB."""
        device = next(self.network.buffers()).device
        outputs: list[tuple[Tensor, ...]] = []
        batches = pixels.split(BATCH)
        for batch in track(batches, f"features of {len(pixels):,} images", len(batches)):
            expanded = batch.expand(-1, self.channels, -1, -1).to(device)
            outputs.append(tuple(layer.cpu() for layer in self.network(expanded)))
        values, logits = (torch.cat(layer) for layer in zip(*outputs, strict=True))
        return Features(values, logits)


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
    network = _create(classifier.NAME, [classifier.FEATURES, classifier.LOGITS], path).to(device)
    return Extractor("classifier", network, train_set[0].shape[1], network.accuracy, file_sha256(path))


def make_inception(weights: Path, device: torch.device) -> Extractor:
    """torch-fidelity's `inception-v3-compat` with the given weights.

    Raises:
        BadInput: the file contains anything else, or would run code.
    """
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity unpickles the file
        network = _create(INCEPTION, INCEPTION_LAYERS, weights).to(device)
    except Exception as error:  # torch's readers have errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"evaluation.weights: {weights} does not hold the weights of {INCEPTION} ({reason})"
        ) from error
    return Extractor("inception", network, 3, None, file_sha256(weights))


def _create(name: str, layers: list[str], weights: Path) -> FeatureExtractorBase:
    with torch.random.fork_rng(devices=[]):  # the network is initialised at random before it is loaded
        return create_feature_extractor(
            name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
        )
