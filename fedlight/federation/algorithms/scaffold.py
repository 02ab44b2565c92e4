"""SCAFFOLD (arXiv 1910.06378): control variates correct the drift of clients."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import State

RESET = "reset/round"
"""The round after which all variates started again from 0; absent where they never did."""


class Scaffold(FedAvg):
    """Adds c - c_k to each gradient of a client; the server's c is the mean of all clients' variates c_k.

    The variate of a client is the mean of its own gradients, without the correction, over the steps of its
    last local update. Under SGD that is option II of the paper, c_k - c + (theta - theta_k) / (steps * lr).
    Under Adam, whose steps are no multiple of gradients, option II would have no unit of its own; the mean
    gradient keeps its meaning there, and Adam sees the corrected gradient like any other.

    The server learns the change of c_k for the slices that a client reports, and only for those the client
    takes its new variate. As in the paper clients count alike, whatever the number of their images; one that
    never took part counts with a variate of 0.

    The server knows c and no client's c_k, so it cannot take out what a client contributed that lost its
    memory. After such a round all variates start again from 0: c is cleared, the broadcasts name the round of
    the reset, and a client drops a c_k of an earlier reset.
    """

    keeps_memory = True
    absent_is_zero = True

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
    """A client's variates; none where they are older than the last reset."""
    never = torch.zeros(())
    return memory if torch.equal(memory.get(RESET, never), aux.get(RESET, never)) else {}


class GradientCorrection(Callback):
    """Sums up the gradients of a client's fit, and adds c - c_k before each optimizer step."""

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
                self._sums[name].add_(parameter.grad)
            else:
                self._sums[name] = parameter.grad.clone()
            if name in self._corrections:
                parameter.grad.add_(self._corrections[name])

    def state_dict(self) -> dict[str, Any]:
        return {f"gradient.{name}": total.cpu() for name, total in self._sums.items()}
