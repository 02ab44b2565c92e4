"""Top-k sparsification: the entries of largest magnitude are sent (arXiv 1809.07599)."""

import math

import numpy as np
import torch
from torch import Tensor

from fedlight.federation.messages import State
from fedlight.federation.packing import pack_bits, packed_size, unpack_bits
from fedlight.runtime.errors import BadInput, Damaged


class TopK:
    """Sends the exact values and the positions of the k entries of largest magnitude of each tensor.

    The positions are integers of the smallest type that fits, or a bit for each entry of the tensor,
    whichever is smaller.

    Args:
        share: k divided by the size of the tensor, in (0, 1]; k is rounded up.

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
            where = self._where(len(flat))
            largest = flat.abs().topk(self._count(len(flat)), sorted=False).indices.sort().values
            sent[f"{name}.values"] = flat[largest]
            if where.dtype is torch.bool:
                sent[f"{name}.mask"] = pack_bits(where.index_fill(0, largest, True).to(torch.uint8), 1)
            else:
                sent[f"{name}.positions"] = largest.to(where.dtype)
        return sent

    def decode(self, sent: State, like: State) -> State:
        delta: State = {}
        for name, tensor in like.items():
            size, values = tensor.numel(), sent[f"{name}.values"]
            if (mask := sent.get(f"{name}.mask")) is not None:
                largest = unpack_bits(mask, 1, size).nonzero()[:, 0]
            else:
                largest = sent[f"{name}.positions"].long()
            ascending = (largest.diff() > 0).all()
            if len(largest) != len(values) or not ascending or (largest < 0).any() or (largest >= size).any():
                raise Damaged(f"an encoded payload has no {len(values)} ascending positions in {name}")
            flat = torch.zeros(size, dtype=tensor.dtype)
            delta[name] = flat.scatter_(0, largest, values).view(tensor.shape)
        return delta

    def sent_like(self, like: State) -> State:
        sent: State = {}
        for name, tensor in like.items():
            size, where = tensor.numel(), self._where(tensor.numel())
            sent[f"{name}.values"] = torch.zeros(self._count(size), dtype=tensor.dtype)
            if where.dtype is torch.bool:
                sent[f"{name}.mask"] = torch.zeros(packed_size(size, 1), dtype=torch.uint8)
            else:
                sent[f"{name}.positions"] = where
        return sent

    def _count(self, size: int) -> int:
        return math.ceil(self.share * size)

    def _where(self, size: int) -> Tensor:
        """The smaller encoding of k positions among `size` entries: integers, or a bool for each entry."""
        dtype = torch.uint8 if size <= 2**8 else torch.uint16 if size <= 2**16 else torch.int32
        positions = torch.zeros(self._count(size), dtype=dtype)
        return positions if positions.nbytes <= packed_size(size, 1) else torch.zeros(size, dtype=torch.bool)
