"""What one client sees: a LightningDataModule over its own images."""

from collections.abc import Iterator

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from fedlight.data.partition import Indices


class Rows(TorchDataset[Tensor]):
    """The images of one client; an item is a whole batch, taken by its positions in one gather."""

    def __init__(self, pixels: Tensor, indices: Indices) -> None:
        self.pixels = pixels
        self.indices = torch.from_numpy(indices).sort().values

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self.pixels[self.indices[positions]]


class ShuffledBatches(Sampler[Tensor]):
    """Positions in random order, a batch at a time; the last short batch is kept."""

    def __init__(self, images: int, batch_size: int) -> None:
        self.images = images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randperm(self.images).split(self.batch_size))


class ClientData(LightningDataModule):
    """The private images of one client.

    Args:
        pixels: of the whole training set, uint8, shape (n, channels, height, width).
        indices: of the client's images; their order does not matter.
        batch_size: images a batch.
    """

    def __init__(self, pixels: Tensor, indices: Indices, batch_size: int) -> None:
        super().__init__()
        self.rows = Rows(pixels, indices)
        self.batch_size = batch_size

    @property
    def num_examples(self) -> int:
        """n_k, the number of the client's images."""
        return len(self.rows)

    def train_dataloader(self) -> DataLoader[Tensor]:
        batches = ShuffledBatches(len(self.rows), self.batch_size)
        return DataLoader(self.rows, sampler=batches, batch_size=None)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        """Scales bytes to [-1, 1], float32, on the training device."""
        return batch.float().div_(127.5).sub_(1)
