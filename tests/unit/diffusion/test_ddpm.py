"""The training objective, its noise schedules and its moving average, against the equations."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import AffineDenoiser, cosine_alpha_bar, drawn, make_model
from diffusers import DDPMScheduler
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import SGD, Adam

from fedlight.diffusion.ddpm import DDPM
from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import BadInput

MODELS = Path(__file__).parents[3] / "configs" / "model"


def linear_alpha_bar(steps: int = 1000) -> NDArray[np.float64]:
    """beta from 1e-4 to 0.02 in equal steps (DDPM, arXiv 2006.11239, section 4)."""
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(steps) / (steps - 1)
    return np.cumprod(1 - beta)


@pytest.mark.parametrize(
    ("name", "alpha_bar"),
    [("paper", linear_alpha_bar()), ("tiny", cosine_alpha_bar()), ("unet2d", cosine_alpha_bar())],
)
def test_the_noise_schedules_follow_their_equations(name: str, alpha_bar: NDArray[np.float64]) -> None:
    schedule = instantiate(OmegaConf.load(MODELS / f"{name}.yaml").schedule)
    assert schedule.config.num_train_timesteps == len(alpha_bar) == 1000
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), alpha_bar, rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_training_loss_is_that_of_the_equation(loss: str, beta_schedule: str) -> None:
    alpha_bar = {"linear": linear_alpha_bar, "squaredcos_cap_v2": cosine_alpha_bar}[beta_schedule]()
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule=beta_schedule)
    model = make_model(AffineDenoiser(a=0.7, b=1e-3), schedule=schedule, loss=loss)
    batch = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1

    torch.manual_seed(7)
    actual = model.training_step(batch, 0)

    t, _, eps, _, x_t = drawn(batch, alpha_bar, seed=7)
    error = eps - (0.7 * x_t + 1e-3 * t)
    each = error**2
    if loss == "huber":
        each = np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5)
        assert 0.1 < (np.abs(error) < 1).mean() < 0.9  # both pieces of the function are in use
    assert actual.shape == ()
    assert actual.item() == pytest.approx(each.mean(), rel=1e-5)


def test_every_time_step_is_drawn_and_none_beyond_the_schedule() -> None:
    drawn = []

    class Recorder(AffineDenoiser):
        def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
            drawn.extend(t.tolist())
            return super().forward(x_t, t)

    torch.manual_seed(0)
    schedule = DDPMScheduler(num_train_timesteps=5)
    make_model(Recorder(), schedule=schedule).training_step(torch.zeros(200, 1, 1, 1), 0)
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert len(drawn) == 200  # one an image


def test_the_loss_trains_every_parameter_of_the_unet() -> None:
    torch.manual_seed(0)
    model = make_model()
    model.training_step(torch.rand(4, 1, 8, 8) * 2 - 1, 0).backward()
    untrained = [n for n, p in model.unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert untrained == []


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model\.loss must be one of huber, mse, got l1"):
        make_model(loss="l1")


@pytest.mark.parametrize("options", [{"prediction_type": "sample"}, {"num_train_timesteps": 0}])
def test_a_schedule_without_noise_to_predict_or_without_a_step_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"prediction_type epsilon or v_prediction and at least one time step, got"
    ):
        make_model(schedule=DDPMScheduler(**options))


def test_a_schedule_of_one_step_trains_on_that_step() -> None:
    schedule = DDPMScheduler(num_train_timesteps=1)  # alpha_bar = 1 - 1e-4
    model = make_model(AffineDenoiser(a=0.0, b=0.0), schedule=schedule, loss="mse")
    torch.manual_seed(0)
    loss = model.training_step(torch.zeros(100, 1, 10, 10), 0)
    assert loss.item() == pytest.approx(1, abs=0.06)  # the variance of eps, which is predicted as 0


@pytest.mark.parametrize("decay", [-0.5, 0.0, 1.0, 1.5])
def test_a_decay_outside_0_and_1_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.ema_decay must lie between 0 and 1, got {decay}"):
        make_model(ema_decay=decay)


def parameters_of(unet: nn.Module) -> dict[str, NDArray[np.float64]]:
    return {name: p.detach().numpy().astype(np.float64) for name, p in unet.named_parameters()}


class Trajectory(Callback):
    """The UNet's parameters after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, NDArray[np.float64]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.steps.append(parameters_of(pl_module.unet))


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on data loaders
def test_the_average_follows_its_recursion_from_the_first_trained_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decay, trajectory = 0.8, Trajectory()
    model = make_model(optimizer=partial(SGD, lr=0.5), ema_decay=decay)
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=[trajectory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.rand(8, 1, 8, 8) * 2 - 1, batch_size=2))

    assert len(trajectory.steps) == 4
    expected = trajectory.steps[0]  # the first update copies
    for theta in trajectory.steps[1:]:
        expected = {name: decay * expected[name] + (1 - decay) * theta[name] for name in expected}
    average = parameters_of(model.ema.module)
    assert average.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(average[name], expected[name], rtol=1e-5, atol=1e-6)
    apart = max(np.abs(trajectory.steps[-1][name] - expected[name]).max() for name in expected)
    assert apart > 1e-3  # the average is not merely the last step


def test_images_come_from_the_average_once_there_is_one() -> None:
    model = make_model(ema_decay=0.9)
    assert model.denoiser is model.unet
    model.on_train_batch_end(None, torch.zeros(1), 0)
    assert model.denoiser is model.ema.module
    assert model.denoiser is not model.unet


def test_images_come_from_the_trained_unet_where_no_average_is_kept() -> None:
    model = make_model()
    model.on_train_batch_end(None, torch.zeros(1), 0)
    assert model.denoiser is model.unet
    assert all(name.startswith("unet.") for name in model.state_dict())


def slice_map(model: DDPM) -> SliceMap:
    return SliceMap.build(model.slices, model.state_dict(), model.private)


def test_the_average_stays_with_the_client_by_default() -> None:
    model = make_model(ema_decay=0.9)
    slices = slice_map(model)
    assert slices.private == ("ema.n_averaged", *(f"ema.module.{n}" for n in model.unet.state_dict()))
    assert slices.names == slice_map(make_model()).names  # exactly the slices of a model without average


def test_an_exchanged_average_travels_with_the_slices_of_its_unet() -> None:
    model = make_model(ema_decay=0.9, exchange_ema=True)
    slices, plain = slice_map(model), slice_map(make_model()).names
    assert slices.private == ()
    for slice_, names in plain.items():
        expected = {*names, *(name.replace("unet.", "ema.module.", 1) for name in names)}
        if slice_ == "encoder":
            expected.add("ema.n_averaged")
        assert set(slices.names[slice_]) == expected


def test_without_an_average_exchanging_it_changes_nothing() -> None:
    assert slice_map(make_model(exchange_ema=True)) == slice_map(make_model())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_optimizer_holds_exactly_the_parameters_of_the_unet(ema_decay: float | None) -> None:
    model = make_model(ema_decay=ema_decay)
    optimizer = model.configure_optimizers()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.unet.parameters())
    assert isinstance(optimizer, Adam)
    assert optimizer.param_groups[0]["lr"] == 1e-4


def test_each_fit_starts_from_a_new_optimizer() -> None:
    model = make_model()
    assert model.configure_optimizers() is not model.configure_optimizers()


@pytest.mark.parametrize(
    "schedule", [{"rescale_betas_zero_snr": True}, {"trained_betas": [0.1, 0.2, 1.0]}], ids=["flag", "betas"]
)
def test_epsilon_prediction_is_rejected_where_x_t_is_pure_noise(schedule: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"ends in pure noise .*prediction_type=v_prediction"):
        make_model(schedule=DDPMScheduler(**schedule))
    make_model(schedule=DDPMScheduler(**schedule, prediction_type="v_prediction"))


def test_betas_beyond_one_are_refused() -> None:
    with pytest.raises(BadInput, match="betas between 0 and 1"):
        make_model(schedule=DDPMScheduler(beta_end=2.0))


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_at_zero_snr_the_velocity_is_the_image_and_its_weight_is_that_of_the_equation(
    snr_gamma: float | None,
) -> None:
    """v = -x_0 where alpha_bar = 0; min-SNR gives such a step weight min(0, gamma) / (0 + 1) = 0."""
    schedule = DDPMScheduler(trained_betas=[1.0], num_train_timesteps=1, prediction_type="v_prediction")
    model = make_model(AffineDenoiser(a=0.0, b=0.0), schedule=schedule, loss="mse", snr_gamma=snr_gamma)
    x_0 = torch.full((8, 1, 4, 4), 0.5)
    expected = 0.25 if snr_gamma is None else 0.0
    assert model.training_step(x_0, 0).item() == pytest.approx(expected)
