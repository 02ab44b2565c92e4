"""FlexLoRA: the mean of products, factored again."""

import pytest
import torch
from torch import Tensor

from fedlight.federation.aggregate import WeightedMean
from fedlight.federation.algorithms.flexlora import FlexLoRA, factorise
from fedlight.federation.messages import State

FIRST, SECOND, OTHER = "unet.mid.lora_A.default.weight", "unet.mid.lora_B.default.weight", "unet.norm.weight"
SIZES = {1: 10, 2: 30}


def reported(client: int, shape: tuple[int, ...] = (2, 5)) -> State:
    generator = torch.Generator().manual_seed(client)
    rank = shape[0]
    second = (7, rank, *(1 for _ in shape[2:]))
    return {
        FIRST: torch.randn(shape, generator=generator),
        SECOND: torch.randn(second, generator=generator),
        OTHER: torch.randn(3, generator=generator),
    }


def product(state: State) -> Tensor:
    return state[SECOND].flatten(1).double() @ state[FIRST].flatten(1).double()


def step(updates: dict[int, State]) -> State:
    algorithm, mean = FlexLoRA(), WeightedMean()
    for client, update in updates.items():
        mean.add(algorithm.summand(update), SIZES[client])
    theta = {name: torch.zeros_like(tensor) for name, tensor in updates[1].items()}
    stepped, _ = algorithm.step(theta, mean.result(), {}, {})
    assert {n: (t.shape, t.dtype) for n, t in stepped.items()} == {
        n: (t.shape, t.dtype) for n, t in theta.items()
    }
    return stepped


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3, 3)], ids=["linear", "convolution"])
def test_the_new_factors_are_the_closest_of_their_rank_to_the_mean_of_products(
    shape: tuple[int, ...],
) -> None:
    updates = {client: reported(client, shape) for client in SIZES}
    stepped = step(updates)
    mean = (10 * product(updates[1]) + 30 * product(updates[2])) / 40
    left, values, right = torch.linalg.svd(mean, full_matrices=False)
    closest = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(product(stepped), closest, rtol=1e-5, atol=1e-5)
    factors = {name: (10 * updates[1][name] + 30 * updates[2][name]) / 40 for name in (FIRST, SECOND)}
    assert (product(factors) - mean).norm() > (product(stepped) - mean).norm()
    torch.testing.assert_close(stepped[OTHER], (10 * updates[1][OTHER] + 30 * updates[2][OTHER]) / 40)


def test_equal_products_are_kept() -> None:
    update = reported(1)
    turned = {**update, FIRST: -update[FIRST], SECOND: -update[SECOND]}  # whose factors have the mean 0
    torch.testing.assert_close(product(step({1: update, 2: turned})), product(update), rtol=1e-5, atol=1e-5)


def test_a_matrix_of_smaller_rank_leaves_zeros() -> None:
    matrix = torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0, 1.0])).double()
    first, second = factorise(matrix, 4)
    assert first.shape == (4, 3)
    assert second.shape == (2, 4)
    torch.testing.assert_close(second @ first, matrix)
    assert not first[2:].any()
    assert second[1, 0] > 0
    assert factorise(torch.zeros(2, 3).double(), 1)[0].any().item() is False
