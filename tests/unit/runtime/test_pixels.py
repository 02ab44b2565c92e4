"""Bytes and floats of images correspond one to one."""

import torch

from fedlight.runtime.pixels import to_bytes, to_floats


def test_every_byte_is_a_float_in_minus_1_to_1_and_comes_back() -> None:
    pixels = torch.arange(256).byte().view(4, 1, 8, 8)
    images = to_floats(pixels)
    expected = torch.linspace(-1, 1, 256, dtype=torch.float64).view(4, 1, 8, 8)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-7)
    assert torch.equal(to_bytes(images), pixels)


def test_floats_are_rounded_to_the_nearest_byte_and_clipped() -> None:
    images = torch.tensor([-3, -1.001, -0.9999, 0.6, 1.001, 3])
    assert to_bytes(images).tolist() == [0, 0, 0, 204, 255, 255]
