"""Algorithms: arithmetic by an independent computation, neutral settings, and an algorithm of a user."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, Cell, Wire
from torch import Tensor, nn
from toy import FULL, PARTIAL, Toy, ToyData, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation.algorithms.fedadam import FedAdam
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.fednova import FedNova
from fedlight.federation.algorithms.fedprox import FedProx
from fedlight.federation.algorithms.localadam import LocalAdam
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.client import local_update
from fedlight.federation.codec import Codec
from fedlight.federation.messages import AUX
from fedlight.federation.server import Server
from fedlight.federation.transforms.topk import TopK

MakeCell = Callable[..., Cell]
CONTROL = "name: control\n_target_: control.Control\nmomentum: 0.5\n"


def run(folder: Path, rounds: int = 3, **setup: object) -> Server:
    """A federation of three toy clients."""
    made = toy_setup(**setup)  # type: ignore[arg-type]
    server = toy_server(made, clients=3)
    for _ in federate(server, inline(toy_site(made, folder)), rounds):
        pass
    return server


def test_fedprox_pulls_towards_the_received_weights(tmp_path: Path) -> None:
    """Three full-batch steps of gradient descent, written out."""
    mu, lr = 0.7, 0.05
    setup = toy_setup(FULL, FedProx(mu), epochs=3)
    broadcast = toy_server(setup).start_round()[0]
    update, _ = local_update(broadcast, {}, setup)

    x, y = (torch.stack(part) for part in zip(*ToyData(0).rows, strict=True))
    module = Toy()
    start = [parameter.detach().clone() for parameter in module.parameters()]
    for _ in range(3):
        module.zero_grad()
        near = sum(((p - s) ** 2).sum() for p, s in zip(module.parameters(), start, strict=True))
        loss = (module.shared(module.own(x)) - y).square().mean() + mu / 2 * near
        loss.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= lr * parameter.grad
    sent = {name: t for payload in update.payloads.values() for name, t in payload.tensors.items()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(sent[name], parameter.detach())


def test_fedprox_leaves_private_slices_alone() -> None:
    """With a large mu the federated slice stays near where it was received; the private one moves."""
    setup = toy_setup(PARTIAL, FedProx(19.0), epochs=40)
    broadcast = toy_server(setup).start_round()[0]
    update, memory = local_update(broadcast, {}, setup)
    free, _ = local_update(broadcast, {}, toy_setup(PARTIAL, epochs=40))
    received = broadcast.payloads["shared"].tensors["shared.weight"]
    held = (update.payloads["shared"].tensors["shared.weight"] - received).norm()
    assert held < 0.3 * (free.payloads["shared"].tensors["shared.weight"] - received).norm()
    own = broadcast.payloads["own"].tensors["own.weight"]
    assert (memory["model"]["own.weight"] - own).norm() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["FULL", "UDEC"])
@pytest.mark.parametrize(("name", "key"), [("fedprox", "mu"), ("fedavgm", "momentum")])
def test_an_algorithm_without_its_term_is_fedavg_bit_for_bit(
    cell: MakeCell, method: str, name: str, key: str
) -> None:
    arguments = (f"method={method}", "clients=3", "partition=label_skew")
    plain = cell(*arguments)
    none, some = (cell(*arguments, f"algorithm={name}", f"algorithm.{key}={value}") for value in (0.0, 0.1))
    keys = ("state_sha256", "client_sha256", "train_loss")
    assert [none.result[key] for key in keys] == [plain.result[key] for key in keys]
    assert none.folder.name != plain.folder.name
    assert some.result["state_sha256"] != plain.result["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["FULL", "USPLIT", "ULATDEC"])
def test_topk_of_all_entries_is_fedavg(cell: MakeCell, method: str) -> None:
    """One round: afterwards Adam makes much of a last bit."""
    arguments = (f"method={method}", "clients=3", "partition=quantity_skew", "rounds=1")
    plain, whole = cell(*arguments), cell(*arguments, "transform=topk", "transform.up.0.share=1.0")
    for name, tensor in plain.model.items():
        torch.testing.assert_close(whole.model[name], tensor, rtol=1e-6, atol=1e-6)
    assert whole.result["exchange"]["params_total"] == plain.result["exchange"]["params_total"]
    assert whole.result["exchange"]["bytes_total"] > plain.result["exchange"]["bytes_total"]


def test_topk_of_all_entries_is_fedavg_over_rounds_of_gradient_descent(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", rounds=10).theta
    whole = run(tmp_path / "whole", rounds=10, codec=Codec([TopK(1.0)])).theta
    for name, tensor in plain.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_an_algorithm_of_a_user_is_one_file_and_one_yaml(
    command: Callable[..., int], tmp_path: Path, wire: Wire
) -> None:
    """The server's state and the clients' memory are kept over rounds; auxiliary state is in the ledger."""
    folder = tmp_path / "mine" / "algorithm"
    folder.mkdir(parents=True)
    (folder / "control.yaml").write_text(CONTROL)
    small = ("--config-dir", "mine", *SMALL, "method=UDEC", "clients=4", "fraction=0.5", "rounds=6")
    assert command(*small, "algorithm=control", "name=once") == 0
    (made,) = (Cell(path.parent) for path in tmp_path.glob("runs/once/*/result.json"))
    visits: dict[int, int] = {}
    reported: list[list[float]] = [[0.0]]
    for message in (*wire.broadcasts, *wire.updates):
        assert message.payloads[AUX].params == 1
    for round_ in range(1, 7):
        sent = [b.payloads[AUX].tensors["visits"].item() for b in wire.broadcasts if b.round == round_]
        assert sent == [pytest.approx(np.mean(reported[-1]))] * 2
        updates = [update for update in wire.updates if update.round == round_]
        for update in updates:
            visits[update.client] = visits.get(update.client, 0) + 1
            assert update.payloads[AUX].tensors["visits"] == visits[update.client]
        reported.append([float(visits[update.client]) for update in updates])
    assert max(visits.values()) > 2
    aux = [row for row in made.rows("ledger.csv") if row["slice"] == AUX]
    assert len(aux) == 24
    assert command(*small, "algorithm=control", "algorithm.momentum=0.0", "name=still") == 0
    assert command(*small, "name=plain") == 0
    once, still, plain = (
        Cell(path.parent).model
        for name in ("once", "still", "plain")
        for path in tmp_path.glob(f"runs/{name}/*/result.json")
    )

    def distance(model: dict[str, torch.Tensor]) -> float:
        return sum((model[name] - plain[name]).square().sum().item() for name in plain)

    assert 100 * distance(still) < distance(once)  # without momentum it is FedAvg, but for last bits


def test_server_momentum_by_hand(tmp_path: Path) -> None:
    from control import Control

    made = toy_setup(FULL, Control(0.5))
    server, site = toy_server(made, clients=2), toy_site(made, tmp_path)
    received: list = []
    take = server.receive
    server.receive = lambda update: (received.append(update), take(update))[0]  # type: ignore[method-assign]
    theta = {name: tensor.double() for name, tensor in server.theta.items()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for done in federate(server, inline(site), 3):
        for name in theta:
            values = [
                (update.num_examples, payload.tensors[name].double())
                for update in received
                for payload in update.payloads.values()
                if name in payload.tensors
            ]
            mean = sum(n * value for n, value in values) / sum(n for n, _ in values)
            velocity[name] = 0.5 * velocity[name] + mean - theta[name]
            theta[name] = theta[name] + velocity[name]
            torch.testing.assert_close(server.theta[name].double(), theta[name], rtol=1e-5, atol=1e-6)
        received.clear()
        assert done.round == server.round


def test_fedadam_without_memory_steps_by_the_last_difference() -> None:
    """m is the difference and v its square: eta * d / (|d| + tau)."""
    algorithm = FedAdam(lr=0.5, momentum=0.0, beta2=0.0, tau=1.0)
    theta, mean = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([4.0, -2.0])}
    after, _ = algorithm.step(theta, mean, {}, algorithm.init(theta))
    assert after["w"].tolist() == [1 + 0.5 * 3 / 4, 1 - 0.5 * 3 / 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=fedprox", "algorithm.mu=-1"], "algorithm.mu must be 0 or more, got -1"),
        (
            ["algorithm=fedavgm", "algorithm.momentum=1.5"],
            "algorithm.momentum must be 0 or more and below 1, got 1.5",
        ),
        (["algorithm=fedavgm", "algorithm.lr=0"], "algorithm.lr must be above 0, got 0"),
        (["algorithm=fedadam", "algorithm.tau=0"], "algorithm.tau must be above 0, got 0"),
        (
            ["algorithm=fedyogi", "algorithm.beta2=1"],
            "algorithm.beta2 must be 0 or more and below 1, got 1",
        ),
        (["transform=topk", "transform.up.0.share=0"], "share of topk must be above 0 and at most 1, got 0"),
        (["transform=int8", "transform.up.0.bits=3"], "bits of quantisation must be 2, 4 or 8, got 3"),
        (["transform=lowrank", "transform.down.0.rank=0"], "rank of lowrank must be 1 or more, got 0"),
        (["+algorithm.name=x", "+algorithm._target_=nowhere.Nothing"], "nowhere"),
        (
            ["+algorithm.name=x", "+algorithm._target_=builtins.dict"],
            "algorithm must be a subclass of FedAvg",
        ),
    ],
)
def test_invalid_arguments_are_rejected_in_one_line(
    command: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert command(*SMALL, *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedlight: error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_fedavg_adds_nothing() -> None:
    plain = FedAvg()
    assert plain.weight(17) == 17
    assert (plain.init({}), plain.broadcast({}), plain.callbacks({}, {}, {})) == ({}, {}, [])


class Scaled(Toy):
    """The toy with a parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.shared.register_parameter("scale", nn.Parameter(torch.tensor(0.5)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.shared.scale * self.shared(self.own(x)) - y).square().mean()


@pytest.mark.parametrize("algorithm", [FedProx(0.5), Scaffold(), FedNova(), LocalAdam()])
def test_a_parameter_may_have_no_dimension(algorithm: FedAvg, tmp_path: Path) -> None:
    setup = toy_setup(algorithm=algorithm, module=Scaled())
    server = toy_server(setup, 2)
    for _ in federate(server, inline(toy_site(setup, tmp_path)), 2):
        pass
    assert server.theta["shared.scale"] != 0.5
