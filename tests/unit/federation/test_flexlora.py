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


def last(rank: int = 4, outputs: int = 6, inputs: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = (rank, inputs), (outputs, rank)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return a, b


def test_where_the_rank_is_smaller_rows_stay_as_they_were() -> None:
    matrix = torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0, 1.0])).double()
    last_a, last_b = last(4, 2, 3)
    a, b = factorise(matrix, last_a, last_b)
    torch.testing.assert_close(b @ a, matrix)
    assert torch.equal(a[1:], last_a[1:])
    assert not b[:, 1:].any()
    a, b = factorise(0 * matrix, last_a, last_b)
    assert torch.equal(a, last_a)
    assert not b.any()


def test_factors_whose_product_stays_stay() -> None:
    balanced = factorise(torch.randn(6, 9, dtype=torch.float64), *last())
    for factor, before in zip(factorise(balanced[1] @ balanced[0], *balanced), balanced, strict=True):
        torch.testing.assert_close(factor, before)


def test_a_small_change_of_the_product_is_a_small_change_of_the_factors() -> None:
    """Singular vectors of equal singular values are arbitrary: any small change turns them."""
    vectors = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q
    a, b = vectors.T.contiguous(), torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q
    change = 1e-3 * torch.randn(6, 9, dtype=torch.float64)
    for factor, before in zip(factorise(b @ a + change, a, b), (a, b), strict=True):
        assert (factor - before).norm() < 2 * change.norm()


def test_no_other_factors_of_the_product_are_nearer() -> None:
    last_a, last_b = last()
    a, b = factorise(torch.randn(6, 9, dtype=torch.float64), last_a, last_b)
    nearest = (a - last_a).square().sum() + (b - last_b).square().sum()
    for _ in range(20):
        turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
        assert (turn @ a - last_a).square().sum() + (b @ turn.T - last_b).square().sum() >= nearest


def test_the_first_rows_are_the_closest_of_each_rank() -> None:
    product = torch.randn(6, 9, dtype=torch.float64)
    a, b = factorise(product, *last(5), ranks=[3, 1, 5, 3])
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    for rank in (1, 3, 5):
        torch.testing.assert_close(b[:, :rank] @ a[:rank], (left[:, :rank] * values[:rank]) @ right[:rank])
