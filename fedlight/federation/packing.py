"""Packing of small integers, and of several tensors, into bytes."""

import numpy as np
import torch
from torch import Tensor

from fedlight.federation.messages import State
from fedlight.runtime.errors import Damaged


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs integers below 2^bits into bytes, uint8, the first in the lowest bits; pads the last byte with 0.

    Args:
        codes: uint8, of one dimension.
        bits: 1, 2, 4 or 8.
    """
    per_byte = 8 // bits
    padded = np.zeros((packed_size(len(codes), bits), per_byte), np.uint8)
    padded.reshape(-1)[: len(codes)] = codes.numpy()
    packed = padded[:, 0].copy()
    for place in range(1, per_byte):
        packed |= padded[:, place] << (place * bits)
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: the first `count` numbers, uint8.

    Raises:
        Damaged: the padding of the last byte is not zero.
    """
    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (packed[:, None] >> places & (1 << bits) - 1).flatten()
    if codes[count:].any():
        raise Damaged("an encoded payload has data after its last code")
    return codes[:count]


def packed_size(count: int, bits: int) -> int:
    """The number of bytes that `pack_bits` returns for so many integers."""
    return -(-count * bits // 8)


def join(state: State) -> Tensor:
    """Concatenates the bytes of all tensors, uint8."""
    parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in state.values()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def split(content: Tensor, like: State) -> State:
    """The inverse of `join`; the tensors of `like` have the names, shapes and dtypes.

    Raises:
        Damaged: the number of bytes is not that of these tensors.
    """
    sizes = [tensor.nbytes for tensor in like.values()]
    if len(content) != sum(sizes):
        raise Damaged(f"an encoded payload has {len(content)} bytes; {sum(sizes)} are expected")
    parts = zip(content.split(sizes), like.items(), strict=True)
    return {name: part.clone().view(tensor.dtype).view(tensor.shape) for part, (name, tensor) in parts}
