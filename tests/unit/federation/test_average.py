"""A moving average of the global model over rounds: evaluated where a method is evaluated globally."""

from collections.abc import Callable

import pytest
import torch
from conftest import Cell

from fedlight.experiment.finished import open_cell

MakeCell = Callable[..., Cell]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["FULL", pytest.param("CENTRAL", marks=pytest.mark.slow)])
def test_the_average_is_exported_and_sampled_and_changes_no_traffic(cell: MakeCell, method: str) -> None:
    """With decay 0.75: theta_1, then 3/4 theta_1 + 1/4 theta_2; each theta is that of a cell without it."""
    small = (f"method={method}", "clients=3", "evaluation.grid=4")
    first, plain = cell(*small, "rounds=1"), cell(*small, "rounds=2")
    averaged = cell(*small, "rounds=2", "model.ema_decay=0.75")
    for name, tensor in averaged.model.items():
        expected = 0.75 * first.model[name] + 0.25 * plain.model[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
    assert averaged.result["exchange"] == plain.result["exchange"]
    assert averaged.result["train_loss"] == plain.result["train_loss"]  # no client trains on the average
    assert averaged.result["model_params"] == plain.result["model_params"]
    assert len({found.result["state_sha256"] for found in (first, plain, averaged)}) == 3
    pictures = [(made.folder / "samples" / "round_002.png").read_bytes() for made in (plain, averaged)]
    assert pictures[0] != pictures[1]
    state = open_cell(averaged.folder).state(None)
    for name, tensor in averaged.model.items():
        assert torch.equal(state[f"unet.{name}"], tensor)


@pytest.mark.slow
def test_the_average_is_scored(cell: MakeCell) -> None:
    small = ("clients=2", "evaluation.samples=100", "evaluation.steps=5")
    plain, averaged = (cell(*small, *more).result["fid"] for more in ([], ["model.ema_decay=0.75"]))
    assert plain["value"] != averaged["value"]


def test_an_exchanged_average_is_over_steps_and_the_server_has_none(cell: MakeCell) -> None:
    """The server keeps no average of its own."""
    made = cell("clients=2", "model.ema_decay=0.75", "model.exchange_ema=true")
    server = open_cell(made.folder).server
    assert server.average == {}
    assert made.result["model_params"] == 2 * cell("clients=2").result["model_params"] + 1
    for name, tensor in made.model.items():
        assert torch.equal(server.theta[f"ema.module.{name}"], tensor)


@pytest.mark.slow
def test_the_average_is_at_the_clients_where_these_are_evaluated(cell: MakeCell) -> None:
    made = cell("method=UDEC", "clients=2", "model.ema_decay=0.75")
    finished = open_cell(made.folder)
    assert finished.server.average == {}
    assert finished.state(0)["ema.n_averaged"] > 0
