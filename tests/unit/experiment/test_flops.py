"""Floating-point operations: counted by hooks on the layers, and the images of an update by its Trainer."""

from typing import Any

import pytest
import torch
from composed import config
from torch import nn

from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.model import make_model
from fedlight.experiment.flops import denoised_images, image_flops, trained_images


def model(settings: Any) -> DDPM:
    return make_model(settings.model, settings.optimizer, 10, 0, True)


def layer_flops(settings: Any) -> float:
    """Multiplications and additions of the convolutions and linear layers in one call of the UNet."""
    module = model(settings)
    total = 0

    def count(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        weight: Any = layer.weight
        outputs = output.numel() // (1 if isinstance(layer, nn.Conv2d) else output.shape[-1])
        total += 2 * outputs * (weight[0].numel() if isinstance(layer, nn.Conv2d) else weight.numel())

    for layer in module.unet.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    labels = {"class_labels": torch.zeros(1, dtype=torch.int64)} if settings.model.conditional else {}
    with torch.no_grad():
        module.unet.eval()(torch.zeros(1, *settings.data.shape), torch.zeros(1), **labels)
    return total


@pytest.mark.parametrize("options", [[], ["model.conditional=true"], ["model=unet2d", "data.image_size=8"]])
def test_a_call_of_the_unet_costs_what_its_layers_cost_and_a_step_about_three_calls(
    options: list[str],
) -> None:
    settings = config(*options)
    measured, layers = image_flops(model(settings), settings.data.shape), layer_flops(settings)
    assert layers <= measured.denoising <= 1.3 * layers  # attention multiplies without a layer
    assert 2.7 * measured.denoising <= measured.training <= 3.05 * measured.denoising


def test_counting_draws_no_random_number_of_the_cell() -> None:
    module = model(config())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    image_flops(module, (1, 8, 8))
    assert torch.equal(torch.rand(3), expected)


class Choosy(nn.Module):
    """A UNet whose path depends on the values of its input."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: torch.Tensor, t: Any) -> Any:
        assert x_t.isfinite().all().item()
        return self.unet(x_t, t)


def test_a_model_whose_path_depends_on_values_is_counted_as_well() -> None:
    module = model(config())
    expected = image_flops(module, (1, 8, 8))
    module.unet = Choosy(module.unet)
    assert image_flops(module, (1, 8, 8)) == expected


def test_counting_computes_nothing_and_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module, devices = model(config()), set()
    step = DDPM.training_step

    def noted(copied: DDPM, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        devices.update(str(tensor.device) for tensor in (batch, *copied.state_dict().values()))
        return step(copied, batch, batch_idx)

    monkeypatch.setattr(DDPM, "training_step", noted)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    image_flops(module, (1, 8, 8))
    assert devices == {"meta"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ([], 2 * 50),
        (["+trainer.limit_train_batches=2"], 2 * 32),
        (["+trainer.limit_train_batches=0.5"], 2 * 32),
        (["+trainer.max_steps=3"], 3 * 16),
        (["+trainer.max_steps=3", "+trainer.accumulate_grad_batches=2"], 50 + 2 * 16),
        (["+trainer.max_steps=300"], 2 * 50),
    ],
)
def test_the_images_of_an_update(options: list[str], images: int) -> None:
    assert trained_images(config("epochs=2", "data.batch_size=16", *options), 50) == images


def test_a_client_without_images_trains_on_none() -> None:
    assert trained_images(config("+trainer.limit_train_batches=0.5"), 0) == 0


def test_the_images_of_an_evaluation() -> None:
    scored = ["evaluation.samples=100", "evaluation.steps=5", "evaluation.grid=4"]
    assert denoised_images(config(*scored), 3) == 3 * 100 * 5
    guided = config(*scored, "model.conditional=true", "evaluation.guidance=2")
    assert denoised_images(guided, 3) == 2 * 3 * 100 * 5
