"""Every algorithm beside a second writing in NumPy, on quadratics whose gradients are known."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import ClientSetup
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import Participation
from fedlight.federation.federator import on_cpu
from fedlight.federation.messages import EXTRAS, Broadcast, Update, from_bytes
from fedlight.federation.method import Method, Split
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.federation.slices import SliceMap

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
) -> Played:
    """Plays a federation.

    Args:
        backwards: clients train and report in reverse.
        restarts: before each round, and after the first update of it, all that is not on disk is lost.
    """
    module = Quadratic(optimizer)
    prefixes = {name: [name] for name in SLICES}
    prefixes["back"].append("counter")
    slices = SliceMap.build(prefixes, module.state_dict())
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
            site.update(next(server.broadcasts()))
            server, site = begin()
        broadcasts = list(server.broadcasts())
        receipts = [site.update(broadcast) for broadcast in (broadcasts[::-1] if backwards else broadcasts)]
        updates = [from_bytes(receipt.read()) for receipt in receipts if receipt]
        for update in updates:
            server.receive(update)
        server.close_round()
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
        taus, images = [], []
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
            taus.append(tau)
            images.append(n)
            for kind, own in zip(moments, (m_k, v_k, t_k), strict=True):
                new_moments[kind] += reports * n * own
        known = counts > 0
        delta = sums / np.where(known, counts, 1)
        if name == "fednova" and taus:
            delta = delta * np.dot(taus, images) / sum(images)
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
        if taus:
            average = theta if average is None else 0.6 * average + 0.4 * theta
    return {"theta": theta, "c": c, "c_k": c_k, "average": average, **moments}


CASES = {
    "full": {"clients": 2, "rounds": 3},
    "split": {"method": SPLIT, "clients": 2, "rounds": 3},
    "partial": {"method": BACK, "clients": 2, "rounds": 3},
    "faults": {"method": SPLIT, "clients": 4, "rounds": 6, "fraction": 0.5, "dropout": 0.3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, SGD) for name in ALGORITHMS), ("scaffold", ADAM), ("localadam", ADAM)]
)
def test_an_algorithm_is_its_second_writing(
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
