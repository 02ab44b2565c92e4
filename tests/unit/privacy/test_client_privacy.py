"""Client-level privacy: the bound on one client's contribution, the noise, and the account."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, Cell, Wire
from control import Control
from opacus.accountants.analysis import rdp
from torch import Tensor
from toy import FULL, PARTIAL, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.checkpoint import ServerCheckpoint
from fedlight.federation.client import local_update
from fedlight.federation.cohort import Participation
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.messages import AUX, Payload, State, Update
from fedlight.federation.noise import SecretNoise, SeededNoise
from fedlight.federation.server import Server
from fedlight.privacy.account import Account, calibrate
from fedlight.runtime.system_random import SystemGenerator

MakeCell = Callable[..., Cell]


class Equal(FedAvg):
    """Unweighted averaging."""

    def weight(self, num_examples: int) -> float:
        return 1


class Counting(Control):
    """`Control` says beforehand what it reports."""

    def aux_like(self, theta: State) -> State:
        return {"visits": torch.zeros(())}


def mechanism(clip: float = 1.0, noise: float = 0.0, clients: int = 2, **more) -> GaussianMechanism:
    arguments = {"at_clients": False, "quantile": None, "source": SeededNoise(3), "expected": clients, **more}
    return GaussianMechanism(clip=clip, noise=noise, clients=clients, **arguments)


def wide(clients: int, method=FULL, **arguments) -> Server:
    """A server of a model with many parameters, whose round is open."""
    server = toy_server(toy_setup(method, privacy=mechanism(clients=clients, **arguments)), clients)
    shapes = {"own.weight": (300, 100), "own.bias": (5,), "shared.weight": (50, 100), "shared.bias": (1,)}
    server.theta = {name: torch.zeros(shape) for name, shape in shapes.items()}
    server.start_round()
    return server


def update(client: int, values: State, aux: State | None = None, round_: int = 1) -> Update:
    groups: dict[str, State] = {}
    for name, tensor in values.items():
        groups.setdefault(name.partition(".")[0], {})[name] = tensor
    payloads = {slice_: Payload.plain(tensors) for slice_, tensors in groups.items()}
    if aux:
        payloads[AUX] = Payload.plain(aux)
    return Update("toy", round_, client, 0, None, payloads)


def flat(state: State) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def random_values(server: Server, seed: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(tensor.shape, generator=generator) for name, tensor in server.theta.items()
    }


# --- the account ---


@pytest.mark.parametrize(
    ("noise", "rate", "releases"),
    [
        (1.0, 1.0, 1),
        (5.0, 1.0, 10),
        (0.7, 1.0, 3),
        (1.0, 0.1, 20),
        (0.5, 0.1, 20),
        (2.0, 0.5, 100),
        (0.8, 0.01, 1000),
        (1.5, 0.05, 400),
        (4.0, 0.3, 50),
        (10.0, 0.5, 4),
    ],
)
def test_epsilon_is_that_of_opacus(noise: float, rate: float, releases: int) -> None:
    """Up to the orders whose series dp-accounting leaves out, on the safe side."""
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 256)) + [512, 1024]
    spent = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=releases, orders=orders)
    epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=1e-5)
    assert 0.999 * epsilon <= Account(noise, rate, 1e-5).epsilon(releases) <= 1.03 * epsilon


def test_epsilon_grows_with_releases_and_rate_and_falls_with_noise() -> None:
    by_noise = [Account(noise, 0.2, 1e-5).epsilon(10) for noise in (0.5, 0.7, 1, 2, 5)]
    by_rate = [Account(1, rate, 1e-5).epsilon(10) for rate in (1, 0.5, 0.2, 0.1, 0.01)]
    by_release = [Account(1, 0.2, 1e-5).epsilon(releases) for releases in (30, 10, 2, 1, 0)]
    for epsilons in (by_noise, by_rate, by_release):
        assert all(larger > smaller for larger, smaller in pairwise(epsilons))
    assert by_release[-1] == 0


def test_epsilon_without_noise_is_infinite() -> None:
    assert Account(0, 0.1, 1e-5).epsilon(1) == math.inf


def test_the_noise_of_a_target_is_the_smallest_that_meets_it() -> None:
    noise = calibrate(3.0, 1e-5, 0.2, 50)
    assert 2.95 < Account(noise, 0.2, 1e-5).epsilon(50) <= 3.0


# --- the sum ---


def test_without_clip_and_noise_it_is_unweighted_averaging_bit_for_bit(tmp_path: Path) -> None:
    none = mechanism(math.inf, 0.0, clients=5)
    for method in (FULL, PARTIAL):
        plain, private = (toy_setup(method, Equal(), privacy=privacy) for privacy in (None, none))
        ends = []
        for number, setup in enumerate((plain, private)):
            server = toy_server(setup, clients=5)
            for _ in federate(server, inline(toy_site(setup, tmp_path / f"{method.name}{number}")), 4):
                pass
            ends.append(server.theta)
        for name, tensor in ends[0].items():
            assert ends[1][name].dtype == tensor.dtype
            assert torch.equal(ends[1][name], tensor)
        assert not torch.equal(ends[0]["shared.weight"], toy_server(plain).theta["shared.weight"])


BAD = {
    "nan": lambda server: {**random_values(server, 9), "own.bias": torch.full((5,), math.nan)},
    "infinite": lambda server: {**random_values(server, 9), "own.bias": torch.full((5,), math.inf)},
    "huge": lambda server: {name: torch.full_like(t, 3e38) for name, t in server.theta.items()},
    "slice missing": lambda server: {"own.weight": torch.zeros(300, 100), "own.bias": torch.zeros(5)},
    "shape": lambda server: {**random_values(server, 9), "own.bias": torch.zeros(1)},
    "dtype": lambda server: {**random_values(server, 9), "own.bias": torch.zeros(5).double()},
}
CLIPPED = {
    "large": lambda server: {name: torch.full_like(t, 1e30) for name, t in server.theta.items()},
    "all in one tensor": lambda server: {**server.theta, "own.bias": torch.full((5,), -1e6)},
    "more than asked": lambda server: {**random_values(server, 9), "own.more": torch.full((5,), 1e6)},
    "small": lambda server: random_values(server, 9, 1e-6),
}


def total(server: Server, updates: list[Update], expected: float) -> Tensor:
    for one in updates:
        server.receive(one)
    server.finish_round()
    return flat(server.theta) * expected


@pytest.mark.parametrize("attack", [*BAD, *CLIPPED])
def test_one_client_changes_the_sum_by_the_clip_at_most(attack: str, capfd) -> None:
    clip, clients = 0.5, 4
    honest = [update(client, random_values(wide(clients, clip=clip), client)) for client in range(3)]
    without = total(wide(clients, clip=clip), honest, clients)
    server = wide(clients, clip=clip)
    adversarial = (BAD | CLIPPED)[attack](server)
    changed = (total(server, [*honest, update(3, adversarial)], clients) - without).norm()
    assert changed <= clip * (1 + 1e-5)
    assert changed > 0 or attack in BAD
    refused = capfd.readouterr().err
    assert ("the update of client 3" in refused and "refused" in refused) == (attack in BAD)
    for other in (*BAD, *CLIPPED):
        server = wide(clients, clip=clip)
        replaced = total(server, [*honest, update(3, (BAD | CLIPPED)[other](server))], clients)
        assert (replaced - without).norm() <= clip * (1 + 1e-5)


def test_a_repeated_update_counts_once_and_one_of_an_unknown_client_not_at_all(capfd) -> None:
    server = wide(2, clip=0.5)
    values = random_values(server, 0)
    for one in (update(0, values), update(0, values), update(7, values), update(1, values, round_=2)):
        server.receive(one)
    outcome = server.finish_round()
    assert outcome.reports == 1
    assert (flat(server.theta) * 2).norm() == pytest.approx(0.5, rel=1e-5)
    assert "came twice" in capfd.readouterr().err


@pytest.mark.parametrize("visits", [10.0, 1e30])
def test_auxiliary_state_shares_the_norm_of_the_slices(visits: float) -> None:
    made = mechanism(clip=1.0, clients=1)
    setup = toy_setup(FULL, Counting(0.0), privacy=made)
    server = toy_server(setup, clients=1)
    server.start_round()
    start = {name: tensor.clone() for name, tensor in server.theta.items()}
    moved = {name: tensor + 2.0 for name, tensor in start.items()}
    norm = math.sqrt(4 * sum(tensor.numel() for tensor in start.values()) + visits**2)
    server.receive(update(0, moved, {"visits": torch.tensor(visits)}))
    server.finish_round()
    assert server.state["visits"].item() == pytest.approx(visits / norm)
    for name, tensor in start.items():
        torch.testing.assert_close(server.theta[name], tensor + 2.0 / norm)


# --- the noise ---


def released(server: Server, updates: list[Update] = []) -> Tensor:  # noqa: B006
    for one in updates:
        server.receive(one)
    server.finish_round()
    return flat(server.theta)


@pytest.mark.parametrize("reports", [0, 1, 4, 10])
@pytest.mark.parametrize("at_clients", [False, True])
def test_the_noise_on_the_sum_does_not_depend_on_who_reports(reports: int, at_clients: bool) -> None:
    """35,006 draws: their standard deviation is known to 0.4 %."""
    clip, noise, clients = 0.5, 3.0, 10
    made = mechanism(clip, noise, clients=clients, at_clients=at_clients)
    server = wide(clients, clip=clip, noise=noise, at_clients=at_clients)
    updates, clear = [], torch.zeros(35006, dtype=torch.float64)
    for client in range(reports):
        values = random_values(server, client)
        clear += flat(values) * clip / flat(values).norm()
        if at_clients:
            values, _ = made.share(values, {}, server.theta, 1, client)
        updates.append(update(client, values))
    blur = released(server, updates) * clients - clear
    assert blur.std().item() == pytest.approx(noise * clip, rel=0.02)
    assert abs(blur.mean().item()) < 5 * noise * clip / math.sqrt(35006)


def test_a_share_of_the_noise_hides_the_update_from_the_server() -> None:
    server = wide(4, clip=1.0, noise=2.0, at_clients=True)
    values = random_values(server, 0)
    sent, _ = mechanism(1.0, 2.0, clients=4, at_clients=True).share(values, {}, server.theta, 1, 0)
    assert (flat(sent) - flat(values) / flat(values).norm()).std().item() == pytest.approx(1.0, rel=0.02)


def test_a_client_adds_its_share_of_the_noise_before_it_reports() -> None:
    private = mechanism(0.1, 2.0, at_clients=True)
    open_, hidden = toy_setup(), toy_setup(privacy=private)
    server = toy_server(open_)
    _, broadcast = server.start_round()
    (clear, _), (sent, _) = (local_update(broadcast, {}, setup) for setup in (open_, hidden))
    trained = {name: t for payload in clear.payloads.values() for name, t in payload.tensors.items()}
    expected, _ = private.share(trained, {}, server.theta, 1, 1)
    reported = {name: t for payload in sent.payloads.values() for name, t in payload.tensors.items()}
    assert all(torch.equal(reported[name], expected[name]) for name in trained)
    assert reported.keys() == trained.keys()
    assert (sent.num_examples, sent.loss) == (0, None)


@pytest.mark.parametrize("at_clients", [False, True])
def test_noise_is_drawn_anew_in_every_round_and_client(at_clients: bool) -> None:
    made = mechanism(1.0, 1.0, at_clients=at_clients)
    start = wide(2).theta
    draws = []
    for round_ in (1, 2, 3):
        if at_clients:
            draws += [flat(made.share(start, {}, start, round_, client)[0]) for client in (0, 1)]
        server = wide(2, noise=1.0, at_clients=at_clients)
        server.round = round_ - 1
        draws.append(released(server))
    correlations = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.03


def test_noise_is_seeded_in_simulation_and_secret_in_deployment(tmp_path: Path) -> None:
    def draw(source) -> np.ndarray:
        return source("server", 1).standard_normal(1000)

    assert np.array_equal(draw(SeededNoise(1)), draw(SeededNoise(1)))
    assert not np.array_equal(draw(SeededNoise(1)), draw(SeededNoise(2)))
    secret = SecretNoise(tmp_path / "releases")
    assert not np.array_equal(draw(secret), draw(secret))
    assert (tmp_path / "releases").stat().st_size == 2


def test_normal_numbers_of_the_system_are_normal() -> None:
    from scipy.stats import kstest

    numbers = SystemGenerator().standard_normal((100, 1000))
    assert numbers.shape == (100, 1000)
    assert kstest(numbers.flatten(), "norm").pvalue > 1e-6


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_least_and_the_largest_number_of_the_system_are_finite(
    byte: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: byte * count)
    assert np.isfinite(SystemGenerator().standard_normal(3)).all()


# --- the cohort ---


def test_cohorts_are_poisson() -> None:
    rounds, clients, rate = 3000, 20, 0.1
    participation = Participation(clients, rate, 0.0, 5, poisson=True)
    method = toy_setup().method
    cohorts = [participation.draw(method, round_)[0] for round_ in range(1, rounds + 1)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    assert sizes.mean() == pytest.approx(clients * rate, rel=0.05)
    assert sizes.var() == pytest.approx(clients * rate * (1 - rate), rel=0.1)
    assert (sizes == 0).mean() == pytest.approx((1 - rate) ** clients, rel=0.2)
    together = np.array([[client in cohort for client in range(clients)] for cohort in cohorts])
    assert np.abs(np.corrcoef(together.T) - np.eye(clients)).max() < 0.09
    secret = replace(participation, secret=True)
    assert [secret.draw(method, r)[0] for r in (1, 2, 3, 4)] != [
        secret.draw(method, r)[0] for r in (1, 2, 3, 4)
    ]


def test_an_empty_cohort_is_a_round_with_noise_alone(tmp_path: Path) -> None:
    setup = toy_setup(privacy=mechanism(noise=0.01, clients=3, expected=0.3))
    server = toy_server(setup, clients=3, fraction=0.1)
    before = dict(server.theta)
    empty = []
    for done in federate(server, inline(toy_site(setup, tmp_path)), 8):
        if not done.cohort:
            empty.append(done.round)
            assert done.train_loss is None
            assert all(not torch.equal(server.theta[name], before[name]) for name in before)
        before = dict(server.theta)
    assert empty


# --- the adaptive clip ---


def test_the_adaptive_clip_finds_its_quantile_and_survives_a_restart(tmp_path: Path) -> None:
    clients = 30
    made = mechanism(10.0, 0.5, clients=clients, quantile=0.5)
    setup = toy_setup(privacy=made)
    server = toy_server(setup, clients=clients)
    norms = np.linspace(0.1, 2.0, clients)
    for round_ in range(1, 61):
        server.start_round()
        for client in range(clients):
            direction = random_values(server, client)
            scale = norms[client] / flat(direction).norm()
            values = {name: (server.theta[name] + scale * t).float() for name, t in direction.items()}
            server.receive(update(client, values, round_=round_))
        server.finish_round()
    clip = server._private["clip"].item()
    assert np.mean(norms <= clip) == pytest.approx(0.5, abs=0.15)
    checkpoint = ServerCheckpoint(tmp_path, "toy")
    server.save(checkpoint, {})
    again = toy_server(setup, clients=clients)
    again.resume(checkpoint)
    assert again._private["clip"].item() == clip


@pytest.mark.parametrize("expected", [10, 20])
def test_a_step_of_the_adaptive_clip_by_hand(expected: int) -> None:
    """Algorithm 1 and theorem 1 of arXiv 1905.03871; every draw is 1."""
    clip, noise, keys = 0.1, 0.8, []

    def source(*key: int | str) -> SimpleNamespace:
        keys.append(key)
        return SimpleNamespace(standard_normal=np.ones)

    server = wide(expected, clip=clip, noise=noise, quantile=0.7, source=source)
    assert server._private["clip"].item() == clip
    fits, too_large = server.theta, {**server.theta, "shared.bias": torch.tensor([5.0])}
    theta = released(server, [update(client, fits if client else too_large) for client in range(4)])
    count_noise = expected / 20
    rest = (noise**-2 - (2 * count_noise) ** -2) ** -0.5
    assert theta[:-1] == pytest.approx(rest * clip / expected)
    assert theta[-1] == pytest.approx((rest * clip + clip) / expected)
    share = (3 - 4 / 2 + count_noise) / expected + 1 / 2
    assert server._private["clip"].item() == pytest.approx(clip * math.exp(-0.2 * (share - 0.7)))
    assert keys == [("server", 1)]


# --- cells ---


def test_a_private_cell_reports_its_epsilon(cell: MakeCell, wire: Wire) -> None:
    made = cell("method=UDEC", "clients=4", "fraction=0.5", "rounds=3", "privacy=client", "privacy.noise=0.8")
    spent = [float(row["epsilon"]) for row in made.rows("rounds.csv")]
    assert spent == pytest.approx([Account(0.8, 0.5, 1e-5).epsilon(round_) for round_ in (1, 2, 3)])
    entry = made.result["privacy"]
    assert entry == {
        "kind": "client",
        "epsilon": spent[-1],
        "delta": 1e-5,
        "noise": 0.8,
        "clip": 1.0,
        "noise_at": "server",
    }
    for one in wire.updates:
        assert (one.num_examples, one.loss) == (0, None)
    assert made.result["train_loss"] is None


@pytest.mark.slow
def test_a_cell_without_noise_has_infinite_epsilon(cell: MakeCell) -> None:
    made = cell("clients=2", "rounds=1", "privacy=client", "privacy.noise=0", "privacy.clip=inf")
    same = cell("clients=2", "rounds=1", "privacy=client", "privacy.target_epsilon=inf", "privacy.clip=inf")
    assert same.result["state_sha256"] == made.result["state_sha256"]
    assert made.result["privacy"]["epsilon"] == same.result["privacy"]["epsilon"] == "inf"
    assert made.rows("rounds.csv")[0]["epsilon"] == "inf"
    assert "privacy" not in cell("clients=2", "rounds=0").result


@pytest.mark.slow
def test_a_cell_with_a_target_and_shared_noise(cell: MakeCell, wire: Wire) -> None:
    arguments = (
        "clients=3",
        "rounds=2",
        "privacy=client",
        "privacy.target_epsilon=4",
        "privacy.noise_at=clients",
    )
    one, two = (
        cell(*arguments, "transport=inline"),
        cell(*arguments, "transport=processes", "trainer.workers=2"),
    )
    assert one.result["state_sha256"] == two.result["state_sha256"]
    assert 3.9 < one.result["privacy"]["epsilon"] <= 4


@pytest.mark.slow
def test_rounds_that_are_repeated_with_secret_noise_are_accounted_again(
    command: Callable[..., int], tmp_path: Path
) -> None:
    arguments = (*SMALL, "clients=2", "privacy=client", "privacy.secure_noise=true", "name=again")
    assert command(*arguments) == 0
    (result,) = tmp_path.glob("runs/again/*/result.json")
    first = Cell(result.parent).result
    result.unlink()
    for stored in result.parent.glob("checkpoint/server-*"):
        stored.unlink()
    assert command(*arguments) == 0
    again = Cell(result.parent).result
    assert again["state_sha256"] != first["state_sha256"]
    assert first["privacy"]["epsilon"] == pytest.approx(Account(1, 1, 1e-5).epsilon(2))
    assert again["privacy"]["epsilon"] == pytest.approx(Account(1, 1, 1e-5).epsilon(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=CENTRAL"], "CENTRAL and LOCAL have none"),
        (["method=LOCAL"], "CENTRAL and LOCAL have none"),
        (["method=USPLIT"], "USPLIT reveals which clients take part"),
        (["model.ema_decay=0.9", "model.exchange_ema=true"], "n_averaged holds whole numbers"),
        (["algorithm=fednova"], "an algorithm that declares by aux_like"),
        (["privacy.clip=inf"], "a finite privacy.clip"),
        (["privacy.noise_at=clients", "transform=topk"], "where a transform encodes updates"),
        (["privacy.clip_quantile=0.5"], "noise below 0.5 for an adaptive clip"),
        (["privacy.delta=2"], "privacy.delta"),
        (["privacy.noise=-1"], "privacy.noise"),
    ],
)
def test_configurations_that_void_the_guarantee_are_rejected(
    command: Callable[..., int], tmp_path: Path, capfd, arguments: list[str], message: str
) -> None:
    assert command(*SMALL, "privacy=client", *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedlight: error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()
