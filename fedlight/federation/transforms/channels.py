"""Output channels of a tensor, each of which has a scale of its own."""

from torch import Tensor


def by_channel(tensor: Tensor) -> Tensor:
    """A tensor as a matrix, a row an output channel (its first dimension); a vector or scalar is one row."""
    if tensor.numel() == 0:
        return tensor.reshape(0, 0)
    return tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
