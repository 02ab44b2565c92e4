"""FedProx (arXiv 1812.06127): a proximal term keeps clients close to the global model."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.present_clients import of_present_clients
from fedlight.federation.messages import State
from fedlight.runtime.errors import BadInput


class FedProx(FedAvg):
    """Adds mu / 2 * ||w - w_received||^2 over the federated slices to a client's loss (equation 2).

    Args:
        mu: 0 or more; 0 is FedAvg, bit for bit.

    Raises:
        BadInput: `mu` is negative.
    """

    elementwise = True
    clients_leave = True

    def __init__(self, mu: float) -> None:
        if not mu >= 0:
            raise BadInput(f"algorithm.mu must be 0 or more, got {mu}")
        self.mu = mu

    def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
        return [ProximalTerm(self.mu, received)] if self.mu else []


class ProximalTerm(Callback):
    """Adds the gradient of the proximal term, mu * (w - w_received), before each optimizer step."""

    def __init__(self, mu: float, received: State) -> None:
        self.mu = mu
        self.received = received

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pairs = [
            (parameter, self.received[name].to(parameter))
            for name, parameter in pl_module.named_parameters()
            if name in self.received and parameter.requires_grad
        ]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        for parameter, received in self._pairs:
            if parameter.grad is not None:
                distance = parameter.detach() - of_present_clients(received, parameter)
                parameter.grad.add_(distance, alpha=self.mu)
