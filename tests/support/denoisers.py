"""Denoisers whose predictions are known, and the noise schedules written out."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Adam

from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.unet import ConvNextUNet

SLICES = {"encoder": ["init_conv", "time_mlp", "downs"], "bottleneck": ["mid"], "decoder": ["ups", "head"]}


class AffineDenoiser(nn.Module):
    """Predicts a * x_t + b * t: simple enough to redo by hand."""

    def __init__(self, a: float = 0.7, b: float = 1e-3) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.a * x_t + self.b * t[:, None, None, None])


def make_model(unet: nn.Module | None = None, **options: Any) -> DDPM:
    if unet is None:
        unet = ConvNextUNet(sample_size=8, dim=8, dim_mults=(1, 2), heads=2, head_width=8)
    arguments: dict[str, Any] = {
        "schedule": DDPMScheduler(num_train_timesteps=1000),
        "loss": "huber",
        "optimizer": partial(Adam, lr=1e-4),
        "slices": SLICES,
        **options,
    }
    return DDPM(unet=unet, **arguments)


def cosine_alpha_bar(steps: int = 1000, s: float = 0.008) -> NDArray[np.float64]:
    """f(t) / f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), beta at most 0.999 (arXiv 2102.09672, eq. 17)."""
    f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * np.pi / 2) ** 2
    alpha_bar = f[1:] / f[0]
    alpha_bar[-1] = alpha_bar[-2] * (1 - 0.999)  # the only beta that the bound cuts: f(T) = 0
    return alpha_bar


def drawn(batch: torch.Tensor, alpha_bar: NDArray[np.float64], seed: int) -> list[NDArray[np.float64]]:
    """What a training step draws after this seed: t, alpha_bar_t, eps; and x_0 and x_t; float64."""
    torch.manual_seed(seed)
    t = torch.randint(0, 1000, (len(batch),)).numpy()
    eps = torch.randn(batch.shape).numpy().astype(np.float64)
    x_0, signal = batch.numpy().astype(np.float64), alpha_bar[t][:, None, None, None]
    return [t[:, None, None, None], signal, eps, x_0, np.sqrt(signal) * x_0 + np.sqrt(1 - signal) * eps]


SAMPLERS = ["ddpm", "ddim", "dpm-solver++", "sde-dpm-solver++"]


class Oracle(nn.Module):
    """Knows the only image of the data set, and so the exact noise in every x_t."""

    def __init__(self, x_0: Tensor, alpha_bar: Tensor) -> None:
        super().__init__()
        self.x_0 = nn.Parameter(x_0.double())
        self.alpha_bar = alpha_bar.double()
        self.steps: list[int] = []
        self.modes: list[bool] = []

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        if not 0 <= t < len(self.alpha_bar):
            raise AssertionError(f"the schedule has no time step {int(t)}")
        self.steps.append(int(t))
        self.modes.append(self.training)
        alpha_bar = self.alpha_bar[t]
        eps = (x_t - alpha_bar.sqrt() * self.x_0) / (1 - alpha_bar).sqrt()
        return SimpleNamespace(sample=eps.to(x_t.dtype))
