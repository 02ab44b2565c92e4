"""Vectors of integers modulo 2^m as bytes; m is a multiple of 8, so that all bytes are such a vector."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlight.runtime.errors import Damaged


def pack_integers(values: NDArray[np.uint64], bits: int) -> Tensor:
    """The bytes of integers modulo 2^bits, little-endian, bits / 8 each; uint8, shape (n * bits / 8,)."""
    little = values.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
    return torch.from_numpy(little[:, : bits // 8].flatten())


def unpack_integers(packed: Tensor, bits: int, count: int) -> NDArray[np.uint64]:
    """The inverse of `pack_integers`, from untrusted bytes.

    Args:
        packed: as it arrived.
        bits: of the modulus.
        count: number of integers that are expected.

    Raises:
        Damaged: these are not the bytes of so many integers.
    """
    size = count * bits // 8
    if packed.dtype is not torch.uint8 or packed.shape != (size,):
        raise Damaged(
            f"has integers of {packed.dtype} and shape {tuple(packed.shape)} instead of {size} bytes in uint8"
        )
    padded = np.zeros((count, 8), np.uint8)
    padded[:, : bits // 8] = packed.numpy().reshape(count, bits // 8)
    return padded.view("<u8").reshape(count).astype(np.uint64, copy=False)


def split_by(counts: Mapping[str, int], values: NDArray[np.uint64]) -> dict[str, NDArray[np.uint64]]:
    """Consecutive parts of a vector, of so many integers each, by name."""
    ends = np.cumsum([*counts.values()])[:-1]
    return dict(zip(counts, np.split(values, ends), strict=True))


def to_signed(values: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """The numbers in [-2^(bits-1), 2^(bits-1)) that are congruent to the values modulo 2^bits."""
    shift = np.uint64(64 - bits)
    return (values << shift).view(np.int64) >> np.int64(64 - bits)
