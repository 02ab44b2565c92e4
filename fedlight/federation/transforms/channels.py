"""Codes with one scale for each output channel of a tensor."""

import torch
from torch import Tensor

from fedlight.federation.messages import State
from fedlight.federation.packing import pack_bits, packed_size, unpack_bits
from fedlight.runtime.errors import Damaged


def by_channel(tensor: Tensor) -> Tensor:
    """Views a tensor as a matrix with a row for each output channel; a vector or scalar is one row."""
    if tensor.numel() == 0:
        return tensor.reshape(0, 0)
    return tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1)


def pack_channels(name: str, codes: Tensor, scales: Tensor, bits: int) -> State:
    """Encodes the tensor `name` as packed codes and one scale for each channel.

    Args:
        name: of the tensor.
        codes: whole numbers in 0..2^bits - 1, shape (channels, entries).
        scales: 0 or more, shape (channels,), sent in bfloat16.
        bits: per code: 1, 2, 4 or 8.
    """
    packed = pack_bits(codes.flatten().to(torch.uint8), bits)
    return {f"{name}.codes": packed, f"{name}.scales": scales.bfloat16()}


def unpack_channels(name: str, sent: State, like: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_channels`.

    Returns:
        Codes, float32, shape (channels, entries), and scales, float32, shape (channels, 1), for `like`.

    Raises:
        Damaged: a scale is negative or not finite.
    """
    codes = unpack_bits(sent[f"{name}.codes"], bits, like.numel()).view(like.shape)
    return by_channel(codes).float(), check_scales(name, sent[f"{name}.scales"])[:, None]


def check_scales(name: str, scales: Tensor) -> Tensor:
    """Checks the scales of the tensor `name`, and returns them as float32.

    Raises:
        Damaged: a scale is negative or not finite.
    """
    if not (scales.isfinite() & (scales >= 0)).all():
        raise Damaged(f"an encoded payload has a scale of {name} that is negative or not finite")
    return scales.float()


def check_codes(name: str, codes: Tensor, largest: int) -> None:
    """Raises Damaged for a code of the tensor `name` above `largest`."""
    if codes.numel() and codes.max() > largest:
        raise Damaged(f"an encoded payload has a code of {name} above {largest}")


def sent_like(like: State, bits: int) -> State:
    """Tensors of the names, shapes and dtypes of `pack_channels`, for each tensor of `like`."""
    sent: State = {}
    for name, tensor in like.items():
        sent[f"{name}.codes"] = torch.zeros(packed_size(tensor.numel(), bits), dtype=torch.uint8)
        sent[f"{name}.scales"] = torch.zeros(len(by_channel(tensor)), dtype=torch.bfloat16)
    return sent
