"""Top-k sparsification: only the entries of largest magnitude are sent (arXiv 1809.07599)."""

import math

import numpy as np
import torch

from fedlight.federation.messages import State
from fedlight.runtime.errors import BadInput


class TopK:
    """Sends of each tensor the k entries of largest magnitude, as values and int32 positions.

    Args:
        share: k over the size of the tensor, in (0, 1]; k is rounded up.

    Raises:
        BadInput: `share` is out of its range.
    """

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise BadInput(f"transform: the share of topk must be above 0 and at most 1, got {share}")
        self.share = share

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        sent: State = {}
        for name, tensor in delta.items():
            flat = tensor.flatten()
            largest = flat.abs().topk(self._count(flat.numel()), sorted=False).indices.sort().values
            sent[f"{name}.values"] = flat[largest]
            sent[f"{name}.positions"] = largest.int()
        return sent

    def decode(self, sent: State, like: State) -> State:
        return {
            name: torch.zeros(tensor.numel(), dtype=tensor.dtype)
            .scatter_(0, sent[f"{name}.positions"].long(), sent[f"{name}.values"])
            .view(tensor.shape)
            for name, tensor in like.items()
        }

    def sent_like(self, like: State) -> State:
        counts = {name: self._count(tensor.numel()) for name, tensor in like.items()}
        values = {f"{name}.values": torch.zeros(k, dtype=like[name].dtype) for name, k in counts.items()}
        return values | {f"{name}.positions": torch.zeros(k, dtype=torch.int) for name, k in counts.items()}

    def _count(self, size: int) -> int:
        return math.ceil(self.share * size)
