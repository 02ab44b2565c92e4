"""The loss of a training step, as Lightning's callbacks receive it."""

from collections.abc import Mapping
from typing import Any

from lightning import Trainer
from torch import Tensor


def batch_loss(trainer: Trainer, outputs: Any) -> Tensor:
    """The mean loss of the batch, detached, shape ().

    Lightning divides what `training_step` returns by `accumulate_grad_batches`; this is the loss before that.

    Args:
        trainer: that trains.
        outputs: of `on_train_batch_end`: a loss, or a mapping that holds it.
    """
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    return loss.detach() * trainer.accumulate_grad_batches
