"""Clients whose factors have different ranks: cut, padded, limited; what no client of a round has stays."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlight.federation.client_ranks import ClientRanks, RankLimit

A, B, OTHER = "mid.lora_A.weight", "mid.lora_B.weight", "mid.bias"
RANKS = ClientRanks((1, 3, 2), {A: 0, B: 1})


def whole() -> dict[str, Tensor]:
    return {
        A: torch.arange(12.0).reshape(3, 4) + 1,
        B: torch.arange(6.0).reshape(2, 3) + 1,
        OTHER: torch.ones(2),
    }


def test_a_client_has_the_first_rows_of_a_and_columns_of_b() -> None:
    own = RANKS.cut(2, whole())
    assert torch.equal(own[A], whole()[A][:2])
    assert torch.equal(own[B], whole()[B][:, :2])
    assert torch.equal(own[OTHER], whole()[OTHER])
    assert RANKS.cut(1, whole()).keys() == whole().keys()
    assert all(torch.equal(tensor, whole()[name]) for name, tensor in RANKS.cut(1, whole()).items())


def test_what_a_client_lacks_is_zero() -> None:
    padded = RANKS.pad(2, RANKS.cut(2, whole()))
    for name, rest in ((A, padded[A][2:]), (B, padded[B][:, 2:])):
        assert padded[name].shape == whole()[name].shape
        assert rest.numel()
        assert not rest.any()
    assert torch.equal(padded[A][:2], whole()[A][:2])
    for values in (whole(), RANKS.cut(2, whole())):
        cleared = RANKS.clear(2, values)
        assert all(torch.equal(cleared[name], padded[name]) for name in padded)


def test_auxiliary_tensors_of_a_factor_are_cut_like_it_and_scalars_are_not() -> None:
    aux = {f"moment/{A}": whole()[A], f"step/{A}": torch.tensor(7.0), "count": torch.ones(3, 3)}
    own = RANKS.cut(0, aux)
    assert own[f"moment/{A}"].shape == (1, 4)
    assert torch.equal(own[f"step/{A}"], torch.tensor(7.0))
    assert torch.equal(own["count"], aux["count"])
    assert RANKS.pad(0, own)[f"moment/{A}"].shape == (3, 4)


def test_without_ranks_nothing_is_changed() -> None:
    state = whole()
    ranks = ClientRanks()
    assert not ranks
    assert ranks.of(5) is None
    for changed in (
        ranks.cut(5, state),
        ranks.pad(5, state),
        ranks.clear(5, state),
        ranks.fill(state, {}, [5]),
    ):
        assert changed is state


def test_rows_that_no_client_of_the_round_has_stay() -> None:
    mean = {name: torch.full_like(tensor, -1.0) for name, tensor in whole().items()}
    filled = RANKS.fill(mean, whole(), [0, 2])
    assert torch.equal(filled[A], torch.cat([mean[A][:2], whole()[A][2:]]))
    assert torch.equal(filled[B], torch.cat([mean[B][:, :2], whole()[B][:, 2:]], dim=1))
    assert torch.equal(filled[OTHER], mean[OTHER])
    assert all(torch.equal(RANKS.fill(mean, whole(), [0, 1])[name], mean[name]) for name in mean)


@pytest.mark.parametrize("clients", [(2,), (0, 2)])
def test_gradients_of_what_clients_lack_become_zero(clients: tuple[int, ...]) -> None:
    stacked = {
        name: tensor if len(clients) == 1 else torch.stack([tensor] * len(clients))
        for name, tensor in whole().items()
    }
    module: Any = SimpleNamespace(
        named_parameters=lambda: parameters.items(),
    )
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in stacked.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    limit, nothing = RankLimit(RANKS, clients), SimpleNamespace()
    limit.on_fit_start(nothing, module)  # type: ignore[arg-type]
    limit.on_before_optimizer_step(nothing, module, nothing)  # type: ignore[arg-type]
    for place, client in enumerate(clients):
        for name, dim in RANKS.dims.items():
            gradient = parameters[name].grad
            assert gradient is not None
            own = gradient if len(clients) == 1 else gradient[place]
            rank = RANKS.ranks[client]
            assert own.narrow(dim, 0, rank).all()
            assert not own.narrow(dim, rank, 3 - rank).any()
    assert parameters[OTHER].grad is not None
    assert parameters[OTHER].grad.all()
