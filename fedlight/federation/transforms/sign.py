"""One bit an entry: its sign, with a scale for each output channel (EF-signSGD, arXiv 1901.09847)."""

import numpy as np
import torch

from fedlight.federation.messages import State
from fedlight.federation.packing import pack_bits, packed_size, unpack_bits
from fedlight.federation.transforms.channels import by_channel


class Sign:
    """Every entry arrives as the mean magnitude of its output channel (bfloat16), with its own sign.

    Zero counts as positive. What is lost of a channel x of d entries has the squared norm
    ||x||^2 - ||x||_1^2 / d, up to the rounding of the scale.
    """

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        sent: State = {}
        for name, tensor in delta.items():
            rows = by_channel(tensor).float()
            sent[f"{name}.signs"] = pack_bits((rows >= 0).flatten().to(torch.uint8), 1)
            sent[f"{name}.scales"] = rows.abs().mean(1).bfloat16()
        return sent

    def decode(self, sent: State, like: State) -> State:
        delta: State = {}
        for name, tensor in like.items():
            signs = unpack_bits(sent[f"{name}.signs"], 1, tensor.numel()).view(tensor.shape)
            rows = (2 * by_channel(signs).float() - 1) * sent[f"{name}.scales"].float()[:, None]
            delta[name] = rows.to(tensor.dtype).view(tensor.shape)
        return delta

    def sent_like(self, like: State) -> State:
        sent: State = {}
        for name, tensor in like.items():
            sent[f"{name}.signs"] = torch.zeros(packed_size(tensor.numel(), 1), dtype=torch.uint8)
            sent[f"{name}.scales"] = torch.zeros(len(by_channel(tensor)), dtype=torch.bfloat16)
        return sent
