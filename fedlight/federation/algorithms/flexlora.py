"""FlexLoRA (arXiv 2402.11505): the products of low-rank adapters are averaged, and factored again."""

import re

import torch
from torch import Tensor

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import State

FACTOR = re.compile(r"\.lora_[AB]\.")
PRODUCT = ".product."


class FlexLoRA(FedAvg):
    """Averages the products B A of the clients' adapters, and factors their mean again, at the same rank.

    The mean of factors is not the mean of their products. The mean of products has a higher rank than each
    client's; its singular value decomposition gives the factors of the adapters' rank that are closest to
    it. Clients send factors, so that as many bytes are sent as by FedAvg. A tensor `NAME.lora_A.REST` is the
    factor A of an adapter, shape (rank, inputs, ...), and `NAME.lora_B.REST` is B, shape (outputs, rank,
    ...); other tensors are averaged.
    """

    def summand(self, values: State) -> State:
        summands: State = {}
        for name, tensor in values.items():
            first, second = (FACTOR.sub(f".lora_{factor}.", name) for factor in "AB")
            if first == second or not {first, second} <= values.keys():
                summands[name] = tensor
            elif name == first:
                product = values[second].double().flatten(1) @ tensor.double().flatten(1)
                summands[FACTOR.sub(PRODUCT, name)] = product
        return summands

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        stepped: State = {}
        for name, tensor in theta.items():
            product = FACTOR.sub(PRODUCT, name)
            if product == name or product not in mean:
                stepped |= {name: mean[name]} if name in mean else {}
            elif name != (second := FACTOR.sub(".lora_B.", name)):
                factors = factorise(mean[product], len(tensor))
                for key, factor in zip((name, second), factors, strict=True):
                    stepped[key] = factor.to(theta[key].dtype).reshape(theta[key].shape)
        return stepped, state


def factorise(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A, shape (rank, inputs), and B, shape (outputs, rank), with B A closest to a matrix.

    Both have the square roots of the singular values. The largest element of each column of B is positive, so
    that the result does not depend on the signs that a library chooses.

    Args:
        product: float64, shape (outputs, inputs).
        rank: where the matrix has a smaller one, the remaining rows of A and columns of B are 0.
    """
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank].sqrt(), right[:rank]
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left)
    missing = rank - len(values)
    first = torch.nn.functional.pad((signs.T * values[:, None]) * right, (0, 0, 0, missing))
    second = torch.nn.functional.pad(left * signs * values, (0, missing))
    return first, second
