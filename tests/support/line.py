"""A linear model whose gradient of each row is known, trained with example-level privacy."""

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedlight.privacy.example_level import PrivateGradients


class Line(LightningModule):
    """w x with squared error; the gradient of each row is known."""

    def __init__(self, width: int = 3, jitter: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.jitter = jitter

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x = x + self.jitter * torch.randn_like(x)
        return (x @ self.weight - y).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(module: Line, rows: tuple[Tensor, Tensor], epochs: int = 1, **options: Any) -> Tensor:
    """Trains on one batch of all rows; returns by how much the weight fell, which is the gradient."""
    arguments = {"noise": 0.0, "clip": math.inf, "batch_size": len(rows[0]), "draws": 1, "secret": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PrivateGradients(**{**arguments, **options})],
    )
    before = module.weight.detach().clone()
    trainer.fit(module, DataLoader([rows], batch_size=None))
    assert "training_step" not in vars(module)
    return before - module.weight.detach()


def rows(count: int, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, width, generator=generator), 10 * torch.randn(count, generator=generator)
