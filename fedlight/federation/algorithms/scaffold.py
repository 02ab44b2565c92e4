"""SCAFFOLD (arXiv 1910.06378): control variates correct client drift."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.present_clients import of_present_clients
from fedlight.federation.messages import State

RESET = "reset/round"
"""The last round after which all variates were reset to 0; absent before any reset."""


class Scaffold(FedAvg):
    """Adds c - c_k to each gradient of a client; the server's c is the mean of all clients' variates c_k.

    A client's variate is the mean of its uncorrected gradients over the steps of its last local update. Under
    SGD that is option II of the paper, c_k - c + (theta - theta_k) / (steps * lr). Under Adam, whose steps
    are not proportional to gradients, option II would not have the unit of a gradient; the mean gradient has.

    The server receives the change of c_k for the slices that a client reports, and the client replaces its
    variate for these slices only. As in the paper, clients have equal weights, regardless of their numbers of
    images; a client that never took part counts with a variate of 0.

    The server knows c but no c_k, so that it cannot subtract the contribution of a client that lost its
    memory. After such a round all variates are reset to 0: c is cleared, the broadcasts name the round of the
    reset, and a client drops a c_k from before it.
    """

    keeps_memory = True
    absent_is_zero = True
    elementwise = True
    clients_leave = True

    def broadcast(self, state: State) -> State:
        return state

    def forget(self, state: State, round_: int) -> State:
        return {RESET: torch.tensor(float(round_))}

    def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
        return [GradientCorrection(received, aux, _valid(memory, aux))]

    def aux_like(self, theta: State) -> State:
        return theta

    def report(
        self, received: State, trained: State, aux: State, memory: State, steps: int
    ) -> tuple[State, State]:
        means = {
            name: memory[f"gradient.{name}"] / steps for name in received if f"gradient.{name}" in memory
        }
        kept = _valid(memory, aux)
        before = {name: kept[name] for name in kept if not name.startswith("gradient.")}
        change = {name: mean - before.get(name, torch.zeros(())) for name, mean in means.items()}
        reset = {RESET: aux[RESET]} if RESET in aux else {}
        return change, {**before, **means, **reset}

    def weight(self, num_examples: int) -> float:
        return 1

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        return mean, {**state, **{name: state.get(name, 0) + change for name, change in aux.items()}}


def _valid(memory: State, aux: State) -> State:
    """The client's variates; none if they are older than the last reset."""
    never = torch.zeros(())
    return memory if torch.equal(memory.get(RESET, never), aux.get(RESET, never)) else {}


class GradientCorrection(Callback):
    """Sums the gradients of a client's fit, and adds c - c_k to them before each optimizer step."""

    def __init__(self, received: State, server: State, client: State) -> None:
        self._received = received
        self._server = server
        self._client = client

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parameters = {
            name: parameter for name, parameter in pl_module.named_parameters() if name in self._received
        }
        self._sums: dict[str, Tensor] = {}
        self._corrections = {
            name: (self._server[name] - self._client.get(name, torch.zeros(()))).to(parameter)
            for name, parameter in self._parameters.items()
            if name in self._server
        }

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if name in self._sums:
                of_present_clients(self._sums[name], parameter).add_(parameter.grad)
            else:
                self._sums[name] = parameter.grad.clone()
            if name in self._corrections:
                parameter.grad.add_(of_present_clients(self._corrections[name], parameter))

    def state_dict(self) -> dict[str, Any]:
        return {f"gradient.{name}": total.cpu() for name, total in self._sums.items()}
