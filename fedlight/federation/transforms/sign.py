"""Sign compression: one bit per entry and a scale per output channel (EF-signSGD, arXiv 1901.09847)."""

import numpy as np

from fedlight.federation.messages import State
from fedlight.federation.transforms.channels import by_channel, pack_channels, sent_like, unpack_channels

BITS = 1


class Sign:
    """Replaces each entry by its sign times the mean magnitude of its output channel, in bfloat16.

    Zero counts as positive. The error of a channel x of d entries has the squared norm
    ||x||^2 - ||x||_1^2 / d, up to the rounding of the scale.
    """

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        sent: State = {}
        for name, tensor in delta.items():
            rows = by_channel(tensor).float()
            sent |= pack_channels(name, rows >= 0, rows.abs().mean(1), BITS)
        return sent

    def decode(self, sent: State, like: State) -> State:
        delta: State = {}
        for name, tensor in like.items():
            codes, scales = unpack_channels(name, sent, tensor, BITS)
            rows = (2 * codes - 1) * scales
            delta[name] = rows.to(tensor.dtype).view(tensor.shape)
        return delta

    def sent_like(self, like: State) -> State:
        return sent_like(like, BITS)
