"""The classifier extractor: a small CNN, trained once per data set, and registered with torch-fidelity."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

from fedlight.runtime.pixels import to_floats
from fedlight.runtime.progress import track

NAME = "fedlight-classifier"
FEATURES, LOGITS = "features", "logits"
DIMENSION = 64  # of the features
MIN_SIDE = 8  # of images, in pixels
EPOCHS, MAX_STEPS, BATCH, LR = 50, 2400, 128, 0.01
VERSION = 1  # of the network and its training, part of the cached file's name


class Classifier(FeatureExtractorBase):
    """The trained network as an extractor, which torch-fidelity makes by its name.

    Args:
        name: as registered.
        features_list: of "features" (float32, shape (n, 64)) and "logits" (float32, shape (n, classes)).
        feature_extractor_weights_path: the file that `train` wrote.
        kwargs: torch-fidelity's arguments for other extractors, ignored.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: Path, **kwargs: object
    ) -> None:
        super().__init__(name, features_list)
        with safe_open(feature_extractor_weights_path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
        self.accuracy: float = facts["accuracy"]
        self.body, self.head = _network(**facts["network"])
        self.load_state_dict(load_file(feature_extractor_weights_path))
        self.eval().requires_grad_(False)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return FEATURES, LOGITS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LOGITS if metric == "isc" else FEATURES

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The layers of `features_list` for uint8 images, shape (n, channels, height, width)."""
        features = self.body(_scaled(pixels))
        layers = {FEATURES: features, LOGITS: self.head(features)}
        return tuple(layers[name] for name in self.features_list)


register_feature_extractor(NAME, Classifier)


def train(
    path: Path, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor], classes: int
) -> None:
    """Trains the network, and writes it with its test accuracy as safetensors.

    Args:
        path: of the file.
        train_set: pixels, uint8, shape (n, channels, size, size), and labels, int64 in 0..classes-1.
        test_set: pixels and labels that are not trained on.
        classes: number of labels.
    """
    shape = _shape(train_set, classes)
    steps = count_steps(len(train_set[1]))
    body, head, accuracy = _trained(
        shape, train_set, test_set, steps, "training the classifier of the scores"
    )
    state = {f"body.{name}": tensor.contiguous() for name, tensor in body.state_dict().items()}
    state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(state, path, {"facts": json.dumps({"network": shape, "accuracy": accuracy})})


def measure_accuracy(
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    classes: int,
    steps: int,
    what: str,
) -> float:
    """Trains the network on other images than those of the data set; returns its test accuracy, 0..1.

    Args:
        train_set, test_set, classes: as `train` takes them.
        steps: of the optimizer.
        what: names the training for its progress.
    """
    return _trained(_shape(train_set, classes), train_set, test_set, steps, what)[2]


def count_steps(images: int) -> int:
    """The number of optimizer steps for so many training images."""
    return min(MAX_STEPS, EPOCHS * -(-images // BATCH))


def _shape(train_set: tuple[Tensor, Tensor], classes: int) -> dict[str, int]:
    pixels = train_set[0]
    return {"channels": pixels.shape[1], "image_size": pixels.shape[2], "classes": classes}


def _trained(
    shape: dict[str, int],
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    steps: int,
    what: str,
) -> tuple[nn.Sequential, nn.Linear, float]:
    """The trained body and head, and their test accuracy.

    It uses one CPU thread and its own random seed, so that the same data give the same bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body, head = _network(**shape)
            network = nn.Sequential(body, head).to(memory_format=torch.channels_last)
            _fit(network, *train_set, steps, what)
            return body, head, _accuracy(network, *test_set)
    finally:
        torch.set_num_threads(threads)


def _network(channels: int, image_size: int, classes: int) -> tuple[nn.Sequential, nn.Linear]:
    """Stages that halve the image until it is smaller than 8x8, a mean over its pixels, and a linear head."""
    layers: list[nn.Module] = []
    width, side = 32, image_size
    while side >= MIN_SIDE:
        layers += [*_convolution(channels, width, kernel=5, stride=2), *_convolution(width, width)]
        channels, width, side = width, DIMENSION, side // 2
    layers += [*_convolution(channels, DIMENSION), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers), nn.Linear(DIMENSION, classes)


def _convolution(d_in: int, d_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(d_in, d_out, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(d_out), nn.ReLU()]


def _fit(network: nn.Module, pixels: Tensor, labels: Tensor, steps: int, what: str) -> None:
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    positions = torch.empty(0, dtype=torch.int64)
    for _ in track(range(steps), what, steps):
        while len(positions) < BATCH:
            positions = torch.cat([positions, torch.randperm(len(pixels))])
        batch, positions = positions[:BATCH], positions[BATCH:]
        loss = F.cross_entropy(network(_scaled(pixels[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _accuracy(network: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    network.eval()
    correct = sum(
        int((network(_scaled(batch)).argmax(dim=1) == truth).sum())
        for batch, truth in zip(pixels.split(500), labels.split(500), strict=True)
    )
    return correct / len(labels)


def _scaled(pixels: Tensor) -> Tensor:
    """Bytes as floats in [-1, 1], in channels-last layout."""
    return to_floats(pixels.to(memory_format=torch.channels_last))
