"""The guarantee of a configuration against numbers computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import config
from lightning import Trainer
from line import Line, rows
from torch.utils.data import DataLoader
from toy import toy_setup

from fedlight.experiment.mechanisms import make_mechanism, make_private_training
from fedlight.experiment.privacy_account import PrivacyAccount, noise_multiplier
from fedlight.experiment.trial import check
from fedlight.federation.cohort import Participation
from fedlight.federation.noise import SeededNoise
from fedlight.privacy.account import Account
from fedlight.runtime.errors import BadInput

CLIENT_INDICES = [np.arange(100), np.arange(20)]


def test_the_noise_of_a_target_is_the_least_that_keeps_a_client_within_it() -> None:
    made = config("clients=4", "fraction=0.5", "rounds=6", "privacy=client", "privacy.target_epsilon=3")
    noise = noise_multiplier(made, CLIENT_INDICES, toy_setup().method)
    assert Account(noise, 0.5, made.privacy.delta).epsilon(6) <= 3
    assert Account(noise - 0.01, 0.5, made.privacy.delta).epsilon(6) > 3
    no_rounds = made.model_copy(update={"rounds": 0})
    assert noise_multiplier(no_rounds, CLIENT_INDICES, toy_setup().method) == made.privacy.noise
    assert noise_multiplier(config(), CLIENT_INDICES, toy_setup().method) == 0


@pytest.mark.parametrize("pool", [False, True])
def test_the_noise_of_a_target_is_that_of_the_client_who_spends_most(pool: bool) -> None:
    """Batches of 30: of 100 images 4 steps at 0.3, of 20 one step at 1, of the 120 of a pool 4 at 0.25."""
    arguments = ("clients=2", "rounds=3", "epochs=2", "data.batch_size=30", "fraction=1")
    made = config(*arguments, "privacy=example", "privacy.target_epsilon=3")
    method = toy_setup().method.model_copy(update={"pool": pool})
    noise = noise_multiplier(made, CLIENT_INDICES, method)
    accounts = [(0.25, 3 * 2 * 4)] if pool else [(0.3, 3 * 2 * 4), (1.0, 3 * 2 * 1)]

    def spent(multiplier: float) -> list[float]:
        return [Account(multiplier, rate, made.privacy.delta).epsilon(steps) for rate, steps in accounts]

    assert max(spent(noise)) <= 3 < max(spent(noise - 0.01))
    if not pool:
        assert min(spent(noise)) < 2.9


def test_only_the_rounds_that_a_client_was_drawn_for_count(tmp_path: Path) -> None:
    made = config("clients=2", "fraction=0.5", "epochs=1", "privacy=example", "data.batch_size=30")
    method = toy_setup().method
    epsilons = PrivacyAccount(made, made.privacy.noise, CLIENT_INDICES, method, tmp_path).epsilons(8)
    drawn = [Participation(2, 0.5, 0.0, made.seed).draw(method, round_)[0] for round_ in range(1, 9)]
    for client, rate, steps in ((0, 0.3, 4), (1, 1.0, 1)):
        times = drawn.count([client])
        assert 0 < times < 8
        account = Account(made.privacy.noise, rate, made.privacy.delta)
        assert epsilons[client] == pytest.approx(account.epsilon(steps * times))


@pytest.mark.parametrize(
    ("kind", "more"), [("client", {"noise_at"}), ("example", {"draws", "epsilon_clients"})]
)
def test_the_privacy_entry_of_a_result_states_the_guarantee(
    kind: str, more: set[str], tmp_path: Path
) -> None:
    made = config("clients=2", f"privacy={kind}", "privacy.noise=2", "privacy.clip=0.5")
    account = PrivacyAccount(made, made.privacy.noise, CLIENT_INDICES, toy_setup().method, tmp_path)
    entry = account.to_entry([1.5, math.inf])
    assert entry.keys() == {"kind", "epsilon", "delta", "noise", "clip"} | more
    assert (entry["kind"], entry["epsilon"], entry["noise"], entry["clip"]) == (kind, "inf", 2.0, 0.5)
    assert entry.get("epsilon_clients", [1.5, "inf"]) == [1.5, "inf"]
    assert account.to_entry([1.5, 0.5])["epsilon"] == 1.5


def test_the_mechanism_is_as_configured(tmp_path: Path) -> None:
    made = config("clients=40", "fraction=0.25", "privacy=client", "privacy.noise=0.3", "privacy.clip=2")
    plain = make_mechanism(made, 0.3)
    assert plain is not None
    assert (plain.clip, plain.noise, plain.clients, plain.expected) == (2.0, 0.3, 40, 10.0)
    assert (plain.at_clients, plain.quantile) == (False, None)
    drawn = plain.source("server", 1).standard_normal(5)
    assert np.array_equal(drawn, SeededNoise(made.seed)("server", 1).standard_normal(5))
    other = config("privacy=client", "privacy.noise_at=clients", "privacy.clip_quantile=0.5")
    mechanism = make_mechanism(other, 1.0)
    assert mechanism is not None
    assert (mechanism.at_clients, mechanism.quantile) == (True, 0.5)
    secret = make_mechanism(config("privacy=client", "privacy.secure_noise=true"), 1.0, tmp_path)
    assert secret is not None
    secret.source("server", 1)
    secret.source("server", 1)
    assert (tmp_path / "releases").read_bytes() == b".."
    for arguments in ([], ["privacy=example"]):
        assert make_mechanism(config(*arguments), 1.0, tmp_path) is None
    for arguments in ([], ["privacy=client"]):
        assert make_private_training(config(*arguments), 1.0, CLIENT_INDICES, tmp_path) is None


@pytest.mark.parametrize(("images", "batch", "expected"), [(40, 30, 30), (40, 100, 40)])
def test_gradients_are_divided_by_the_expected_batch_of_the_client(
    images: int, batch: int, expected: int, tmp_path: Path
) -> None:
    made = config("privacy=example", "privacy.noise=0", "privacy.clip=inf", f"data.batch_size={batch}")
    make = make_private_training(made, 0.0, [np.arange(9), np.arange(images)], tmp_path)
    assert make is not None
    module, (x, y) = Line(), rows(images)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    quiet |= {"enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[make(1)], **quiet)
    trainer.fit(module, DataLoader([(x, y)], batch_size=None))
    gradient = (2 * (x @ torch.zeros(3) - y)[:, None] * x).sum(dim=0) / expected
    torch.testing.assert_close(-module.weight.detach(), gradient)
    assert not list(tmp_path.iterdir())


def test_only_an_adaptive_clip_bounds_the_noise() -> None:
    """Of two clients the count of those within the clip is lost in noise above a bound."""
    overrides = (
        "clients=2",
        "data.limit=20",
        "trainer.accelerator=cpu",
        "privacy=client",
        "privacy.noise=100",
    )
    assert check(config(*overrides), elsewhere=False) is not None
    with pytest.raises(BadInput, match=r"needs noise below [\d.]+ for an adaptive clip"):
        check(config(*overrides, "privacy.clip_quantile=0.5"), elsewhere=False)
