"""Low-rank compression: a matrix is sent as two thin factors (PowerSGD, arXiv 1905.13727)."""

import numpy as np
import torch
from torch import Tensor

from fedlight.federation.messages import State
from fedlight.runtime.errors import BadInput

STEPS = 2  # power steps from a random start; the paper takes one from the last result


class LowRank:
    """Sends the projection P P^T M of each matrix M, as the transposes of P (orthonormal columns) and M^T P.

    A convolution is a matrix with a row for each output channel. The error is not larger than M, and zero if
    the rank of M is at most `rank`. Vectors, and matrices that are smaller than P and M^T P together, are
    sent uncompressed.

    Args:
        rank: number of columns of P, 1 or more.

    Raises:
        BadInput: `rank` is below 1.
    """

    def __init__(self, rank: int) -> None:
        if rank < 1:
            raise BadInput(f"transform: the rank of lowrank must be 1 or more, got {rank}")
        self.rank = rank

    def encode(self, delta: State, rng: np.random.Generator) -> State:
        sent: State = {}
        for name, tensor in delta.items():
            if not self._splits(tensor):
                sent[name] = tensor
                continue
            matrix = tensor.flatten(1).float()
            right = torch.from_numpy(rng.standard_normal((matrix.shape[1], self.rank), dtype=np.float32))
            for _ in range(STEPS):
                left = torch.linalg.qr(matrix @ right).Q
                right = matrix.T @ left
            sent[f"{name}.left"], sent[f"{name}.right"] = left.T.to(tensor.dtype), right.T.to(tensor.dtype)
        return sent

    def decode(self, sent: State, like: State) -> State:
        return {
            name: (sent[f"{name}.left"].T @ sent[f"{name}.right"]).view(tensor.shape)
            if self._splits(tensor)
            else sent[name]
            for name, tensor in like.items()
        }

    def sent_like(self, like: State) -> State:
        sent: State = {}
        for name, tensor in like.items():
            if self._splits(tensor):
                rows, columns = tensor.flatten(1).shape
                sent[f"{name}.left"] = tensor.new_zeros(self.rank, rows)
                sent[f"{name}.right"] = tensor.new_zeros(self.rank, columns)
            else:
                sent[name] = tensor
        return sent

    def _splits(self, tensor: Tensor) -> bool:
        """Whether P and M^T P together are smaller than the tensor."""
        if tensor.dim() < 2:
            return False
        rows = len(tensor)
        return self.rank * (rows + tensor.numel() // max(rows, 1)) < tensor.numel()
