"""The optimizer's state between local updates."""

import pytest
import torch
from torch import Tensor, nn

from fedlight.federation.federator import optimizer_state, restore_optimizer
from fedlight.federation.messages import pack, unpack


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: Tensor) -> None:
    weight.grad = gradient.to(memory_format=torch.channels_last)
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fused", [True, False])
def test_a_restored_optimizer_takes_the_steps_of_one_that_went_on(
    kind: type[torch.optim.Optimizer], fused: bool
) -> None:
    """The weights of a convolution are channels-last in memory, and a stored state is contiguous."""
    torch.manual_seed(0)
    values, gradients = torch.randn(8, 4, 3, 3), torch.randn(6, 8, 4, 3, 3)
    settings = {"lr": 0.01, "fused": fused} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    ends = []
    for restores in (False, True):
        weight = nn.Parameter(values.to(memory_format=torch.channels_last, copy=True))
        optimizer = kind([weight], **settings)
        for number, gradient in enumerate(gradients):
            if restores and number == 3:
                stored = unpack(pack({}, {"optimizer": optimizer_state(optimizer)}))[1]["optimizer"]
                optimizer = kind([weight], **settings)
                restore_optimizer(optimizer, stored)
            step(optimizer, weight, gradient)
        ends.append(weight.detach())
    assert torch.equal(*ends)
