"""Recipes that get more out of the same steps: velocity, min-SNR weights, the learning rate over rounds."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cell
from denoisers import SAMPLERS, AffineDenoiser, Oracle, cosine_alpha_bar, drawn, make_model
from diffusers import DDPMPipeline, DDPMScheduler
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from toy import federate, inline, toy_server, toy_setup, toy_site

from fedlight.diffusion.sampling import sample
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.learning_rate import rate
from fedlight.federation.messages import State

MakeCell = Callable[..., Cell]


def schedule_of(prediction: str) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction
    )


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_papers(prediction: str, gamma: float | None) -> None:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0; weights of x_0's loss are min(SNR, gamma)."""
    alpha_bar = cosine_alpha_bar()
    model = make_model(AffineDenoiser(), schedule=schedule_of(prediction), loss="mse", snr_gamma=gamma)
    batch = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1

    torch.manual_seed(7)
    actual = model.training_step(batch, 0)

    t, signal, eps, x_0, x_t = drawn(batch, alpha_bar, seed=7)
    predicted = 0.7 * x_t + 1e-3 * t
    velocity = np.sqrt(signal) * eps - np.sqrt(1 - signal) * x_0
    error = (predicted - (velocity if prediction == "v_prediction" else eps)) ** 2
    if gamma is not None:
        snr = signal / (1 - signal)
        of_x_0 = 1 / snr if prediction == "epsilon" else 1 / (snr + 1)  # |x_0 error|^2 = this * |error|^2
        assert 0.1 < (snr > gamma).mean() < 0.9  # both sides of the bound are in use
        error = np.minimum(snr, gamma) * of_x_0 * error
    assert actual.item() == pytest.approx(error.mean(), rel=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_velocity_leads_to_the_image(sampler: str) -> None:
    class Velocity(Oracle):
        def forward(self, x_t: Tensor, t: Tensor) -> object:
            found, alpha_bar = super().forward(x_t, t), self.alpha_bar[t]
            found.sample = (alpha_bar.sqrt() * found.sample - (1 - alpha_bar).sqrt() * self.x_0).to(x_t.dtype)
            return found

    schedule = schedule_of("v_prediction")
    levels = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(3))
    unet = Velocity(levels / 127.5 - 1, torch.from_numpy(cosine_alpha_bar()))
    images = sample(unet, schedule, (4, 1, 8, 8), sampler=sampler, steps=10, seed=0)
    assert (images.int() - levels).abs().max() <= 1


@pytest.mark.parametrize(
    ("warmup", "cosine", "expected"),
    [
        (0, False, [1, 1, 1, 1]),
        (3, False, [1 / 4, 1 / 2, 3 / 4, 1]),
        (0, True, [1, (1 + math.sqrt(1 / 2)) / 2, 1 / 2, (1 - math.sqrt(1 / 2)) / 2]),
        (1, True, [1 / 2, 1, 3 / 4, 1 / 4]),
        (9, True, [1 / 10, 2 / 10, 3 / 10, 4 / 10]),
    ],
)
def test_the_learning_rate_rises_in_equal_steps_and_falls_by_half_a_cosine(
    warmup: int, cosine: bool, expected: list[float]
) -> None:
    rates = [rate(round_, 4, warmup, cosine=cosine) for round_ in range(1, 5)]
    assert rates == pytest.approx(expected)


def _rate(trainer: Trainer) -> float:
    return trainer.optimizers[0].param_groups[0]["lr"]


def test_a_client_trains_at_the_rate_of_its_round(tmp_path: Path) -> None:
    class Watched(FedAvg):
        def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
            return [LambdaCallback(on_train_batch_end=lambda trainer, *_: seen.append(_rate(trainer)))]

    seen: list[float] = []
    setup = replace(toy_setup(algorithm=Watched(), epochs=1), rate=lambda round_: 1 / round_)
    for _ in federate(toy_server(setup, clients=1), inline(toy_site(setup, tmp_path)), 3):
        pass
    assert seen == pytest.approx([seen[0], seen[0] / 2, seen[0] / 3])


@pytest.mark.slow
def test_what_is_not_chosen_is_in_no_id_and_what_is_makes_another_cell(cell: MakeCell) -> None:
    plain = cell("rounds=0")
    off = ["optimizer.warmup=0", "optimizer.decay=null", "model.snr_gamma=null"]
    assert cell("rounds=0", *off).folder.name == plain.folder.name
    assert not {"warmup", "decay", "snr_gamma"} & set((plain.folder / "config.yaml").read_text().split(":"))
    others = [["optimizer.warmup=1"], ["optimizer.decay=cosine"], ["model.snr_gamma=5"]]
    assert len({plain.folder.name, *(cell("rounds=0", *other).folder.name for other in others)}) == 4


def test_a_model_of_velocities_is_read_as_such_by_diffusers(cell: MakeCell) -> None:
    made = cell("+model.schedule.prediction_type=v_prediction", "rounds=1", "clients=1")
    pipeline = DDPMPipeline.from_pretrained(made.folder / "model")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.slow
def test_the_warm_up_slows_the_first_round_and_the_decay_the_last(cell: MakeCell) -> None:
    asked = ["clients=2", "data.limit=60"]
    plain, warm, cosine = (
        cell(*asked, *more) for more in ([], ["optimizer.warmup=1"], ["optimizer.decay=cosine"])
    )
    rows = [made.rows("rounds.csv") for made in (plain, warm, cosine)]
    assert rows[0][0]["train_loss"] == rows[2][0]["train_loss"]  # the cosine begins at the full rate
    assert rows[0][0]["train_loss"] != rows[1][0]["train_loss"]
    assert rows[0][1]["train_loss"] != rows[2][1]["train_loss"]
