"""Output channels of a tensor, each of which has a scale of its own."""

import torch
from torch import Tensor

from fedlight.federation.messages import State
from fedlight.federation.packing import pack_bits, packed_size, unpack_bits
from fedlight.runtime.errors import Damaged


def by_channel(tensor: Tensor) -> Tensor:
    """A tensor as a matrix, a row an output channel (its first dimension); a vector or scalar is one row."""
    if tensor.numel() == 0:
        return tensor.reshape(0, 0)
    return tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1)


def pack_channels(name: str, codes: Tensor, scales: Tensor, bits: int) -> State:
    """What is sent of the tensor `name`: a code for each entry, packed, and a scale for each channel.

    Args:
        name: of the tensor.
        codes: below 2^bits, a row a channel.
        scales: shape (channels,).
        bits: of a code: 1, 2, 4 or 8.
    """
    packed = pack_bits(codes.flatten().to(torch.uint8), bits)
    return {f"{name}.codes": packed, f"{name}.scales": scales.bfloat16()}


def unpack_channels(name: str, sent: State, like: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse: codes, float32, a row a channel of `like`; and scales, float32, shape (channels, 1).

    Raises:
        Damaged: a scale is negative or not finite.
    """
    codes = unpack_bits(sent[f"{name}.codes"], bits, like.numel()).view(like.shape)
    return by_channel(codes).float(), check_scales(name, sent[f"{name}.scales"])[:, None]


def check_scales(name: str, scales: Tensor) -> Tensor:
    """The scales of the tensor `name`, float32.

    Raises:
        Damaged: one of them is negative or not finite.
    """
    if not (scales.isfinite() & (scales >= 0)).all():
        raise Damaged(f"an encoded payload has a scale of {name} that is negative or not finite")
    return scales.float()


def check_codes(name: str, codes: Tensor, largest: int) -> None:
    """Raises Damaged where a code of the tensor `name` is above the largest one."""
    if codes.numel() and codes.max() > largest:
        raise Damaged(f"an encoded payload has a code of {name} above {largest}")


def sent_like(like: State, bits: int) -> State:
    """Tensors of the names, shapes and dtypes that `pack_channels` gives for each tensor of `like`."""
    sent: State = {}
    for name, tensor in like.items():
        sent[f"{name}.codes"] = torch.zeros(packed_size(tensor.numel(), bits), dtype=torch.uint8)
        sent[f"{name}.scales"] = torch.zeros(len(by_channel(tensor)), dtype=torch.bfloat16)
    return sent
