"""The UNet of several clients has the predictions and gradients of each client's UNet."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlight.diffusion.depthwise import use_stacked_layers
from fedlight.diffusion.stacked_unet import can_stack, predict
from fedlight.diffusion.unet import ConvNextUNet

CLIENTS, IMAGES = 3, 2


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (8, {"dim_mults": (1, 2), "blocks": 1, "heads": 1, "head_width": 16}),
        (16, {"dim_mults": (1, 2, 3), "blocks": 2, "heads": 2, "head_width": 3, "num_class_embeds": 4}),
    ],
    ids=["tiny", "labels"],
)
def test_stacked_unets_predict_as_each_alone(size: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    unets = [ConvNextUNet(size, 2, 6, **options).double() for _ in range(CLIENTS)]
    stacked: Any = ConvNextUNet(size, 2, 6, **options).double()
    for layer, *layers in zip(stacked.modules(), *(unet.modules() for unet in unets), strict=True):
        for name in layer._parameters:
            if layer._parameters[name] is not None:
                several = torch.stack([one._parameters[name] for one in layers])
                layer._parameters[name] = torch.nn.Parameter(several.detach())
    x = torch.randn(CLIENTS, IMAGES, 2, size, size, dtype=torch.float64)
    t = torch.randint(1000, (CLIENTS, IMAGES))
    labels = torch.randint(4, (CLIENTS, IMAGES)) if "num_class_embeds" in options else None
    predicted = predict(stacked, x, t, labels)
    grad = torch.randn_like(predicted)
    predicted.backward(grad)

    def gradients(unet: Any) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in unet.named_parameters()}

    for place, unet in enumerate(unets):
        alone = unet(x[place], t[place], None if labels is None else labels[place]).sample
        torch.testing.assert_close(predicted[place], alone, atol=1e-9, rtol=1e-9)
        alone.backward(grad[place])
        own = {name: tensor[place] for name, tensor in gradients(stacked).items()}
        torch.testing.assert_close(own, gradients(unet), atol=1e-9, rtol=1e-9)


def test_only_the_convnext_unet_with_its_own_layers_is_stacked() -> None:
    unet = ConvNextUNet(8, 1, 6, dim_mults=(1, 2))
    use_stacked_layers(unet)
    assert can_stack(unet)
    unet.head.out = torch.nn.Sequential(unet.head.out, torch.nn.Dropout(0.1))
    assert not can_stack(unet)
    assert not can_stack(torch.nn.Conv2d(1, 1, 1))
