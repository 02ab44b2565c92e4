"""A LightningModule that is moved to its own device, as each fit does, at no cost."""

from typing import Any

import torch
from lightning import LightningModule
from typing_extensions import Self


class ResidentModule(LightningModule):
    """Stays on its device from fit to fit; PyTorch would visit every tensor to find it there."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the module as PyTorch does; moving it to its own device costs nothing."""
        return self if args == (self.device,) and not kwargs else super().to(*args, **kwargs)

    def cpu(self) -> Self:
        """Moves the module to the CPU, at no cost if it is there."""
        return self.to(torch.device("cpu"))
