"""The callback that turns a Lightning fit into a local update."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm

from fedlight.federation.messages import State
from fedlight.runtime.errors import BadInput, Diverged
from fedlight.runtime.training_loss import client_images, client_losses, client_steps


class Federator(Callback):
    """Loads the state to train from at fit start, and copies the trained state at fit end.

    Where several clients train in one computation, all tensors are stacked (`fedlight.federation.stack`).

    Args:
        clients, round_: for messages.
        state: the state_dict to train from: the received slices over the private ones.
        optimizer: tensors of the optimizer's state to continue from; None for a new optimizer.
        rate: factor of the optimizer's learning rate.
        frozen: names of parameters that are not trained.
        batches: of a local epoch of each client; None for those of the Trainer's epoch.

    Attributes:
        trained: the state_dict after the fit, on the CPU.
        kept_optimizer: tensors of the optimizer's state after the fit; empty where `optimizer` was None.
        losses: of each client the mean training loss of an image over the last local epoch.
        steps: of each client its optimizer steps in the fit.
    """

    def __init__(
        self,
        clients: Sequence[int],
        round_: int,
        state: State,
        optimizer: State | None,
        rate: float = 1.0,
        frozen: Collection[str] = (),
        batches: Sequence[int] | None = None,
    ) -> None:
        self._clients = clients
        self._round = round_
        self._state = state
        self._optimizer = optimizer
        self._rate = rate
        self._frozen = frozen
        self._batches = batches
        self.kept_optimizer: State = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loss = torch.zeros(len(self._clients), device=pl_module.device)
        self._images = torch.zeros_like(self._loss, dtype=torch.int64)
        pl_module.load_state_dict(self._state, strict=True)
        if self._optimizer:
            restore_optimizer(trainer.optimizers[0], self._optimizer)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= self._rate
        self._freeze(pl_module, True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = self._batches or [int(trainer.num_training_batches)]
        self._epochs = [(batches, batches * (trainer.max_epochs or 1)) for batches in epoch]
        self._taken = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for place, (batches, total) in enumerate(self._epochs):
            if self._taken % batches == 0 and self._taken < total:  # a new epoch of the client
                self._loss[place] = 0
                self._images[place] = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        images, losses = client_images(outputs, batch), client_losses(trainer, outputs)
        self._loss[: len(losses)] += losses.to(self._loss) * images
        self._images[: len(losses)] += images
        self._taken += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for client, loss, (batches, total) in zip(
            self._clients, self._loss.tolist(), self._epochs, strict=True
        ):
            if not math.isfinite(loss):
                epoch = -(-min(self._taken, total) // batches)
                raise Diverged(
                    f"the training loss of client {client} became {loss} in round {self._round}, "
                    f"local epoch {epoch}"
                )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images = self._images.tolist()
        if not (any(images) or trainer.global_step):  # a batch of a Poisson sample may be empty
            raise BadInput(f"client {self._clients[0]} trained on no image in round {self._round}")
        self._freeze(pl_module, False)
        self.trained = on_cpu(pl_module.state_dict())
        floating = [tensor for tensor in self.trained.values() if tensor.is_floating_point()]
        if not _all_finite(floating):
            clients = ", ".join(map(str, self._clients))
            raise Diverged(f"the weights of client {clients} left the finite numbers in round {self._round}")
        sums = self._loss.tolist()
        self.losses = [total / max(1, count) for total, count in zip(sums, images, strict=True)]
        self.steps = client_steps(trainer, pl_module)
        if self._optimizer is not None:
            self.kept_optimizer = optimizer_state(trainer.optimizers[0])

    def _freeze(self, module: LightningModule, frozen: bool) -> None:
        for name, parameter in module.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(not frozen)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is infinite or NaN; sums are faster than norms, and may overflow."""
    sums = torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors])
    return bool(sums.isfinite().all()) or bool(get_total_norm(tensors, norm_type=math.inf).isfinite())


def on_cpu(state: Mapping[str, Tensor]) -> State:
    """Copies tensors to the CPU; the copies share no memory with the originals."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """The tensors of an optimizer's state, named `<index of the parameter>.<key>`."""
    return {
        f"{index}.{key}": value.detach().cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, kept: State) -> None:
    """Loads copies of the tensors that `optimizer_state` returned.

    A tensor gets the memory layout of its parameter: fused optimizers on the CPU pair the elements of both in
    the order of memory, and what was stored in a file is contiguous.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, State] = {}
    for name, tensor in kept.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            copied = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        else:
            copied = tensor.clone()
        state.setdefault(int(index), {})[key] = copied
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
