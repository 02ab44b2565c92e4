"""Stochastic uniform quantisation with few bits (QSGD, arXiv 1610.02132)."""

import numpy as np
import torch

from fedlight.federation.messages import State
from fedlight.federation.transforms.channels import (
    by_channel,
    check_codes,
    pack_channels,
    sent_like,
    unpack_channels,
)
from fedlight.runtime.errors import BadInput


class Quantisation:
    """Rounds at random to one of 2s + 1 levels from -m to m; the expected value is exact.

    s is 2^(bits - 1) - 1, and m the largest magnitude in an output channel, rounded up to bfloat16. The error
    of an entry is below m / s. Sends the packed codes of each tensor and the m of each channel.

    Args:
        bits: per entry: 2, 4 or 8.

    Raises:
        BadInput: `bits` is none of these.
    """

    def __init__(self, bits: int) -> None:
        if bits not in (2, 4, 8):
            raise BadInput(f"transform: the bits of quantisation must be 2, 4 or 8, got {bits}")
        self.bits = bits
        self.levels = 2 ** (bits - 1) - 1

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        sent: State = {}
        for name, tensor in delta.items():
            rows = by_channel(tensor).float()
            largest = rows.abs().amax(1) if len(rows) else rows.new_zeros(0)
            scales = (largest * (1 + 2**-7)).bfloat16()  # at least `largest` after rounding
            steps = (rows / scales.float()[:, None]).nan_to_num() * self.levels
            draws = torch.from_numpy(rng.random(rows.shape, dtype=np.float32))
            codes = (steps + draws).floor().clamp(-self.levels, self.levels) + self.levels
            sent |= pack_channels(name, codes, scales, self.bits)
        return sent

    def decode(self, sent: State, like: State) -> State:
        delta: State = {}
        for name, tensor in like.items():
            codes, scales = unpack_channels(name, sent, tensor, self.bits)
            check_codes(name, codes, 2 * self.levels)
            values = (codes - self.levels) * (scales / self.levels)
            delta[name] = values.to(tensor.dtype).view(tensor.shape)
        return delta

    def sent_like(self, like: State) -> State:
        return sent_like(like, self.bits)
