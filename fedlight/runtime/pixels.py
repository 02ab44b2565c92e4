"""Scaling of images between bytes and the floats that networks take."""

from torch import Tensor


def to_floats(pixels: Tensor) -> Tensor:
    """Scales uint8 in 0..255 to float32 in [-1, 1], on the same device."""
    return pixels.float().div_(127.5).sub_(1)


def to_bytes(images: Tensor) -> Tensor:
    """Scales floats to uint8: -1 becomes 0 and 1 becomes 255, rounded; values outside [-1, 1] are clipped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().byte()
