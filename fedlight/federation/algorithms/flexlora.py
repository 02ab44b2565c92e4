"""FlexLoRA (arXiv 2402.11505): the products of low-rank adapters are averaged, and factored again."""

import re
from collections.abc import Collection
from itertools import pairwise

import torch
from torch import Tensor

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import State

FACTOR = re.compile(r"\.lora_[AB]\.")
PRODUCT = ".product."
NEGLIGIBLE = 1e-9  # a singular value, as a multiple of the largest: rounding errors of the product


class FlexLoRA(FedAvg):
    """Averages the products B A of the clients' adapters, and factors their mean again, at the same rank.

    The mean of factors is not the mean of their products. The mean of products has a higher rank than each
    client's; its singular value decomposition gives the factors of the adapters' rank that are closest to
    it. Of all factors with that product those are taken that are nearest to the last ones, so that the
    difference, which a transform of the downlink encodes, is small. Clients send factors, so that as many
    bytes are sent as by FedAvg. A tensor `NAME.lora_A.REST` is the factor A of an adapter, shape (rank,
    inputs, ...), and `NAME.lora_B.REST` is B, shape (outputs, rank, ...); other tensors are averaged.

    Attributes:
        ranks: of the clients where they differ: a client of rank r has the first r rows of A and columns of
            B, which then are the closest factors of its rank.
    """

    def __init__(self) -> None:
        self.ranks: Collection[int] = ()

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
                last = tensor.double().flatten(1), theta[second].double().flatten(1)
                factors = factorise(mean[product], *last, self.ranks)
                for key, factor in zip((name, second), factors, strict=True):
                    stepped[key] = factor.to(theta[key].dtype).reshape(theta[key].shape)
        return stepped, state


def factorise(
    product: Tensor, last_a: Tensor, last_b: Tensor, ranks: Collection[int] = ()
) -> tuple[Tensor, Tensor]:
    """Factors A and B, of which B A is closest to a matrix, and which are nearest to earlier ones.

    Both have the square roots of the singular values, turned by the orthogonal matrix that brings them
    nearest to the earlier factors (orthogonal Procrustes problem, Schoenemann 1966). It does not change B A.
    Where the matrix has a smaller rank, the remaining rows of A are the earlier ones and the columns of B
    are 0: with zeros in both, neither would have a gradient.

    Args:
        product: float64, shape (outputs, inputs).
        last_a: earlier factor A, float64, shape (rank, inputs).
        last_b: earlier factor B, float64, shape (outputs, rank).
        ranks: for each of these ranks r, the first r rows of A and columns of B are closest as well.

    Returns:
        A and B, of the shapes of the earlier factors.
    """
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    used = min(len(last_a), int((values > NEGLIGIBLE * values[0]).sum()))
    a, b = last_a.clone(), torch.zeros_like(last_b)
    for start, end in pairwise(sorted({0, used, *(rank for rank in ranks if rank < used)})):
        root = values[start:end].sqrt()
        new_a, new_b = root[:, None] * right[start:end], left[:, start:end] * root
        overlap = last_a[start:end] @ new_a.T + last_b[:, start:end].T @ new_b
        before, _, after = torch.linalg.svd(overlap)
        turn = before @ after
        a[start:end], b[:, start:end] = turn @ new_a, new_b @ turn.T
    return a, b
