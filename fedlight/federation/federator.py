"""The federator: it sends slices to a client's Trainer, takes its report, and merges the round."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from fedlight.federation.aggregate import Merge
from fedlight.federation.cohort import Task
from fedlight.federation.ledger import Direction, Entry, Ledger
from fedlight.federation.method import Method
from fedlight.federation.slices import SliceMap
from fedlight.federation.store import Report, State, Store
from fedlight.runtime.errors import BadInput, Diverged

OPTIMIZER = "optimizer."


class Federator(Callback):
    """A callback of every client's Trainer; the only way between clients and the global model.

    Before a fit it loads the task's downlink slices over what the client kept, after it hands the
    uplink slices to the merge and the private ones to the client's own store. Nothing else passes
    from one fit to the next, so the order of the clients does not matter.

    Args:
        method: resolved over the slices.
        slices: the slice map of the module.
        module: gives the initial global state.
        store: where reports and private states live.

    Attributes:
        state: the global model, all slices, on the CPU.
        ledger: what crossed so far.
        task: what the client in training is to do; set before each fit.
    """

    def __init__(self, method: Method, slices: SliceMap, module: LightningModule, store: Store) -> None:
        self.method = method
        self.slices = slices
        self.store = store
        self.ledger = Ledger()
        self._met: set[int] = set()
        self.task: Task | None = None
        initial = _on_cpu(module.state_dict())
        self.state: State = slices.select(slices.names, initial)
        self._first_private: State = {name: initial[name] for name in slices.private}
        staying = [name for name in slices.names if name not in method.downlink]
        self._private_names = (*slices.private, *slices.select(staying, self.state))

    @property
    def model_params(self) -> int:
        """N, the number of scalars in all slices."""
        return sum(self.slice_params().values())

    @property
    def keeping(self) -> bool:
        """Whether clients carry anything over from round to round."""
        return bool(self._private_names) or self.method.keep_optimizer

    def slice_params(self) -> dict[str, int]:
        """The number of scalars in each slice."""
        return {
            slice_: sum(tensor.numel() for tensor in self.slices.select([slice_], self.state).values())
            for slice_ in self.slices.names
        }

    def global_state(self) -> State:
        """The federator's whole state_dict, what belongs to no slice at its first value."""
        return {**self._first_private, **self.state}

    def client_state(self, client: int) -> State:
        """The whole state_dict that a client holds: the global slices over its private ones."""
        kept = self.store.kept(client)
        own = {name: tensor for name, tensor in kept.items() if not name.startswith(OPTIMIZER)}
        return {**self.global_state(), **own}

    def has_report(self, task: Task) -> bool:
        """Whether the local update that the task asks for is done."""
        return self.store.has_report(task.client)

    def lose(self, task: Task) -> None:
        """Serves a client that drops out: it receives its downlink, and its work is lost."""
        if task.client not in self._met:
            state = self.global_state()
            self.store.keep(task.round, task.client, {name: state[name] for name in self._private_names})

    def book(self, task: Task) -> None:
        """Books what crosses in a task: the whole model at first contact, else the downlink; the uplink."""
        down = self.method.downlink if task.client in self._met else self.slices.names
        self._met.add(task.client)
        if self.method.pool:
            return
        for slice_ in down:
            self._book(task, "down", slice_)
        for slice_ in () if task.drops_out else task.uplink:
            self._book(task, "up", slice_)

    def close_round(self, participants: list[int], tasks: list[Task]) -> list[Entry]:
        """Closes the round's account and returns what crossed in it."""
        reports = participants if self.method.pool else [task for task in tasks if not task.drops_out]
        self.ledger.visits += len(participants) + len(reports)
        return self.ledger.close_round()

    def merge(self) -> dict[int, tuple[int, float]]:
        """Merges the round's reports into the global state; returns images and loss of each reporter."""
        merge, reporters = Merge(), {}
        for report in self.store.reports():
            merge.add(report.tensors, report.images)
            reporters[report.client] = (report.images, report.loss)
        self.state.update(merge.result())
        return reporters

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.task is not None
        self._images = 0
        pl_module.load_state_dict(self.client_state(self.task.client), strict=True)
        if self.method.keep_optimizer and (kept := self.store.kept(self.task.client)):
            _restore_optimizer(trainer.optimizers[0], kept)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loss = torch.zeros((), device=pl_module.device)
        self._images = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        assert isinstance(loss, Tensor)
        images = extract_batch_size(batch)
        self._loss += loss.detach().to(self._loss) * images
        self._images += images

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.task is not None
        loss = self._loss.item()
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss of client {self.task.client} became {loss} in round {self.task.round}, "
                f"local epoch {trainer.current_epoch + 1}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.task is not None
        task, trained = self.task, _on_cpu(pl_module.state_dict())
        if self._images == 0:
            raise BadInput(f"client {task.client} trained on no image in round {task.round}")
        if not all(tensor.isfinite().all() for tensor in trained.values()):
            raise Diverged(
                f"the weights of client {task.client} left the finite numbers in round {task.round}"
            )
        private = {name: trained[name] for name in self._private_names}
        if self.method.keep_optimizer:
            private |= _optimizer_state(trainer.optimizers[0])
        uplink = self.slices.select(task.uplink, trained)
        report = Report(task.client, self._images, self._loss.item() / self._images, uplink)
        self.store.save_update(task.round, report, private)

    def _book(self, task: Task, direction: Direction, slice_: str) -> None:
        tensors = self.slices.select([slice_], self.state).values()
        self.ledger.book(task.round, task.client, direction, slice_, tensors)


def _on_cpu(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """The tensors of an optimizer's state, named `optimizer.<parameter>.<key>`."""
    return {
        f"{OPTIMIZER}{index}.{key}": value.detach().cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, kept: State) -> None:
    state: dict[int, State] = {}
    for name, tensor in kept.items():
        if name.startswith(OPTIMIZER):
            index, key = name.removeprefix(OPTIMIZER).split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
