"""How far the mean of factors of LoRA is from the mean of products: python benchmarks/adapter_mean.py CELL

CELL is the folder of a finished cell of method=LOCAL and finetuning=lora, whose clients have adapters of
their own.
"""

import argparse
from pathlib import Path

import torch

from fedlight.experiment.finished import FinishedCell, open_cell
from fedlight.federation.aggregate import WeightedMean
from fedlight.federation.algorithms.flexlora import FlexLoRA
from fedlight.federation.messages import State
from fedlight.finetuning.adapters import merge_adapters


def merged(cell: FinishedCell, state: State) -> State:
    """The weights of the UNet with the adapters of a state merged into them, float64."""
    module = cell.module.double()
    module.load_state_dict(state)
    return {name: tensor.clone() for name, tensor in merge_adapters(module.unet).state_dict().items()}


def distance(first: State, second: State) -> float:
    """The L2 norm of the difference of two states."""
    return float(sum((first[name] - second[name]).square().sum() for name in first) ** 0.5)


def measure(folder: Path) -> dict[str, float]:
    """The error of the merged weights by each aggregation, relative to the change by the exact mean."""
    cell = open_cell(folder, trust=True)
    algorithm, factors, products, exact = FlexLoRA(), WeightedMean(), WeightedMean(), WeightedMean()
    for client in range(cell.config.clients):
        state = {name: tensor.double() for name, tensor in cell.state(client).items()}
        factors.add(state, 1)
        products.add(algorithm.summand(state), 1)
        exact.add(merged(cell, state), 1)
    first = {name: tensor.double() for name, tensor in cell.server.global_state().items()}
    start, expected = merged(cell, first), exact.result()
    again, _ = algorithm.step(first, products.result(), {}, {})
    change = distance(expected, start)
    return {
        "factors averaged": distance(merged(cell, factors.result()), expected) / change,
        "products averaged and factored again": distance(merged(cell, again), expected) / change,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", type=Path)
    torch.set_num_threads(1)
    for name, error in measure(parser.parse_args().cell).items():
        print(f"{name}: error {error:.1%} of the exact mean's change")
