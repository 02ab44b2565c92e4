"""The frozen weights of a pretrained UNet in bf16 while its adapters are trained in mixed precision."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fedlight.runtime.resident_module import ResidentModule


class FrozenInBf16(Callback):
    """Holds frozen linear layers and convolutions in bf16 during a fit; what is trained has the same bits.

    Under autocast to bf16 these layers compute from a copy of each weight in bf16, which lives until the end
    of the backward pass: with fp32 weights a step needs 6 bytes a frozen parameter, with bf16 weights 2. The
    fp32 weights wait in the memory of the CPU and return after the fit, since images are drawn in fp32.
    Everything else stays in fp32: normalisation and embeddings, which autocast leaves alone, adapters, and
    the first layer of the UNet, in whose dtype diffusers embeds labels.
    """

    def __init__(self) -> None:
        self._full: dict[nn.Parameter, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end()

    def begin(self, module: Any) -> None:
        """Rounds the frozen weights of a client model."""
        for parameter in _parameters(module):
            if parameter not in self._full:
                self._full[parameter] = parameter.data.cpu()
            parameter.data = parameter.data.to(torch.bfloat16)

    def end(self) -> None:
        """Restores them, on the device where they are."""
        for parameter, full in self._full.items():
            parameter.data = full.to(parameter.device)


def is_exact(unet: nn.Module, frozen: bool, precision: str) -> bool:
    """Whether bf16 weights change no bit of training: diffusers' UNets call their layers under autocast.

    Fused clients and gradients of single images, by `torch.func.vmap`, are not tested.

    Args:
        unet: of the client model; fedlight's own computes with weights of its attention in fp32.
        frozen: whether it has frozen weights.
        precision: of the Trainer; in fp32 a rounded weight is another weight.
    """
    return frozen and precision == "bf16-mixed" and isinstance(unet, UNet2DModel | UNet2DConditionModel)


def _parameters(module: ResidentModule) -> Iterator[nn.Parameter]:
    unet = module.get_submodule("unet")
    first = next(iter(unet.named_parameters()))[0].rpartition(".")[0]
    for name, layer in unet.named_modules(prefix="unet"):
        called = isinstance(layer, nn.Linear | nn.Conv2d) and name != f"unet.{first}"
        for own, parameter in layer.named_parameters(recurse=False) if called else ():
            if f"{name}.{own}" in module.frozen and ".lora_" not in name:
                yield parameter
