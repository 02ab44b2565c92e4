"""Clients whose low-rank factors have different ranks: each has the first rows or columns of the server's."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fedlight.federation.messages import State


@dataclass(frozen=True)
class ClientRanks:
    """The part of each low-rank factor that a client trains, keeps and exchanges (HetLoRA, arXiv 2401.06432).

    The server's factors have the largest rank R. A client of rank r has the first r rows of a factor A and
    the first r columns of B; the others count as 0 in the mean, and while the client trains.

    Attributes:
        ranks: of each client; empty where all clients have complete tensors.
        dims: state_dict name of each factor: its dimension of size R.
    """

    ranks: tuple[int, ...] = ()
    dims: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.ranks)

    @property
    def largest(self) -> int:
        """R."""
        return max(self.ranks)

    def of(self, client: int) -> int | None:
        """The rank of a client; None where all clients have complete tensors."""
        return self.ranks[client] if self.ranks else None

    def cut(self, client: int, tensors: State) -> State:
        """The client's part of tensors that are named like a factor, or `<kind>/<factor>`, and all others."""
        if not self.ranks:
            return tensors
        rank = self.ranks[client]
        return {
            name: tensor if dim is None else tensor.narrow(dim, 0, rank).contiguous()
            for name, tensor, dim in self._with_dims(tensors, self.largest)
        }

    def pad(self, client: int, tensors: State) -> State:
        """The reverse of `cut`: tensors of rank R, with 0 in what the client lacks."""
        if not self.ranks:
            return tensors
        rank, padded = self.ranks[client], {}
        for name, tensor, dim in self._with_dims(tensors, rank):
            padded[name] = tensor
            if dim is not None and rank < self.largest:
                shape = (*tensor.shape[:dim], self.largest - rank, *tensor.shape[dim + 1 :])
                padded[name] = torch.cat([tensor, tensor.new_zeros(shape)], dim)
        return padded

    def clear(self, client: int, tensors: State) -> State:
        """Tensors of rank R with 0 in what the client lacks; they may be cut already."""
        return self.pad(client, self.cut(client, tensors))

    def fill(self, mean: State, theta: State, clients: Collection[int]) -> State:
        """The mean of the factors of some clients, with theta in the rows and columns that none of them has.

        Otherwise they would become 0 in A and in B, and have no gradient from then on.

        Args:
            mean: of padded factors.
            theta: before the round.
            clients: whose factors are in the mean.
        """
        if not (self.ranks and clients):
            return mean
        rank, filled = max(self.ranks[client] for client in clients), {}
        for name, tensor, dim in self._with_dims(mean, self.largest):
            filled[name] = tensor
            if dim is not None:
                rest = theta[name].narrow(dim, rank, self.largest - rank)
                filled[name] = torch.cat([tensor.narrow(dim, 0, rank), rest], dim)
        return filled

    def _with_dims(self, tensors: State, size: int) -> list[tuple[str, Tensor, int | None]]:
        """Names and tensors, with the dimension of the rank where a tensor has one of this size."""
        entries = []
        for name, tensor in tensors.items():
            dim = self.dims.get(name.split("/", 1)[-1])
            fits = dim is not None and tensor.dim() > dim and tensor.shape[dim] == size
            entries.append((name, tensor, dim if fits else None))
        return entries


class RankLimit(Callback):
    """Sets the gradients of what clients lack to 0 before each step, so that it stays 0.

    Args:
        ranks: of all clients.
        clients: that are trained; several are stacked along a first dimension.
    """

    def __init__(self, ranks: ClientRanks, clients: Sequence[int]) -> None:
        self._ranks = ranks
        self._clients = clients

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dims = self._ranks.dims
        self._parameters = [(p, dims[name]) for name, p in pl_module.named_parameters() if name in dims]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        for parameter, dim in self._parameters:
            if parameter.grad is None:
                continue
            gradients = [parameter.grad] if len(self._clients) == 1 else parameter.grad.unbind()
            for client, gradient in zip(self._clients, gradients, strict=False):  # the last may have left
                rank = self._ranks.ranks[client]
                gradient.narrow(dim, rank, self._ranks.largest - rank).zero_()
