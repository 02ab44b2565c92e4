"""A depthwise convolution with a fast weight gradient on CPUs."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLUMNS = 3  # widest kernel whose weight gradient oneDNN vectorises
LARGE = 2**15  # smallest number of input elements for which slices are faster


class DepthwiseConv(nn.Conv2d):
    """A convolution with one square kernel of odd size per channel, padded to keep the image size.

    oneDNN's weight gradient is fast for depthwise kernels of at most three columns; for wider ones it uses
    the routine of dense convolutions, which is ten times slower. On a CPU the weight gradient of large
    inputs is therefore concatenated from slices of three columns: the same sums in another order.

    Args:
        width: number of input and of output channels.
        size: height and width of the kernel, in pixels.

    Attributes:
        plain: compute the weight gradient as torch does, which gradients by `torch.func` require.
        stacked: serve several clients at once under `torch.func.vmap`: on a CPU as a product of matrices
            where the kernel covers the image, and otherwise by slices.
    """

    plain = False
    stacked = False

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, width, size, padding=size // 2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        if self.plain or x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        assert self.bias is not None
        if self.stacked and max(x.shape[-2:]) <= self.weight.shape[-1] // 2 + 1:
            return _multiply(x, self.weight, self.bias)
        if not self.stacked and x.numel() < LARGE:
            return super().forward(x)
        return _convolve(x, self.weight, self.bias)


def convolve_stacked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The depthwise convolution with the channels of several clients side by side.

    Args:
        x: images, shape (n, clients * channels, height, width).
        weight, bias: of all channels, shapes (clients * channels, 1, size, size) and (clients * channels,).
    """
    if x.device.type != "cpu":
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    if max(x.shape[-2:]) <= weight.shape[-1] // 2 + 1:
        return _multiply(x, weight, bias)
    return _convolve(x, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    output: Tensor = _Depthwise.apply(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return output


def use_plain_layers(module: nn.Module) -> None:
    """Switches a model's depthwise convolutions to the form that `torch.func` can differentiate."""
    for layer in module.modules():
        if isinstance(layer, DepthwiseConv):
            layer.plain = True


def use_stacked_layers(module: nn.Module, stacked: bool = True) -> None:
    """Switches a model's depthwise convolutions to the form that serves several clients at once, or back."""
    for layer in module.modules():
        if isinstance(layer, DepthwiseConv):
            layer.stacked = stacked


def _multiply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of images that the kernel covers, as one product of matrices per channel.

    With 4x4 images and a 7x7 kernel it takes a third of the multiplications, and torch's batched product is
    several times as fast as its depthwise convolution.
    """
    height, width = x.shape[-2:]
    matrices = weight.flatten(1).index_select(1, _kernel_positions(height, width, weight.shape[-1]))
    matrices = matrices.unflatten(1, (height * width, -1))  # (channels, input pixels, output pixels)
    products = torch.bmm(x.flatten(2).transpose(0, 1), matrices).transpose(0, 1)
    return (products + bias[:, None]).unflatten(2, (height, width))


@cache
def _kernel_positions(height: int, width: int, size: int) -> Tensor:
    """The kernel's element between each pixel of the input and of the output, flattened, int64."""
    rows, columns = (torch.arange(side)[:, None] - torch.arange(side) + size // 2 for side in (height, width))
    return (rows[:, None, :, None] * size + columns[None, :, None, :]).flatten()


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        """One convolution with the channels of all clients."""
        x, weight, bias = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(inputs, in_dims, strict=True)
        )
        channels = (weight.flatten(0, 1), bias.flatten(0, 1))
        together = _Depthwise.apply(x.transpose(0, 1).flatten(1, 2), *channels)
        return together.unflatten(1, (info.batch_size, -1)), 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        by_input, by_weight, by_bias = ctx.needs_input_grad
        margin = weight.shape[-1] // 2
        return (
            _gradients(grad, x, weight, margin, input_=True) if by_input else None,
            _weight_gradient(grad, x, weight, margin) if by_weight else None,
            grad.sum((0, 2, 3)) if by_bias else None,
        )


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, margin: int) -> Tensor:
    padded = F.pad(x, (margin,) * 4)
    slices, first = [], 0
    for columns in weight.split(COLUMNS, dim=-1):
        needed = padded.narrow(-1, first, x.shape[-1] + columns.shape[-1] - 1)
        needed = needed.contiguous(memory_format=torch.channels_last)
        slices.append(_gradients(grad, needed, columns, 0, input_=False))
        first += columns.shape[-1]
    return torch.cat(slices, dim=-1)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, margin: int, *, input_: bool) -> Tensor:
    """The gradient with respect to the input or to the weight."""
    mask = [input_, not input_, False]
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [margin, margin], [1, 1], False, [0, 0], len(weight), mask
    )
    return gradients[0 if input_ else 1]
