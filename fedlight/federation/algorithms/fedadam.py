"""FedAdam (arXiv 2003.00295, algorithm 2): the server steps with Adam."""

import torch
from torch import Tensor

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.fedavgm import check_server_optimizer
from fedlight.federation.messages import State
from fedlight.runtime.errors import BadInput


class FedAdam(FedAvg):
    """Uses the mean change of a round, mean - theta, as the gradient of Adam without bias correction.

    A tensor that no client reported keeps its value and moments. Integer tensors are averaged as in FedAvg.

    Args:
        lr: eta, the server's learning rate, above 0.
        momentum: beta_1, in [0, 1).
        beta2: of the second moment, in [0, 1).
        tau: the degree of adaptivity, above 0: added to the root of the second moment, which begins at tau^2.

    Raises:
        BadInput: an argument is out of its range.
    """

    def __init__(self, lr: float, momentum: float, beta2: float, tau: float) -> None:
        check_server_optimizer(momentum, lr)
        if not 0 <= beta2 < 1:
            raise BadInput(f"algorithm.beta2 must be 0 or more and below 1, got {beta2}")
        if not 0 < tau < float("inf"):
            raise BadInput(f"algorithm.tau must be above 0, got {tau}")
        self.lr = lr
        self.momentum = momentum
        self.beta2 = beta2
        self.tau = tau

    def init(self, theta: State) -> State:
        floating = {name: tensor for name, tensor in theta.items() if tensor.is_floating_point()}
        m = {f"m.{name}": torch.zeros_like(tensor) for name, tensor in floating.items()}
        v = {f"v.{name}": torch.full_like(tensor, self.tau**2) for name, tensor in floating.items()}
        return m | v

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        new, new_state = dict(mean), dict(state)
        for name in mean:
            if f"m.{name}" in state:
                delta = mean[name] - theta[name]
                new_state[f"m.{name}"] = m = self.momentum * state[f"m.{name}"] + (1 - self.momentum) * delta
                new_state[f"v.{name}"] = v = self.second_moment(state[f"v.{name}"], delta.square())
                new[name] = theta[name] + self.lr * m / (v.sqrt() + self.tau)
        return new, new_state

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """The new second moment from the old one and the squared change."""
        return self.beta2 * v + (1 - self.beta2) * squared
