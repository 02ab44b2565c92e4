"""An algorithm as a user would add one, with memory on both sides and auxiliary state in both directions."""

from typing import Any

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import State


class Control(FedAvg):
    """Server momentum, and a count of visits that every client keeps, reports and gets back as a mean."""

    keeps_memory = True

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def init(self, theta: State) -> State:
        return {
            **{name: 0 * tensor for name, tensor in theta.items()},
            "visits": next(iter(theta.values())).sum() * 0,
        }

    def broadcast(self, state: State) -> State:
        return {"visits": state["visits"]}

    def report(self, received: State, trained: State, aux: State, memory: State, steps: int) -> Any:
        visits = memory.get("visits", aux["visits"] * 0) + 1
        return {"visits": visits}, {"visits": visits}

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        new, after = {}, {**state, "visits": aux["visits"]}
        for name, tensor in mean.items():
            after[name] = self.momentum * state[name] + tensor - theta[name]
            new[name] = theta[name] + after[name]
        return new, after
