"""A depthwise convolution has the same values and gradients in every form."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, vmap

from fedlight.diffusion.depthwise import DepthwiseConv, use_stacked_layers


@pytest.mark.parametrize(("size", "height", "width"), [(7, 4, 4), (7, 4, 3), (7, 8, 8), (3, 2, 2), (3, 5, 4)])
def test_the_stacked_form_is_the_convolution_of_each_client(size: int, height: int, width: int) -> None:
    layer = DepthwiseConv(5, size).double()
    use_stacked_layers(layer)
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, bias = drawn(3, 2, 5, height, width), drawn(3, 5, 1, size, size), drawn(3, 5)
    parameters = {"weight": weight, "bias": bias}
    y = vmap(lambda p, x: functional_call(layer, p, (x,)))(parameters, x)
    expected = torch.stack(
        [F.conv2d(*client, padding=size // 2, groups=5) for client in zip(x, weight, bias, strict=True)]
    )
    grad = drawn(*y.shape)
    torch.testing.assert_close(y, expected)
    gradients, wanted = (torch.autograd.grad(out, (x, weight, bias), grad) for out in (y, expected))
    torch.testing.assert_close(gradients, wanted)
