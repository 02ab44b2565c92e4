"""A LightningModule that stays on its device from fit to fit, and that may have frozen tensors."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import nn
from typing_extensions import Self


class ResidentModule(LightningModule):
    """Stays on its device from fit to fit; PyTorch would visit every tensor to find it there.

    Attributes:
        frozen: names of parameters and buffers that are not trained; they are in no state_dict of the module,
            and none that is loaded needs them.
    """

    frozen: frozenset[str] = frozenset()

    def leave_out(self, names: Iterable[str]) -> None:
        """Makes these the frozen tensors; called once."""
        self.frozen = frozenset(names)
        if self.frozen:
            self.register_state_dict_post_hook(_leave_out_frozen)
            self.register_load_state_dict_post_hook(_expect_no_frozen)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the module as PyTorch does; moving it to its own device costs nothing."""
        return self if args == (self.device,) and not kwargs else super().to(*args, **kwargs)

    def cpu(self) -> Self:
        """Moves the module to the CPU, at no cost if it is there."""
        return self.to(torch.device("cpu"))


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of `state_dict`."""
    for name in cast(ResidentModule, module).frozen:
        state.pop(f"{prefix}{name}", None)


def _expect_no_frozen(module: nn.Module, keys: Any) -> None:
    """A hook of `load_state_dict`."""
    frozen = cast(ResidentModule, module).frozen
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]
