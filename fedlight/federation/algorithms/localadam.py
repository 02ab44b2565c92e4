"""Local Adam (arXiv 2409.13155): the optimizer's moments are averaged with the model."""

from itertools import chain
from typing import Any

from lightning import Callback, LightningModule, Trainer

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.federator import optimizer_state, restore_optimizer
from fedlight.federation.messages import State


class LocalAdam(FedAvg):
    """Clients begin each local update with the mean of the moments at the end of the last round.

    The moments and the step counts of the federated slices are exchanged with them; those of private slices
    are initialised anew, or kept where the method keeps them. It works with every optimizer that keeps its
    state in tensors of each parameter.
    """

    elementwise = True
    clients_leave = True

    def broadcast(self, state: State) -> State:
        return state

    def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
        return [OptimizerState(aux)]

    def report(
        self, received: State, trained: State, aux: State, memory: State, steps: int
    ) -> tuple[State, State]:
        return {key: tensor for key, tensor in memory.items() if key.split("/")[1] in received}, {}

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        return mean, {**state, **aux}


class OptimizerState(Callback):
    """Sets the optimizer's state from tensors `<key>/<parameter>` before the fit, and saves it after."""

    def __init__(self, initial: State) -> None:
        self._initial = initial

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        self._names = [names[id(parameter)] for parameter in parameters]
        shared = {}
        for entry, tensor in self._initial.items():
            key, name = entry.split("/")
            shared[f"{self._names.index(name)}.{key}"] = tensor
        restore_optimizer(optimizer, optimizer_state(optimizer) | shared)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._final = {}
        for entry, tensor in optimizer_state(trainer.optimizers[0]).items():
            index, key = entry.split(".", 1)
            self._final[f"{key}/{self._names[int(index)]}"] = tensor.clone()

    def state_dict(self) -> dict[str, Any]:
        return self._final
