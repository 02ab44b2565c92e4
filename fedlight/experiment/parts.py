"""The parts of a cell, as `setup` puts them together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from lightning import Trainer
from torch import Tensor

from fedlight.config import CellConfig
from fedlight.data.dataset import Dataset
from fedlight.data.partition import Indices, pool
from fedlight.diffusion.ddpm import DDPM
from fedlight.evaluation.evaluator import Evaluator
from fedlight.experiment.model_evaluator import ModelEvaluator
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.codec import Codec
from fedlight.federation.method import Method
from fedlight.federation.secure.secure_sum import SecureAggregation
from fedlight.federation.slices import SliceMap
from fedlight.federation.trainer import max_workers
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
        aggregation: how updates are summed securely; None where the server receives them one by one.
        evaluator: None where no image is scored.
        drawing: measures the time in which images are drawn from models.
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
    aggregation: SecureAggregation | None = None
    evaluator: Evaluator | None = None
    drawing: Stopwatch = field(default_factory=Stopwatch)

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
        )

    def training_data(self) -> tuple[Tensor, Tensor | None]:
        """Pixels of the training images on the device, and their labels where the model takes them."""
        train, conditional = self.dataset.train, self.config.model.conditional
        labels = torch.from_numpy(train.labels).to(self.device) if conditional else None
        return train.pixels.to(self.device), labels
