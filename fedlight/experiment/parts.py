"""The parts of a cell, as `setup` puts them together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.data.client_data import ClientData
from fedlight.data.dataset import Dataset
from fedlight.data.partition import Indices, pool
from fedlight.diffusion.ddpm import DDPM
from fedlight.evaluation.evaluator import Evaluator
from fedlight.experiment.flops import ImageFlops, image_flops
from fedlight.experiment.mechanisms import EXAMPLE
from fedlight.experiment.model_evaluator import ModelEvaluator
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.client_ranks import ClientRanks
from fedlight.federation.codec import Codec
from fedlight.federation.method import Method
from fedlight.federation.secure.secure_sum import SecureAggregation
from fedlight.federation.slices import SliceMap
from fedlight.federation.trainer import max_workers
from fedlight.finetuning.frozen_bf16 import FrozenInBf16, is_exact
from fedlight.finetuning.latents import LatentSpace
from fedlight.runtime.stopwatch import Stopwatch

CHECKPOINT = "checkpoint"  # in a cell's folder


@dataclass(frozen=True)
class CellParts:
    """The parts of a cell, all of them checked before anything is written.

    Attributes:
        config: of the cell, as the user set it.
        dataset: with the training images that are assigned to clients.
        client_indices: for each client the positions of its training images.
        model: the client model with its first weights.
        slices: the slice map of the model.
        method: resolved over the slices.
        algorithm: how the global model steps, and what clients add to their training.
        codec: how slices are encoded.
        noise: multiplier of the noise of `privacy`, 0 without privacy.
        make_trainer: makes a fresh Trainer from its `callbacks`.
        device: that clients train on.
        fuse: largest number of clients that train in one computation.
        aggregation: how updates are summed securely; None where the server receives them one by one.
        evaluator: None where no image is scored.
        drawing: measures the time in which images are drawn from models.
        latents: where the model denoises; None for images.
        ranks: the part of each adapter that a client has.
    """

    config: CellConfig
    dataset: Dataset
    client_indices: list[Indices]
    model: DDPM
    slices: SliceMap
    method: Method
    algorithm: FedAvg
    codec: Codec
    noise: float
    make_trainer: Callable[..., Trainer]
    device: torch.device
    fuse: int = 1
    aggregation: SecureAggregation | None = None
    evaluator: Evaluator | None = None
    drawing: Stopwatch = field(default_factory=Stopwatch)
    latents: LatentSpace | None = None
    ranks: ClientRanks = field(default_factory=ClientRanks)

    @property
    def max_workers(self) -> int:
        """How many clients may train, or batches be denoised, at once in the cell."""
        return max_workers(self.config.trainer, self.device)

    @property
    def training_indices(self) -> list[Indices]:
        """The images of each client that trains; where the method pools images, one client has them all."""
        return [pool(self.client_indices)] if self.method.pool else self.client_indices

    @property
    def model_evaluator(self) -> ModelEvaluator:
        """What draws images from the models of the cell and scores them."""
        return ModelEvaluator(
            self.config,
            self.model,
            self.device,
            self.evaluator,
            self.dataset.classes,
            self.max_workers,
            self.drawing,
            self.latents,
        )

    @cached_property
    def frozen_bf16(self) -> list[FrozenInBf16]:
        """Holds frozen weights in bf16 on a GPU where that changes no bit; on a CPU it would save nothing."""
        private = self.config.privacy and self.config.privacy.name == EXAMPLE
        if self.device.type != "cuda" or self.fuse > 1 or private:
            return []
        exact = is_exact(self.model.unet, bool(self.model.frozen), self.make_trainer().precision)
        return [FrozenInBf16()] if exact else []

    @cached_property
    def image_flops(self) -> ImageFlops:
        """Floating-point operations of an image in training and in denoising."""
        return image_flops(self.model, self.denoised_shape)

    @property
    def denoised_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model denoises: of an image, or of its latents."""
        return self.latents.shape if self.latents else self.config.data.shape

    @property
    def largest_batch(self) -> int:
        """Images of the largest training step of a client."""
        return min(self.config.data.batch_size, max(map(len, self.training_indices)))

    def first_batch(self, images: int) -> Any:
        """A batch of the first training images, as a training step receives it, on the device."""
        pixels, labels = self.training_data(images)
        data = ClientData(pixels, np.arange(images), images, labels)
        (drawn,) = data.train_dataloader()
        return data.on_after_batch_transfer(drawn, 0)

    def training_data(self, images: int | None = None) -> tuple[Tensor, Tensor | None]:
        """What the model is trained on, on the device, and the labels where it takes them.

        Args:
            images: number of first training images; None for all, whose latents are kept in the cache.

        Returns:
            Pixels, uint8, or latents, float32; and labels, int64, or None.
        """
        train = self.dataset.train.first(images)
        labels = torch.from_numpy(train.labels).to(self.device) if self.config.model.conditional else None
        if self.latents is None:
            return train.pixels.to(self.device), labels
        if images is not None:
            return self.latents.encode(train.pixels.to(self.device)), labels
        cached = self.latents.encode_cached(train.pixels, self.config.evaluation.cache, self.device)
        return cached.to(self.device), labels
