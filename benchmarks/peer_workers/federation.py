"""A federation in one file, which fedlight writes and all workers read; the training of a client.

Workers run in the environment of their framework: torch, safetensors, diffusers and the UNet's own file.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlight.diffusion.unet import ConvNextUNet

SETTINGS = "federation"  # key of the settings in the file's header
WEIGHTS = "weights."  # prefix of the names of the first weights


@dataclass(frozen=True)
class Federation:
    """What is trained by whom, and when.

    Attributes:
        epochs: local epochs of a round.
        batch_size: images of a step; the last batch of an epoch may be smaller.
        learning_rate: of Adam, whose state is new in each round.
        unet: arguments of the UNet.
        workers: processes or threads that train clients at the same time.
        cohorts: for each round the clients that take part.
        seeds: for each round the seed of each of its clients.
        pixels: all training images, uint8, shape (n, channels, height, width).
        alpha_bar: of the noise schedule, float32, shape (T,).
        offsets: client k has the images `indices[offsets[k] : offsets[k + 1]]`.
        indices: positions of the images, int64, sorted for each client.
        weights: of the UNet before the first round.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    unet: Mapping[str, Any]
    workers: int
    cohorts: list[list[int]]
    seeds: list[list[int]]
    pixels: Tensor
    alpha_bar: Tensor
    offsets: Tensor
    indices: Tensor
    weights: dict[str, Tensor]

    @property
    def clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def make_optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        return partial(torch.optim.Adam, lr=self.learning_rate, fused=True)

    def images(self, client: int) -> Tensor:
        """The images of a client, uint8."""
        return self.pixels[self.indices[self.offsets[client] : self.offsets[client + 1]]]

    def seed(self, round_: int, client: int) -> int:
        """The seed of a client's update; rounds count from 0."""
        return self.seeds[round_][self.cohorts[round_].index(client)]

    def make_unet(self) -> ConvNextUNet:
        """The UNet with its first weights."""
        unet = ConvNextUNet(**self.unet).to(memory_format=torch.channels_last)
        unet.load_state_dict(self.weights)
        return unet


@dataclass(frozen=True)
class Fit:
    """A finished local update.

    Attributes:
        loss: mean of an image over the last epoch.
        steps: of the optimizer.
        seen: images of these steps.
        images: n_k, of the client.
    """

    loss: float
    steps: int
    seen: int
    images: int


def write(federation: Federation, path: Path) -> None:
    """Writes a federation as safetensors: the tensors, and the settings as JSON in the header."""
    values = vars(federation)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    tensors |= {f"{WEIGHTS}{name}": value.contiguous() for name, value in federation.weights.items()}
    settings = {name: value for name, value in values.items() if name not in tensors and name != "weights"}
    save_file(tensors, path, {SETTINGS: json.dumps(settings)})


def read(path: str | Path) -> Federation:
    """Reads what `write` wrote."""
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()[SETTINGS])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    weights = {name.removeprefix(WEIGHTS): t for name, t in tensors.items() if name.startswith(WEIGHTS)}
    others = {name: t for name, t in tensors.items() if not name.startswith(WEIGHTS)}
    return Federation(**settings, **others, weights=weights)


def shuffled_batches(images: Tensor, batch_size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """The batches of an epoch, float32 in [-1, 1], with the draws of fedlight's data loader."""
    drawn = torch.randperm(len(images), generator=rng)
    torch.empty((), dtype=torch.int64).random_(generator=rng)  # a DataLoader's draw for its workers
    for batch in drawn.split(batch_size):
        yield images[batch].float().div_(127.5).sub_(1)


def diffusion_loss(unet: nn.Module, x_0: Tensor, alpha_bar: Tensor, rng: torch.Generator) -> Tensor:
    """The loss of a step: smooth L1 between noise and prediction at random time steps (DDPM, algorithm 1)."""
    t = torch.randint(len(alpha_bar), x_0.shape[:1], generator=rng)
    eps = torch.randn(x_0.shape, generator=rng)
    signal, noise = (factor.view(-1, 1, 1, 1) for factor in (alpha_bar[t] ** 0.5, (1 - alpha_bar[t]) ** 0.5))
    return F.smooth_l1_loss(unet(signal * x_0 + noise * eps, t).sample, eps)


def fit(unet: nn.Module, federation: Federation, round_: int, client: int) -> Fit:
    """Trains the UNet on a client's images; the draws are those of fedlight's client in that round."""
    rng = torch.Generator().manual_seed(federation.seed(round_, client))
    images = federation.images(client)
    optimizer = federation.make_optimizer(unet.parameters())
    steps = 0
    for _ in range(federation.epochs):
        total = torch.zeros(())
        for x_0 in shuffled_batches(images, federation.batch_size, rng):
            loss = diffusion_loss(unet, x_0, federation.alpha_bar, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(x_0)
            steps += 1
    return Fit(total.item() / len(images), steps, federation.epochs * len(images), len(images))


class Report:
    """The measurements of a run, printed as the last line of its output."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.steps = self.images = 0
        self.begun = 0.0

    def begin(self) -> None:
        """Marks the beginning of the first round."""
        self.begun = time.perf_counter()

    def end_round(self, loss: float, steps: int, images: int) -> None:
        """Marks the end of a round: mean loss of an image, and the steps and images of all its clients."""
        self.ends.append(time.perf_counter())
        self.loss, self.steps, self.images = loss, self.steps + steps, self.images + images

    def print(self, weights: Mapping[str, Tensor], out: str) -> None:
        """Writes the global weights after the last round to `out` (safetensors); prints the rest as JSON."""
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, out)
        seconds = [end - begin for begin, end in zip([self.begun, *self.ends], self.ends, strict=False)]
        figures = {"seconds": seconds, "loss": self.loss, "steps": self.steps, "images": self.images}
        print(json.dumps(figures), flush=True)


def mean_loss(fits: list[Fit]) -> float:
    """The mean loss of an image over clients."""
    return sum(fit.loss * fit.images for fit in fits) / sum(fit.images for fit in fits)
