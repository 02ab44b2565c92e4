"""FedAvgM (arXiv 1909.06335): the server steps with momentum."""

import torch

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import State
from fedlight.runtime.errors import BadInput


class FedAvgM(FedAvg):
    """Steps along a velocity: v = momentum * v + (mean - theta), and theta + lr * v is the new global model.

    A tensor that no client reported keeps its value and velocity. Integer tensors are averaged as in FedAvg.

    Args:
        momentum: beta, in [0, 1).
        lr: the server's learning rate, above 0; momentum 0 and lr 1 are FedAvg, bit for bit.

    Raises:
        BadInput: one of them is out of its range.
    """

    def __init__(self, momentum: float, lr: float) -> None:
        check_server_optimizer(momentum, lr)
        self.momentum = momentum
        self.lr = lr

    def init(self, theta: State) -> State:
        return {
            name: torch.zeros_like(tensor) for name, tensor in theta.items() if tensor.is_floating_point()
        }

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        change = {name: mean[name] - theta[name] for name in mean if name in state}
        velocity = {name: self.momentum * state[name] + delta for name, delta in change.items()}
        new = {name: mean[name] + (self.lr * velocity[name] - delta) for name, delta in change.items()}
        return {**mean, **new}, {**state, **velocity}


def check_server_optimizer(momentum: float, lr: float) -> None:
    """Checks the arguments that all server optimizers have.

    Raises:
        BadInput: `momentum` or `lr` is out of its range.
    """
    if not 0 <= momentum < 1:
        raise BadInput(f"algorithm.momentum must be 0 or more and below 1, got {momentum}")
    if not 0 < lr < float("inf"):
        raise BadInput(f"algorithm.lr must be above 0, got {lr}")
