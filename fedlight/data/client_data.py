"""The training batches of one client, as a LightningDataModule over its images."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from fedlight.data.partition import Indices
from fedlight.runtime.pixels import to_floats
from fedlight.runtime.system_random import SystemGenerator

Batch: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Images, or images and labels."""
Sampling: TypeAlias = Literal["seeded", "secret"]
"""Source of Poisson batches: torch's seed, or the operating system's cryptographic generator."""


class Rows(TorchDataset[Batch]):
    """The images of one client; an item is a whole batch, indexed by a tensor of positions."""

    def __init__(self, pixels: Tensor, labels: Tensor | None, indices: Indices) -> None:
        self.pixels = pixels
        self.labels = labels
        self.indices = torch.from_numpy(indices).sort().values

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: Tensor) -> Batch:
        rows = self.indices[positions]
        return self.pixels[rows] if self.labels is None else (self.pixels[rows], self.labels[rows])


class ShuffledBatches(Sampler[Tensor]):
    """Yields positions in random order, one batch at a time; the last batch may be smaller."""

    def __init__(self, images: int, batch_size: int) -> None:
        self.images = images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randperm(self.images).split(self.batch_size))


class PoissonBatches(Sampler[Tensor]):
    """Yields Poisson batches: each position is included independently, so that a batch may be empty.

    An epoch has as many batches as with `ShuffledBatches`.

    Args:
        images: number of the client's images, 1 or more.
        batch_size: expected number of images in a batch.
        secret: draw from the operating system's cryptographic generator, not from torch's seed.
    """

    def __init__(self, images: int, batch_size: int, secret: bool) -> None:
        self.images = images
        self.rate = poisson_rate(images, batch_size)
        self.batches = -(-images // batch_size)
        self.secret = secret

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        if self.secret:
            system = SystemGenerator()
            for _ in range(self.batches):
                yield torch.from_numpy(np.flatnonzero(system.random(self.images) < self.rate))
            return
        generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        for _ in range(self.batches):
            yield (torch.rand(self.images, generator=generator) < self.rate).nonzero().flatten()


def poisson_rate(images: int, batch_size: int) -> float:
    """The probability that a Poisson batch includes an image."""
    return min(1.0, batch_size / images)


class ClientData(LightningDataModule):
    """The batches of one client's private images.

    Args:
        pixels: of the whole training set, uint8, shape (n, channels, height, width); or its latents, float32.
        indices: of the client's images, in any order.
        batch_size: images a batch.
        labels: of the whole training set, int64, shape (n,); None for an unconditional model.
        poisson: the source of Poisson batches; None for shuffled batches.
    """

    def __init__(
        self,
        pixels: Tensor,
        indices: Indices,
        batch_size: int,
        labels: Tensor | None = None,
        poisson: Sampling | None = None,
    ) -> None:
        super().__init__()
        self.rows = Rows(pixels, labels, indices)
        self.batch_size = batch_size
        self.poisson = poisson

    @property
    def num_examples(self) -> int:
        """n_k, the number of the client's images."""
        return len(self.rows)

    def train_dataloader(self) -> DataLoader[Batch]:
        batches: Sampler[Tensor] = (
            PoissonBatches(len(self.rows), self.batch_size, self.poisson == "secret")
            if self.poisson
            else ShuffledBatches(len(self.rows), self.batch_size)
        )
        return DataLoader(self.rows, sampler=batches, batch_size=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Scales bytes to [-1, 1], float32, on the training device; latents stay as they are."""
        if isinstance(batch, Tensor):
            return _to_training_values(batch)
        pixels, labels = batch
        return _to_training_values(pixels), labels


def _to_training_values(pixels: Tensor) -> Tensor:
    return to_floats(pixels) if pixels.dtype == torch.uint8 else pixels
