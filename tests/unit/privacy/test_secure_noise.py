"""`privacy.secure_noise=true`: every draw that privacy depends on comes from the operating system."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import config
from line import Line, fit
from scipy.stats import binom, kstest
from torch import Tensor
from toy import toy_setup

from fedlight.data.client_data import PoissonBatches
from fedlight.experiment.clients import make_site
from fedlight.experiment.mechanisms import make_mechanism, make_participation
from fedlight.experiment.privacy_account import PrivacyAccount
from fedlight.experiment.setup import set_up
from fedlight.federation.cohort import Participation
from fedlight.federation.method import Method
from fedlight.privacy.account import Account
from fedlight.runtime.system_random import SystemGenerator

WIDTH = 20_000
FULL = Method(name="FULL", downlink=("all",), uplink=("all",), evaluate="global")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each call has taken from the operating system."""
    sizes: list[int] = []
    real = os.urandom

    def counted(size: int) -> bytes:
        sizes.append(size)
        return real(size)

    monkeypatch.setattr(os, "urandom", counted)
    return sizes


@contextmanager
def fixed_seeds() -> Iterator[None]:
    """Everything inside starts from the same state of all seeded generators."""
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    yield


def private_step(secret: bool = True, noise: float = 3.0, clip: float = 0.5) -> Tensor:
    """The noise of one step of example-level privacy, whose gradient is 0 otherwise."""
    with fixed_seeds():
        nothing = torch.zeros(2, WIDTH), torch.zeros(2)
        return fit(Line(WIDTH), nothing, noise=noise, clip=clip, batch_size=4, secret=secret)


def poisson_batches(secret: bool = True) -> list[list[int]]:
    with fixed_seeds():
        return [batch.tolist() for batch in PoissonBatches(100, 8, secret)]


def poisson_cohorts(secret: bool = True) -> list[list[int]]:
    with fixed_seeds():
        made = Participation(50, 0.3, 0.0, 5, poisson=True, secret=secret)
        return [made.draw(FULL, round_)[0] for round_ in (1, 2, 3)]


@pytest.mark.parametrize(
    "draw", [poisson_batches, poisson_cohorts, lambda secret: private_step(secret).tolist()]
)
def test_secret_draws_do_not_repeat_under_the_same_seeds(draw: Callable[[bool], list[Any]]) -> None:
    assert draw(False) == draw(False)
    assert draw(True) != draw(True)


def test_every_secret_number_takes_eight_bytes_of_the_operating_system(drawn: list[int]) -> None:
    """So no state that is smaller than what a draw needs, such as a 32-bit seed, lies between."""
    for draw, numbers in ((private_step, WIDTH), (poisson_batches, 13 * 100), (poisson_cohorts, 3 * 50)):
        drawn.clear()
        draw()
        assert sum(size for size in drawn if size > 64) == 8 * numbers, draw
        drawn.clear()
        draw(secret=False)
        assert not [size for size in drawn if size > 64], draw


def test_secret_noise_of_a_step_is_normal() -> None:
    noise = private_step().double().numpy()
    assert kstest(noise, "norm", args=(0, 3.0 * 0.5 / 4)).pvalue > 1e-6


def test_without_noise_a_secret_step_takes_the_plain_gradient() -> None:
    assert private_step(noise=0.0, clip=float("inf")).abs().sum() == 0


def test_uniform_numbers_of_the_system_are_uniform() -> None:
    numbers = SystemGenerator().random((100, 1000))
    assert numbers.shape == (100, 1000)
    assert kstest(numbers.flatten(), "uniform").pvalue > 1e-6


def test_secret_batches_have_the_rate_of_the_account() -> None:
    batches = [batch for _ in range(200) for batch in PoissonBatches(100, 8, secret=True)]
    images = torch.cat(batches)
    assert len(batches) == 2600
    low, high = binom.ppf([1e-7, 1 - 1e-7], 2600 * 100, 0.08)
    assert low < len(images) < high
    low, high = binom.ppf([1e-9, 1 - 1e-9], 2600, 0.08)
    counts = images.bincount(minlength=100)
    assert low < counts.min() <= counts.max() < high


# --- the configuration ---


@pytest.mark.parametrize("secret", [True, False])
def test_the_configuration_makes_batches_and_gradients_secret(
    secret: bool, tmp_path: Path, drawn: list[int]
) -> None:
    """Images: 12 a client, 6 a batch on average, so 2 batches an epoch."""
    arguments = ("clients=2", "data.limit=24", "data.batch_size=6", "trainer.accelerator=cpu", "epochs=1")
    arguments = (*arguments, "privacy=example", "privacy.draws=1")
    made = set_up(config(*arguments, f"privacy.secure_noise={str(secret).lower()}"))
    (tmp_path / "checkpoint").mkdir()
    setup = make_site(made, tmp_path).setup
    drawn.clear()

    def batches() -> list[list[float]]:
        with fixed_seeds():
            return [batch.flatten(1).sum(1).tolist() for batch in setup.data(1).train_dataloader()]

    assert (batches() == batches()) is not secret
    assert sum(size for size in drawn if size > 64) == (2 * 2 * 12 * 8 if secret else 0)
    drawn.clear()
    trainer = setup.make_trainer([setup.private_training(1)])
    trainer.fit(setup.module, datamodule=setup.data(1))
    weights = sum(parameter.numel() for parameter in setup.module.parameters() if parameter.requires_grad)
    assert sum(drawn) >= 2 * weights * 8 or not secret
    assert (sum(drawn) < 1e5) is not secret
    noted = tmp_path / "checkpoint" / "releases-000001"
    assert noted.exists() is secret


@pytest.mark.parametrize("at", ["server", "clients"])
def test_the_configuration_makes_cohorts_and_client_level_noise_secret(at: str, drawn: list[int]) -> None:
    made = config(
        "clients=40", "fraction=0.5", "privacy=client", "privacy.secure_noise=true", f"privacy.noise_at={at}"
    )
    participation, mechanism = make_participation(made), make_mechanism(made, made.privacy.noise)
    assert mechanism is not None
    participation.draw(FULL, 1)
    assert drawn == [8 * 40]
    theta = {"w": torch.zeros(1000)}
    mechanism.share(theta, {}, theta, 1, 0)
    assert drawn == [8 * 40, 8 * 1000]


def test_client_level_privacy_draws_poisson_cohorts() -> None:
    """As its account assumes: sizes vary as a binomial, 0 among them."""
    made = make_participation(config("clients=10", "fraction=0.2", "privacy=client"))
    sizes = np.array([len(made.draw(FULL, round_)[0]) for round_ in range(1, 1001)])
    assert sizes.var() == pytest.approx(10 * 0.2 * 0.8, rel=0.2)
    assert sizes.min() == 0
    plain = make_participation(config("clients=10", "fraction=0.2", "privacy=example"))
    assert {len(plain.draw(FULL, round_)[0]) for round_ in range(1, 101)} == {2}


def test_every_local_epoch_counts_in_the_account_of_example_level_privacy(tmp_path: Path) -> None:
    """100 and 20 images in batches of 30: 4 steps and 1 an epoch, 3 epochs, 2 rounds."""
    made = config("clients=2", "rounds=2", "epochs=3", "privacy=example", "data.batch_size=30", "fraction=1")
    shares = [np.arange(100), np.arange(20)]
    account = PrivacyAccount(made, made.privacy.noise, shares, toy_setup().method, tmp_path)
    noise, delta = made.privacy.noise, made.privacy.delta
    assert account.epsilons(2) == pytest.approx(
        [Account(noise, 0.3, delta).epsilon(2 * 3 * 4), Account(noise, 1.0, delta).epsilon(2 * 3 * 1)]
    )
    (tmp_path / "releases-000001").write_bytes(b"...")
    assert account.epsilons(2)[1] == pytest.approx(Account(noise, 1.0, delta).epsilon(3 * 3 * 1))
    assert account.epsilons(0) == [0.0, pytest.approx(Account(noise, 1.0, delta).epsilon(3 * 3 * 1))]
