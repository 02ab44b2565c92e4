"""FedNova (arXiv 2007.07481): normalised averaging, each client's update divided by its number of steps."""

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import State
from fedlight.runtime.training_loss import client_steps


class FedNova(FedAvg):
    """Normalised averaging: each client's update is divided by its number of steps.

    Client k reports theta + (theta_k - theta) / tau_k after tau_k steps; the new global model is
    theta + tau * (mean - theta), where tau is the mean of tau_k with weights n_k (equation 7 for plain SGD;
    every step counts 1, also under other optimizers). Both means are over the clients that reported the
    tensor, so under USPLIT tau differs between slices. If all clients take the same number of steps, it is
    FedAvg up to rounding. The number of steps is sent as one scalar for each tensor.
    """

    elementwise = True
    clients_leave = True

    def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
        return [NormalizedUpdate(received)]

    def report(
        self, received: State, trained: State, aux: State, memory: State, steps: int
    ) -> tuple[State, State]:
        return {f"steps/{name}": torch.tensor(float(steps)) for name in received}, memory

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        floating = [name for name, tensor in mean.items() if tensor.is_floating_point()]
        new = {name: theta[name] + aux[f"steps/{name}"] * (mean[name] - theta[name]) for name in floating}
        return {**mean, **new}, state


class NormalizedUpdate(Callback):
    """Divides the change of the received slices in a fit by the number of its steps."""

    def __init__(self, received: State) -> None:
        self._received = received

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, steps = pl_module.state_dict(), client_steps(trainer, pl_module)
        for name, start in self._received.items():
            if start.is_floating_point():
                values = state[name]
                share: Tensor | float = 1 / steps[0]
                if min(steps) < steps[0]:
                    share = 1 / torch.tensor(steps).to(values).view(-1, *[1] * (values.dim() - 1))
                values.copy_(torch.lerp(start.to(values), values, share))
