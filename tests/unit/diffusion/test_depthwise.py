"""The fast depthwise convolution and its gradients equal those of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlight.diffusion import depthwise
from fedlight.diffusion.depthwise import DepthwiseConv


def gradients(conv: DepthwiseConv, x: Tensor, by: Tensor) -> list[Tensor]:
    conv.zero_grad()
    x = x.clone().requires_grad_()
    out = conv(x)
    out.backward(by.to(out.dtype))
    assert x.grad is not None
    assert conv.weight.grad is not None
    assert conv.bias is not None
    assert conv.bias.grad is not None
    return [out.detach(), x.grad, conv.weight.grad, conv.bias.grad]


def makes_detour(conv: DepthwiseConv, x: Tensor) -> bool:
    """Whether the output is not that of PyTorch's own convolution, and so its gradient neither."""
    return "Convolution" not in type(conv(x).grad_fn).__name__


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of two tensors, as a share of the size of the second."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(depthwise, "LARGE", 2**60)
    return monkeypatch


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("width", [3, 16, 28])
def test_output_and_gradients_are_those_of_the_plain_convolution(
    size: int, width: int, plain: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(width, size)
    x, by = torch.randn(2, 4, width, 12, 10).unbind()
    assert not makes_detour(conv, x)
    expected = gradients(conv, x, by)
    plain.setattr(depthwise, "LARGE", 0)
    assert makes_detour(conv, x)
    for actual, wanted in zip(gradients(conv, x, by), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


def test_the_weight_gradient_is_the_sum_over_images_and_pixels(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(depthwise, "LARGE", 0)
    torch.manual_seed(0)
    conv = DepthwiseConv(2, 3).double()
    x, by = torch.randn(2, 3, 2, 5, 5, dtype=torch.float64).unbind()
    *_, weight, bias = gradients(conv, x, by)
    padded = F.pad(x, (1, 1, 1, 1))
    for row in range(3):
        for column in range(3):
            shifted = padded[..., row : row + 5, column : column + 5]
            torch.testing.assert_close(weight[:, 0, row, column], (shifted * by).sum((0, 2, 3)))
    torch.testing.assert_close(bias, by.sum((0, 2, 3)))


def test_under_autocast_it_computes_in_bfloat16_and_keeps_float32_gradients(
    plain: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(16, 7)
    x, by = torch.randn(2, 8, 16, 14, 14).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(conv, x, by)
        plain.setattr(depthwise, "LARGE", 0)
        actual = gradients(conv, x, by)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16, *[torch.float32] * 3]
    exact = gradients(conv, x, by)  # in float32
    for ours, theirs, precise in zip(actual, expected, exact, strict=True):
        assert distance(ours, theirs) < 0.01
        assert 1e-5 < distance(ours, precise) < 0.01  # bfloat16 keeps eight bits


def test_slices_of_columns_are_used_for_large_inputs_only() -> None:
    conv = DepthwiseConv(16, 7)
    small, large = torch.zeros(127, 16, 4, 4), torch.zeros(128, 16, 4, 4)  # 2^15 elements
    assert makes_detour(conv, large)
    assert not makes_detour(conv, small)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own(
    frozen: str, plain: pytest.MonkeyPatch
) -> None:
    plain.setattr(depthwise, "LARGE", 0)
    torch.manual_seed(0)
    conv = DepthwiseConv(4, 7)
    x, by = torch.randn(2, 2, 4, 9, 9).unbind()
    tensors = {"x": x.requires_grad_(), "weight": conv.weight, "bias": conv.bias}
    whole = torch.autograd.grad(conv(x), list(tensors.values()), by)
    expected = dict(zip(tensors, whole, strict=True))
    tensors[frozen].requires_grad_(False)
    conv(x).backward(by)
    for name, tensor in tensors.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[name])
