"""Stochastic uniform quantisation with few bits (QSGD, arXiv 1610.02132)."""

import numpy as np
import torch

from fedlight.federation.messages import State
from fedlight.federation.packing import pack_bits, packed_size, unpack_bits
from fedlight.federation.transforms.channels import by_channel
from fedlight.runtime.errors import BadInput


class Quantisation:
    """Rounds at random to one of 2s + 1 levels from -m to m, so that the mean over the draws is exact.

    s is 2^(bits - 1) - 1, and m the largest magnitude in an output channel, rounded up to bfloat16. An entry
    is off by less than m / s. Sends the packed codes of each tensor and the m of each channel.

    Args:
        bits: of an entry: 2, 4 or 8.

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
            scales = (largest * (1 + 2**-7)).bfloat16()  # not below `largest`, however it is rounded
            steps = (rows / scales.float()[:, None]).nan_to_num() * self.levels
            draws = torch.from_numpy(rng.random(rows.shape, dtype=np.float32))
            codes = (steps + draws).floor().clamp(-self.levels, self.levels) + self.levels
            sent[f"{name}.codes"] = pack_bits(codes.to(torch.uint8).flatten(), self.bits)
            sent[f"{name}.scales"] = scales
        return sent

    def decode(self, sent: State, like: State) -> State:
        delta: State = {}
        for name, tensor in like.items():
            codes = unpack_bits(sent[f"{name}.codes"], self.bits, tensor.numel()).view(tensor.shape)
            rows = by_channel(codes).float() - self.levels
            values = rows * (sent[f"{name}.scales"].float()[:, None] / self.levels)
            delta[name] = values.to(tensor.dtype).view(tensor.shape)
        return delta

    def sent_like(self, like: State) -> State:
        sent: State = {}
        for name, tensor in like.items():
            sent[f"{name}.codes"] = torch.zeros(packed_size(tensor.numel(), self.bits), dtype=torch.uint8)
            sent[f"{name}.scales"] = torch.zeros(len(by_channel(tensor)), dtype=torch.bfloat16)
        return sent
