"""A round of the server: all state changes are in start_round, receive and finish_round."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import FULL, PARTIAL, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.average import update_average
from fedlight.federation.cohort import Task
from fedlight.federation.messages import AUX, Payload, State, Update, to_bytes
from fedlight.federation.open_round import OpenRound
from fedlight.federation.server import Server
from fedlight.federation.slices import SliceMap
from fedlight.federation.step import step_model
from fedlight.runtime.errors import BadInput, Damaged


def snapshot(server: Server) -> Any:
    """All that a round changes."""
    tensors = {name: tensor.clone() for name, tensor in server.theta.items()}
    return tensors, dict(server.met), set(server.trained), server.ledger.rows(), list(server.ledger._open)


def equal(one: Any, other: Any) -> bool:
    return one[1:] == other[1:] and all(
        torch.equal(tensor, other[0][name]) for name, tensor in one[0].items()
    )


def update(client: int, images: int, value: float, round_: int = 1) -> Update:
    """An update of a toy's slices, all of whose values are the same."""
    first = toy_setup().first
    slices = {"own": ["own.weight", "own.bias"], "shared": ["shared.weight", "shared.bias"]}
    payloads = {
        slice_: Payload.plain({name: torch.full_like(first[name], value) for name in names})
        for slice_, names in slices.items()
    }
    return Update("toy", round_, client, images, 1.0, payloads)


def test_sending_the_broadcasts_of_a_round_changes_nothing_at_the_server(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    server = toy_server(setup)
    broadcasts = server.start_round()
    before = snapshot(server)
    assert len(list(inline(toy_site(setup, tmp_path)).exchange(broadcasts))) == 2
    assert equal(snapshot(server), before)
    assert server.met == {0: 1, 1: 1}
    assert {(entry.client, entry.direction) for entry in server.ledger._open} == {(0, "down"), (1, "down")}


def test_broadcasts_to_clients_of_the_same_last_round_share_their_payloads(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    server = toy_server(setup, clients=50)
    first = server.start_round()
    assert len({id(broadcast.payloads) for broadcast in first}) == 1
    for client in range(49):
        server.receive(update(client, 1, 0.0))
    server.finish_round()
    second = server.start_round()
    assert len({id(broadcast.payloads) for broadcast in second}) == 2
    assert second[48].payloads.keys() == {"shared"}
    assert second[49].payloads.keys() == {"own", "shared"}  # its first contact never ended


def test_before_a_round_is_started_every_update_is_refused() -> None:
    server = toy_server(toy_setup())
    with pytest.raises(Damaged, match="is of no client of round 1"):
        server.admit(update(0, 2, 1.0), ("own", "shared"))
    server.start_round()
    server.admit(update(0, 2, 1.0), ("own", "shared"))


def test_a_round_that_is_started_again_counts_once() -> None:
    server = toy_server(toy_setup())
    first = [to_bytes(broadcast) for broadcast in server.start_round()]
    server.receive(update(1, 3, 1.0))
    server.reset()
    assert [to_bytes(broadcast) for broadcast in server.start_round()] == first
    for client in (0, 1):
        server.receive(update(client, 1, 2.0))
    outcome = server.finish_round()
    assert (outcome.round, outcome.cohort, outcome.reports) == (1, 2, 2)
    assert len(outcome.exchange) == 2 * 4  # two slices, down and up
    assert all(bool((tensor == 2.0).all()) for tensor in server.theta.values())


def test_updates_in_any_order_give_the_same_bits() -> None:
    outcomes = []
    for order in permutations(range(3)):
        server = toy_server(toy_setup(), clients=3)
        server.start_round()
        for client in order:
            server.receive(update(client, client + 1, 0.1 * (client + 1)))
        server.finish_round()
        outcomes.append(snapshot(server))
    assert all(equal(outcome, outcomes[0]) for outcome in outcomes)
    mean = (1 * 0.1 + 2 * 0.2 + 3 * 0.3) / 6
    assert all(torch.allclose(tensor, torch.tensor(mean)) for tensor in outcomes[0][0].values())


def test_a_client_that_does_not_report_last_took_part_in_an_earlier_round() -> None:
    server = toy_server(toy_setup())
    server.start_round()
    server.receive(update(0, 1, 0.0))
    server.finish_round()
    assert server.met == {0: 1}
    server.start_round()
    server.receive(update(1, 1, 0.0, round_=2))
    server.finish_round()
    assert server.met == {0: 1, 1: 2}


def test_a_broadcast_that_was_not_sent_is_not_counted() -> None:
    server = toy_server(toy_setup())
    server.start_round()
    server.withdraw(1)
    server.receive(update(0, 1, 0.0))
    outcome = server.finish_round()
    assert {entry.client for entry in outcome.exchange} == {0}
    assert server.ledger.visits == 2  # one model down, one up


def test_a_client_whose_memory_is_lost_has_never_taken_part() -> None:
    server = toy_server(toy_setup())
    for round_ in (1, 2):
        server.start_round()
        if round_ == 2:
            server.forget(1)
        for client in (0, 1)[: 3 - round_]:
            server.receive(update(client, 1, 0.0, round_))
        server.finish_round()
    assert server.met == {0: 2}
    assert [broadcast.previous for broadcast in server.start_round()] == [2, 0]


def test_an_update_is_kept_only_until_those_of_smaller_numbers_have_arrived() -> None:
    tasks = [Task(1, client, (), drops_out=client == 1) for client in range(4)]
    collected = OpenRound([0, 1, 2, 3], tasks, {3: 7}, {}, {})
    sent = {client: update(client, 1, 0.0) for client in (0, 2, 3)}
    assert collected.receive(sent[2]) == []
    assert collected.receive(sent[0]) == [sent[0], sent[2]]
    assert collected.waiting == {}
    assert collected.missing() == {3: 7}
    assert collected.take_waiting() == []


def test_the_loss_of_a_round_is_none_where_no_client_reports_one() -> None:
    collected = OpenRound([0, 1], [], {}, {}, {})
    assert collected.train_loss is None
    collected.reports = {0: (10, None), 1: (30, 2.0)}
    assert (collected.train_loss, collected.client_losses) == (2.0, {1: 2.0})


def test_the_moving_average_by_hand() -> None:
    theta = {"w": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)}
    average = update_average({}, theta, 0.75)
    assert all(torch.equal(average[name], tensor) for name, tensor in theta.items())
    average = update_average(average, {"w": torch.tensor([5.0, 2.0]), "count": torch.tensor(4)}, 0.75)
    assert average["w"].tolist() == [0.75 * 1 + 0.25 * 5, 2.0]
    assert average["count"] == 4


class Step(FedAvg):
    """Returns what it was made with."""

    def __init__(self, stepped: State) -> None:
        self.stepped = stepped

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        return self.stepped, {"mean": mean["w"], **aux}


def test_the_algorithm_steps_parameters_and_buffers_take_their_mean() -> None:
    slices = SliceMap({"all": ("w", "running", "fixed")}, buffers=frozenset({"running"}))
    theta = {name: torch.zeros(1) for name in ("w", "running", "fixed")}
    mean = {"w": torch.ones(1), "running": torch.full((1,), 2.0)}
    algorithm = Step({"w": torch.full((1,), 5.0)})
    parameters = slices.parameters(theta)
    new, state = step_model(algorithm, slices, theta, parameters, mean, {AUX: torch.ones(1)}, {})
    assert {name: float(tensor) for name, tensor in new.items()} == {"w": 5.0, "running": 2.0, "fixed": 0.0}
    assert list(new) == list(theta)
    assert {name: float(tensor) for name, tensor in state.items()} == {"mean": 1.0, AUX: 1.0}


@pytest.mark.parametrize(
    ("stepped", "reason"),
    [
        (
            {"w": torch.zeros(2)},
            r"torch.float32 of shape \(2,\) for w, expected torch.float32 of shape \(1,\)",
        ),
        ({"w": torch.zeros(1).double()}, r"torch.float64 of shape \(1,\) for w, expected torch.float32"),
        ({"x": torch.zeros(1)}, r"x of torch.float32 of shape \(1,\), which is no part of the global model"),
    ],
)
def test_a_step_that_does_not_fit_the_model_is_refused(stepped: State, reason: str) -> None:
    theta = {"w": torch.zeros(1)}
    with pytest.raises(BadInput, match=f"algorithm .*test_rounds.Step: step returned {reason}"):
        step_model(Step(stepped), SliceMap({"all": ("w",)}), theta, theta, theta, {}, {})


def test_a_federation_resumes_after_each_round_with_the_same_bits(tmp_path: Path) -> None:
    setup = toy_setup(FULL)
    server, again = toy_server(setup), toy_server(setup)
    outcomes = list(federate(server, inline(toy_site(setup, tmp_path / "one")), 2))
    assert [outcome.round for outcome in outcomes] == [1, 2]
    transport = inline(toy_site(setup, tmp_path / "other"))
    for _ in federate(again, transport, 2):
        pass
    assert equal(snapshot(again), snapshot(server))
