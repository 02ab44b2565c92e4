"""Example-level privacy: gradients of single images, their clipping and noise, and the account."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Cell, Wire, configured
from line import Line, fit, rows
from torch import Tensor

from fedlight.data.client_data import PoissonBatches
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.depthwise import use_plain_layers
from fedlight.diffusion.unet import ConvNextUNet
from fedlight.privacy.account import Account
from fedlight.privacy.example_level import PrivateGradients, TrainingStep, per_sample_gradients

MakeCell = Callable[..., Cell]
MODELS = Path(__file__).parents[3] / "configs" / "model"


class FixedNoise(TrainingStep):
    """The loss of images at given time steps with given noise."""

    def forward(self, batch: Any) -> Tensor:
        x_0, t, eps = batch
        x_t = self.module.schedule.add_noise(x_0, eps, t)
        return self.module.loss(self.module.unet(x_t, t).sample, eps)


def wide_tiny() -> DDPM:
    """Its depthwise convolutions are large enough for the function that torch.func cannot differentiate."""
    module, _ = configured(MODELS / "tiny.yaml", 8)
    module.unet = ConvNextUNet(24, 1, dim=64, dim_mults=(1, 2), blocks=1, heads=1, head_width=8)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: configured(MODELS / "tiny.yaml", 8)[0], (1, 8, 8)),
        (lambda: configured(MODELS / "paper.yaml", 28)[0], (1, 28, 28)),
        (lambda: configured(MODELS / "unet2d.yaml", 16, 3)[0], (3, 16, 16)),
        (wide_tiny, (1, 24, 24)),
    ],
    ids=["tiny", "paper", "unet2d", "wide"],
)
def test_gradients_of_single_images_are_those_of_a_loop(make: Callable[[], DDPM], shape: tuple) -> None:
    torch.manual_seed(0)
    module = make()
    use_plain_layers(module)
    images = 2
    x_0, t = torch.randn(images, *shape), torch.randint(1000, (images,))
    batch = (x_0, t, torch.randn_like(x_0))
    parameters = dict(module.named_parameters())
    gradients, losses = per_sample_gradients(FixedNoise(module), parameters, batch)
    for image in range(images):
        module.zero_grad()
        loss = FixedNoise(module)(tuple(tensor[image : image + 1] for tensor in batch))
        loss.backward()
        assert losses[image].item() == pytest.approx(loss.item(), rel=1e-5)
        size = math.sqrt(sum(p.grad.square().sum().item() for p in parameters.values()))
        for name, parameter in parameters.items():
            assert (gradients[name][image] - parameter.grad).norm() <= 1e-5 * size, name


def test_without_clip_and_noise_it_is_the_plain_gradient() -> None:
    x, y = rows(40)
    expected = (2 * (x @ torch.zeros(3) - y)[:, None] * x).mean(dim=0)
    torch.testing.assert_close(fit(Line(), (x, y)), expected)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_loss_of_a_batch_is_a_mean_over_its_images(count: int) -> None:
    """A batch of 40 is worked on in three parts."""
    module, (x, y) = Line(), rows(count)
    callback = PrivateGradients(0.0, math.inf, 20, 1, secret=False)
    callback.on_fit_start(SimpleNamespace(optimizers=[module.configure_optimizers()]), module)  # type: ignore[arg-type]
    loss = callback.training_step((x, y), 0).item()
    assert loss == pytest.approx(y.square().mean().item() if count else 0.0, rel=1e-5)


def test_each_image_is_clipped_by_itself_and_the_batch_size_is_the_expected_one() -> None:
    x, y = rows(40)
    gradients = 2 * (x @ torch.zeros(3) - y)[:, None] * x
    assert gradients.norm(dim=1).max() > 5
    clipped = gradients * (5 / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(fit(Line(), (x, y), clip=5.0, batch_size=32), clipped.sum(dim=0) / 32)


def test_under_autocast_norms_are_clipped_in_float32() -> None:
    module, (x, y) = Line(), rows(1)
    callback = PrivateGradients(0.0, 0.01, 1, 1, secret=False)
    callback.on_fit_start(SimpleNamespace(optimizers=[module.configure_optimizers()]), module)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        callback.training_step((x, y), 0).backward()
    assert module.weight.grad is not None
    assert module.weight.grad.norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("secret", [False, True])
def test_noise_is_of_the_stated_size_and_drawn_anew_in_each_step(secret: bool) -> None:
    width, draws = 20_000, []
    nothing = torch.zeros(2, width), torch.zeros(2)
    module = Line(width)
    for _ in range(3):
        draws.append(fit(module, nothing, noise=3.0, clip=0.5, batch_size=4, secret=secret))
        module.weight.data.zero_()
    for drawn in draws:
        assert drawn.std().item() == pytest.approx(3.0 * 0.5 / 4, rel=0.03)
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.04


def test_an_empty_batch_is_a_step_with_noise_alone() -> None:
    empty = torch.zeros(0, 1000), torch.zeros(0)
    assert fit(Line(1000), empty, noise=1.0, clip=1.0, batch_size=1).std().item() == pytest.approx(1, rel=0.1)
    assert fit(Line(1000), empty, noise=0.0, clip=1.0, batch_size=1).abs().sum() == 0
    module = Line(5)
    gradients, losses = per_sample_gradients(
        TrainingStep(module), dict(module.named_parameters()), (torch.zeros(0, 5), torch.zeros(0))
    )
    assert (gradients["weight"].shape, losses.shape) == ((0, 5), (0,))


def test_several_draws_an_image_are_averaged_before_the_clip() -> None:
    x, y = rows(10)
    exact = fit(Line(), (x, y))
    few, many = (
        torch.stack([fit(Line(jitter=1.0), (x, y), draws=draws) - exact for _ in range(10)]).square().mean()
        for draws in (1, 64)
    )
    assert many < few / 10


def test_poisson_batches() -> None:
    torch.manual_seed(0)
    batches = PoissonBatches(100, 8, secret=False)
    drawn = [batch for _ in range(200) for batch in batches]
    assert len(batches) == 13
    assert len(drawn) == 2600
    sizes = torch.tensor([float(len(batch)) for batch in drawn])
    assert sizes.mean().item() == pytest.approx(8, rel=0.03)
    assert sizes.var().item() == pytest.approx(100 * 0.08 * 0.92, rel=0.15)
    counts = torch.cat(drawn).bincount(minlength=100)
    assert counts.min() > 0.08 * 2600 * 0.7
    assert len(next(iter(PoissonBatches(5, 8, secret=True)))) == 5


@pytest.mark.slow
def test_a_cell_accounts_for_every_client(cell: MakeCell, wire: Wire) -> None:
    made = cell(
        "clients=3", "partition=quantity_skew", "privacy=example", "privacy.draws=1", "data.batch_size=30"
    )
    spent = made.result["privacy"]
    for client, images in enumerate(made.sizes):
        steps = 2 * math.ceil(images / 30)
        epsilon = Account(1.0, min(1, 30 / images), 1e-5).epsilon(steps)
        assert spent["epsilon_clients"][client] == pytest.approx(epsilon)
    assert spent["epsilon"] == max(spent["epsilon_clients"])
    assert float(made.rows("rounds.csv")[-1]["epsilon"]) == spent["epsilon"]
    for update in wire.updates:
        assert (update.num_examples, update.loss) == (made.sizes[update.client], None)


@pytest.mark.slow
def test_no_client_spends_more_than_the_target(cell: MakeCell) -> None:
    arguments = ("clients=3", "fraction=0.5", "partition=quantity_skew", "privacy=example", "privacy.draws=1")
    spent = cell(*arguments, "data.batch_size=30", "privacy.target_epsilon=3").result["privacy"]
    assert 2.9 < spent["epsilon"] <= 3
    assert min(spent["epsilon_clients"]) < spent["epsilon"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["+trainer.limit_train_batches=0.5"],
        ["+trainer.max_steps=3"],
        ["+trainer.accumulate_grad_batches=2", "+trainer.max_steps=3"],
    ],
    ids=" ".join,
)
def test_every_noisy_gradient_of_a_shortened_update_counts_once(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    noisy: list[int] = []
    step = PrivateGradients.training_step

    def noted(gradients: PrivateGradients, batch: Any, batch_idx: int) -> Tensor:
        noisy.append(batch_idx)
        return step(gradients, batch, batch_idx)

    monkeypatch.setattr(PrivateGradients, "training_step", noted)
    arguments = ("clients=2", "partition=iid", "data.limit=50", "data.batch_size=5", "epochs=2", "rounds=1")
    made = cell(*arguments, "privacy=example", "privacy.draws=1", *options)
    each = len(noisy) // 2
    assert 0 < each < 2 * 5
    assert made.result["privacy"]["epsilon"] == pytest.approx(Account(1.0, 5 / 25, 1e-5).epsilon(each))
