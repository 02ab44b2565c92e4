"""Every algorithm against an independent computation in NumPy, on quadratics with known gradients."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import FULL, toy_setup

from fedlight.federation.algorithms.fedadam import FedAdam
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.fedavgm import FedAvgM
from fedlight.federation.algorithms.fednova import FedNova
from fedlight.federation.algorithms.fedprox import FedProx
from fedlight.federation.algorithms.fedyogi import FedYogi
from fedlight.federation.algorithms.localadam import LocalAdam
from fedlight.federation.algorithms.scaffold import RESET, Scaffold
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import ClientSetup
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import Participation
from fedlight.federation.federator import on_cpu
from fedlight.federation.messages import AUX, Broadcast, Update, from_bytes
from fedlight.federation.method import Method, Split
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.federation.slices import SliceMap, buffer_names
from fedlight.runtime.errors import MemoryLost

SLICES = {"front": slice(0, 2), "middle": slice(2, 4), "back": slice(4, 6)}
START = np.array([0.3, -0.2, 0.1, 0.4, -0.5, 0.2])
IMAGES = (2, 6, 4, 8)  # of each client; a batch is 2, so that they differ in their steps
LR, EPOCHS, EPS = 0.1, 2, 1e-8

SPLIT = Method(
    name="SPLIT",
    downlink="all",
    uplink="all",
    split=Split(either=("front", "back"), coin="middle"),
    evaluate="global",
)
BACK = Method(name="BACK", downlink=("back",), uplink=("back",), evaluate="clients")
WARM = BACK.model_copy(update={"name": "WARM", "warm_start": 2})

ALGORITHMS: dict[str, FedAvg] = {
    "fedavg": FedAvg(),
    "fedprox": FedProx(0.5),
    "fedavgm": FedAvgM(0.6, 0.8),
    "fedadam": FedAdam(0.1, 0.7, 0.9, 0.05),
    "fedyogi": FedYogi(0.1, 0.7, 0.9, 0.05),
    "scaffold": Scaffold(),
    "fednova": FedNova(),
    "localadam": LocalAdam(),
}


def curvature(client: int) -> np.ndarray:
    return np.random.RandomState(client).uniform(0.2, 2, 6).astype(np.float32)


def minimum(client: int) -> np.ndarray:
    return np.random.RandomState(100 + client).uniform(-3, 3, 6).astype(np.float32)


class Quadratic(LightningModule):
    """Client k minimises sum_i a_i / 2 (w_i - b_i)^2; w lies in three slices of two numbers."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        for name, part in SLICES.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(START[part], dtype=torch.float32)))
        self.register_buffer("counter", torch.tensor(0))
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        a, b = batch
        self.counter += 1
        w = torch.cat([self.get_parameter(name) for name in SLICES])
        return (a / 2 * (w - b).square()).sum(1).mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class QuadraticData(LightningDataModule):
    """All images of a client are one and the same."""

    def __init__(self, client: int) -> None:
        super().__init__()
        self.num_examples = IMAGES[client]
        self.rows = [(curvature(client), minimum(client))] * self.num_examples

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=2, shuffle=True)


SGD = partial(torch.optim.SGD, lr=LR)
ADAM = partial(torch.optim.Adam, lr=LR, betas=(0.8, 0.9), eps=EPS)


@dataclass
class Played:
    """A federation that was played to its end."""

    server: Server
    site: Site
    broadcasts: list[Broadcast]
    updates: list[Update]

    @property
    def theta(self) -> np.ndarray:
        return np.concatenate([self.server.theta[name].numpy() for name in SLICES])

    def memory(self, client: int) -> dict[str, dict[str, Tensor]]:
        met = self.server.met.get(client, 0)
        return self.site.memory.read(client, met) if met else {}


def play(
    folder: Path,
    algorithm: FedAvg,
    method: Method = FULL,
    clients: int = 2,
    rounds: int = 3,
    optimizer: Any = SGD,
    fraction: float = 1.0,
    dropout: float = 0.0,
    decay: float | None = None,
    backwards: bool = False,
    restarts: bool = False,
    loses: tuple[int, int] | None = None,
) -> Played:
    """Plays a federation.

    Args:
        backwards: clients train and report in reverse.
        restarts: before each round, and after the first update of it, all that is not on disk is lost.
        loses: a round, and the client whose memory is gone when that round begins.
    """
    module = Quadratic(optimizer)
    prefixes = {name: [name] for name in SLICES}
    prefixes["back"].append("counter")
    slices = SliceMap.build(prefixes, module.state_dict(), buffers=buffer_names(module))
    method = method.resolve(SLICES)
    setup: ClientSetup = replace(
        toy_setup(algorithm=algorithm, epochs=EPOCHS),
        module=module,
        slices=slices,
        method=method,
        data=QuadraticData,
    )
    participation = Participation(clients, fraction, dropout, seed=3)
    first = on_cpu(module.state_dict())
    folder.mkdir(exist_ok=True)
    checkpoint = ServerCheckpoint(folder, "toy")

    def begin() -> tuple[Server, Site]:
        server = Server("toy", method, slices, first, participation, algorithm, Codec(), decay)
        server.resume(checkpoint)
        return server, Site("toy", setup, folder)

    server, site = begin()
    played = Played(server, site, [], [])
    for _ in range(rounds):
        if restarts:
            server, site = begin()
            site.update(server.start_round()[:1])
            server, site = begin()
        broadcasts = server.start_round()
        receipts = []
        for broadcast in broadcasts[::-1] if backwards else broadcasts:
            if (broadcast.round, broadcast.client) == loses:
                rmtree(folder / "clients" / f"{broadcast.client:06d}")
            try:
                receipts += site.update([broadcast])
            except MemoryLost:
                server.forget(broadcast.client)
        updates = [from_bytes(receipt.read()) for receipt in receipts if receipt]
        for update in updates:
            server.receive(update)
        server.finish_round()
        server.save(checkpoint, {})
        played.broadcasts += broadcasts
        played.updates += updates
    played.server, played.site = server, site
    return played


def by_hand(name: str, played: Played, optimizer: Any, clients: int, rounds: int) -> dict[str, Any]:
    """The same federation, who reports what being given, in float64."""
    theta, average = START.copy(), None
    velocity, m, v = np.zeros(6), np.zeros(6), np.full(6, 0.05**2)
    c, c_k = np.zeros(6), np.zeros((clients, 6))
    moments: dict[str, np.ndarray] = {kind: np.zeros(6) for kind in ("m", "v", "t")}
    for round_ in range(1, rounds + 1):
        sums, counts = np.zeros(6), np.zeros(6)
        new_c, new_moments = c.copy(), {kind: np.zeros(6) for kind in moments}
        steps, reporters = np.zeros(6), 0
        for update in (update for update in played.updates if update.round == round_):
            k = update.client
            reports = np.zeros(6, dtype=bool)
            for slice_ in update.payloads.keys() & SLICES.keys():
                reports[SLICES[slice_]] = True
            y, gradients, tau = theta.copy(), np.zeros(6), EPOCHS * IMAGES[k] // 2
            m_k, v_k, t_k = (
                (moments[kind].copy() if name == "localadam" else np.zeros(6)) for kind in moments
            )
            for _ in range(tau):
                g = curvature(k) * (y - minimum(k))
                gradients += g
                if name == "fedprox":
                    g = g + 0.5 * (y - theta)
                if name == "scaffold":
                    g = g + c - c_k[k]
                if optimizer is SGD:
                    y = y - LR * g
                else:
                    t_k, m_k, v_k = t_k + 1, 0.8 * m_k + 0.2 * g, 0.9 * v_k + 0.1 * g**2
                    y = y - LR * m_k / (1 - 0.8**t_k) / (np.sqrt(v_k / (1 - 0.9**t_k)) + EPS)
            if name == "scaffold":
                option_two = c_k[k] - c + (theta - y) / (tau * LR)
                variate = option_two if optimizer is SGD else gradients / tau
                new_c += reports * (variate - c_k[k]) / clients
                c_k[k] = np.where(reports, variate, c_k[k])
            n = 1 if name == "scaffold" else IMAGES[k]
            sums += reports * n * ((y - theta) / (tau if name == "fednova" else 1))
            counts += reports * n
            steps += reports * n * tau
            reporters += 1
            for kind, own in zip(moments, (m_k, v_k, t_k), strict=True):
                new_moments[kind] += reports * n * own
        known = counts > 0
        delta = sums / np.where(known, counts, 1)
        if name == "fednova":  # each number by the steps of those that reported it
            delta = delta * steps / np.where(known, counts, 1)
        if name == "fedavgm":
            velocity = np.where(known, 0.6 * velocity + delta, velocity)
            delta = 0.8 * velocity
        if name in ("fedadam", "fedyogi"):
            m = np.where(known, 0.7 * m + 0.3 * delta, m)
            grown = 0.9 * v + 0.1 * delta**2
            if name == "fedyogi":
                grown = v - 0.1 * delta**2 * np.sign(v - delta**2)
            v = np.where(known, grown, v)
            delta = 0.1 * m / (np.sqrt(v) + 0.05)
        theta = theta + np.where(known, delta, 0)
        c = new_c
        for kind in moments:
            moments[kind] = np.where(known, new_moments[kind] / np.where(known, counts, 1), moments[kind])
        if reporters:
            average = theta if average is None else 0.6 * average + 0.4 * theta
    return {"theta": theta, "c": c, "c_k": c_k, "average": average, **moments}


CASES = {
    "full": {"clients": 2, "rounds": 3},
    "split": {"method": SPLIT, "clients": 2, "rounds": 3},
    "partial": {"method": BACK, "clients": 2, "rounds": 3},
    "faults": {"method": SPLIT, "clients": 4, "rounds": 6, "fraction": 0.5, "dropout": 0.3},
}
SLOW = [case if case == "full" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
SENDING = ("scaffold", "fednova", "localadam")  # more than the slices


@pytest.mark.parametrize("case", SLOW)
@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, SGD) for name in ALGORITHMS), ("scaffold", ADAM), ("localadam", ADAM)]
)
def test_every_algorithm_matches_an_independent_computation(
    tmp_path: Path, name: str, optimizer: Any, case: str
) -> None:
    arguments: dict[str, Any] = CASES[case]
    played = play(tmp_path, ALGORITHMS[name], optimizer=optimizer, **arguments)
    expected = by_hand(name, played, optimizer, arguments["clients"], arguments["rounds"])
    moved = SLICES["back"] if case == "partial" else slice(0, 6)
    np.testing.assert_allclose(played.theta[moved], expected["theta"][moved], rtol=2e-5, atol=2e-6)
    if case == "partial":
        np.testing.assert_array_equal(played.theta[:4], START[:4].astype(np.float32))
    assert np.abs(played.theta[moved] - START[moved]).min() > 1e-3


def bits(played: Played) -> dict[str, Any]:
    """All that the server holds after a federation, and what crossed."""
    server = played.server
    groups = {"theta": server.theta, "state": server.state, "average": server.average}
    tensors = {f"{g}/{n}": t.numpy().tobytes() for g, state in groups.items() for n, t in state.items()}
    return {**tensors, "ledger": server.ledger.rows()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [*((name, SPLIT) for name in ALGORITHMS), ("scaffold", BACK), ("localadam", BACK)]
)
def test_neither_order_nor_restarts_change_a_bit(tmp_path: Path, name: str, method: Method) -> None:
    arguments: dict[str, Any] = {**CASES["faults"], "method": method, "decay": 0.6, "optimizer": ADAM}
    straight, backwards, restarted = (
        bits(play(tmp_path / str(number), ALGORITHMS[name], **arguments, **further))
        for number, further in enumerate([{}, {"backwards": True}, {"restarts": True}])
    )
    assert straight == backwards
    assert straight == restarted


@pytest.mark.parametrize("case", ["split", pytest.param("faults", marks=pytest.mark.slow)])
def test_the_average_over_rounds_begins_with_the_first_report(tmp_path: Path, case: str) -> None:
    arguments: dict[str, Any] = CASES[case]
    played = play(tmp_path, FedAvgM(0.6, 0.8), decay=0.6, **arguments)
    expected = by_hand("fedavgm", played, SGD, arguments["clients"], arguments["rounds"])["average"]
    state = played.server.global_state()
    actual = np.concatenate([state[name].numpy() for name in SLICES])
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)
    assert state["counter"] == played.server.theta["counter"] > 0
    plain = play(tmp_path / "plain", FedAvgM(0.6, 0.8), **arguments)
    np.testing.assert_array_equal(plain.theta, played.theta)  # the average is for looking at only


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("case", SLOW)
def test_the_variates_of_scaffold_average_to_the_server_s(tmp_path: Path, case: str, optimizer: Any) -> None:
    arguments: dict[str, Any] = CASES[case]
    clients = arguments["clients"]
    played = play(tmp_path, Scaffold(), optimizer=optimizer, **arguments)
    variates = [played.memory(client).get("algorithm", {}) for client in range(clients)]
    assert set(played.server.state) == ({"back"} if case == "partial" else set(SLICES))
    for name, c in played.server.state.items():
        mean = sum(own.get(name, torch.zeros(2)) for own in variates) / clients
        torch.testing.assert_close(c, mean, rtol=1e-5, atol=1e-6)
    expected = by_hand("scaffold", played, optimizer, clients, arguments["rounds"])
    for name in played.server.state:
        for client, own in enumerate(variates):
            actual = own.get(name, torch.zeros(2)).numpy()
            np.testing.assert_allclose(actual, expected["c_k"][client][SLICES[name]], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scaffold_finds_the_minimum_that_fedavg_misses(tmp_path: Path) -> None:
    """Of the plain mean of the clients' losses, whatever their steps; plain FedAvg ends beside it."""
    a, b = (np.stack([part(client) for client in range(2)]) for part in (curvature, minimum))
    best = (a * b).sum(0) / a.sum(0)
    scaffold, fedavg = (
        play(tmp_path / name, ALGORITHMS[name], rounds=60).theta for name in ("scaffold", "fedavg")
    )
    np.testing.assert_allclose(scaffold, best, atol=1e-3)
    assert np.abs(fedavg - best).max() > 0.1


@pytest.mark.slow
def test_fednova_finds_the_minimum_though_steps_differ(tmp_path: Path) -> None:
    """Of the mean weighted by data: nearer than FedAvg, which prefers the client with more steps."""
    a, b = (np.stack([part(client) for client in range(2)]) for part in (curvature, minimum))
    shares = np.array(IMAGES[:2])[:, None] / sum(IMAGES[:2])
    best = (shares * a * b).sum(0) / (shares * a).sum(0)
    fednova, fedavg = (
        play(tmp_path / name, ALGORITHMS[name], rounds=40).theta for name in ("fednova", "fedavg")
    )
    assert np.abs(fednova - best).sum() < 0.5 * np.abs(fedavg - best).sum()


@pytest.mark.parametrize("name", ["scaffold", "localadam"])
def test_after_a_warm_start_the_auxiliary_state_is_of_the_exchanged_slices(tmp_path: Path, name: str) -> None:
    played = play(tmp_path, ALGORITHMS[name], WARM, optimizer=ADAM, rounds=4)
    for message in (*played.broadcasts, *played.updates):
        if AUX not in message.payloads:
            assert (message.round, type(message)) == (1, Broadcast)
            continue
        parameters = {key.split("/")[-1] for key in message.payloads[AUX].tensors}
        assert parameters == (set(SLICES) if message.round <= 2 else {"back"})
    for client in range(2):
        assert {key.split("/")[-1] for key in played.memory(client).get("algorithm", {})} <= {"back"}


def test_after_a_warm_start_private_slices_go_on_with_the_client_s_own_moments(tmp_path: Path) -> None:
    """LocalAdam with keep_optimizer, written out: in round 3 only the moments of `back` are the mean ones."""
    keeping = WARM.model_copy(update={"keep_optimizer": True})
    played = play(tmp_path, LocalAdam(), keeping, optimizer=ADAM, rounds=3)

    def train(k: int, y: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m, v, t = moments
        for _ in range(EPOCHS * IMAGES[k] // 2):
            g = curvature(k) * (y - minimum(k))
            t, m, v = t + 1, 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            y = y - LR * m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + EPS)
        return y, np.stack([m, v, t])

    theta, mean, own = START.copy(), np.zeros((3, 6)), [np.zeros((3, 6))] * 2
    for _ in range(2):
        trained = [train(k, theta, mean) for k in range(2)]
        own = [moments for _, moments in trained]
        theta = np.average([y for y, _ in trained], axis=0, weights=IMAGES[:2])
        mean = np.average(own, axis=0, weights=IMAGES[:2])
    private = slice(0, 4)
    for k in range(2):
        mixed = mean.copy()
        mixed[:, private] = own[k][:, private]
        y, _ = train(k, theta, mixed)
        model = played.memory(k)["model"]
        kept = np.concatenate([model["front"].numpy(), model["middle"].numpy()])
        np.testing.assert_allclose(kept, y[private], rtol=2e-5, atol=2e-6)
        wrong, _ = train(k, theta, mean)
        assert np.abs(wrong[private] - y[private]).max() > 1e-3


@pytest.mark.parametrize("method", [FULL, SPLIT], ids=["full", "split"])
def test_scaffold_s_c_is_the_mean_of_the_variates_after_a_client_lost_its_memory(
    tmp_path: Path, method: Method
) -> None:
    played = play(tmp_path, Scaffold(), method, clients=3, rounds=6, loses=(3, 1))
    assert not [update for update in played.updates if (update.round, update.client) == (3, 1)]
    variates = [played.memory(client)["algorithm"] for client in range(3)]
    assert {float(own[RESET]) for own in variates} == {3.0}
    for name in SLICES:
        mean = sum(own.get(name, torch.zeros(2)) for own in variates) / 3
        assert mean.abs().max() > 1e-3
        torch.testing.assert_close(played.server.state[name], mean, rtol=1e-5, atol=1e-6)


def test_fednova_moves_a_slice_by_the_steps_of_the_clients_that_reported_it(tmp_path: Path) -> None:
    played = play(tmp_path, FedNova(), SPLIT, rounds=1)
    expected = by_hand("fednova", played, SGD, 2, 1)["theta"]
    np.testing.assert_allclose(played.theta, expected, rtol=2e-5, atol=2e-6)
    for update in played.updates:
        steps = {float(tensor) for tensor in update.payloads[AUX].tensors.values()}
        assert steps == {EPOCHS * IMAGES[update.client] // 2}


EXTRAS_BY_HAND = {  # scalars beside the slices: down in the first round, down later, up; 6 numbers, 3 tensors
    "fedavg": (0, 0, 0),
    "fedprox": (0, 0, 0),
    "fedavgm": (0, 0, 0),
    "fedadam": (0, 0, 0),
    "fedyogi": (0, 0, 0),
    "scaffold": (0, 6, 6),
    "fednova": (0, 0, 3),
    "localadam": (0, 6 + 6 + 3, 6 + 6 + 3),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_ledger_counts_what_an_algorithm_adds(tmp_path: Path, name: str) -> None:
    played = play(tmp_path, ALGORITHMS[name], optimizer=ADAM, rounds=2)
    counted = {
        (entry.round, entry.client, entry.direction): (entry.params, entry.bytes)
        for entry in played.server.ledger.entries
        if entry.slice == AUX
    }
    first, later, up = EXTRAS_BY_HAND[name]
    expected = {
        (round_, client, direction): (params, 4 * params)
        for client in range(2)
        for round_, direction, params in [
            (1, "down", first),
            (1, "up", up),
            (2, "down", later),
            (2, "up", up),
        ]
        if params
    }
    assert counted == expected


@pytest.mark.parametrize("name", SENDING)
def test_auxiliary_state_of_unreported_slices_is_not_sent(tmp_path: Path, name: str) -> None:
    """What stays private, or was dealt to another, is in no name of what crosses."""
    for number, (method, optimizer) in enumerate([(SPLIT, ADAM), (BACK, ADAM)]):
        played = play(tmp_path / str(number), ALGORITHMS[name], method, optimizer=optimizer, rounds=2)
        for update in played.updates:
            aux = update.payloads[AUX].tensors if AUX in update.payloads else {}
            named = {extra.split("/")[-1] for extra in aux}
            assert named <= update.payloads.keys()


@pytest.mark.parametrize("name", SENDING)
def test_nothing_is_sent_without_federated_slices(tmp_path: Path, name: str) -> None:
    alone = Method(name="ALONE", downlink=(), uplink=(), evaluate="clients")
    played, plain = (
        play(tmp_path / str(number), algorithm, alone, rounds=2)
        for number, algorithm in enumerate([ALGORITHMS[name], FedAvg()])
    )
    assert played.server.ledger.rows() == plain.server.ledger.rows()
    assert all(entry.round == 1 and entry.direction == "down" for entry in played.server.ledger.entries)
    for client in range(2):
        own, expected = (actual.memory(client)["model"] for actual in (played, plain))
        assert all(torch.equal(own[slice_], expected[slice_]) for slice_ in SLICES)


@pytest.mark.parametrize("neutral", [FedProx(0.0), FedAvgM(0.0, 1.0)], ids=["fedprox", "fedavgm"])
@pytest.mark.parametrize("case", SLOW)
def test_an_algorithm_that_changes_nothing_is_fedavg_bit_for_bit(
    tmp_path: Path, neutral: FedAvg, case: str
) -> None:
    arguments: dict[str, Any] = {**CASES[case], "optimizer": ADAM}
    neutral_run, plain = (
        play(tmp_path / str(number), algorithm, **arguments)
        for number, algorithm in enumerate([neutral, FedAvg()])
    )
    for name, tensor in plain.server.theta.items():
        assert tensor.numpy().tobytes() == neutral_run.server.theta[name].numpy().tobytes()
