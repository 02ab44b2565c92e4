"""The losses, images and steps of the clients that train, as Lightning's callbacks receive them."""

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

CLIENT_LOSSES, CLIENT_IMAGES = "client_losses", "client_images"
"""Entries of the output of a training step of several clients: tensors of shape (clients,)."""
CLIENT_STEPS = "client_steps"
"""Attribute of the module of several clients: the steps of each, after a fit."""


def client_losses(trainer: Trainer, outputs: Any) -> Tensor:
    """The mean loss of the batch of each client that trains in this step, detached, shape (clients,).

    Lightning divides what `training_step` returns by `accumulate_grad_batches`; this is the loss before that.

    Args:
        trainer: that trains.
        outputs: of `on_train_batch_end`: a loss, or a mapping that holds it.
    """
    if isinstance(outputs, Mapping) and CLIENT_LOSSES in outputs:
        losses: Tensor = outputs[CLIENT_LOSSES]
        return losses
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    return (loss.detach() * trainer.accumulate_grad_batches).reshape(1)


def client_images(outputs: Any, batch: Any) -> Tensor | int:
    """The number of images of each client in the batch."""
    if isinstance(outputs, Mapping) and CLIENT_IMAGES in outputs:
        images: Tensor = outputs[CLIENT_IMAGES]
        return images
    return extract_batch_size(batch)


def client_steps(trainer: Trainer, module: LightningModule) -> list[int]:
    """The number of optimizer steps of each client, at the end of a fit."""
    return getattr(module, CLIENT_STEPS, None) or [trainer.global_step]
