"""The weighted mean of a round's updates, one tensor name at a time (FedAvg, arXiv 1602.05629)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlight.runtime.errors import BadInput


class WeightedMean:
    """Adds up updates one by one; its memory is that of one model for any number of clients.

    Sums are in float64. With integer weights, the mean of identical updates equals them bit for bit.

    Integer tensors have no mean. One of a single element is a counter, such as BatchNorm's
    `num_batches_tracked`, which differs between clients of different size: the maximum is taken, so that no
    counter decreases and the order of updates has no effect. A larger one, such as a table of indices, must
    be equal in all updates.
    """

    def __init__(self, like: Mapping[str, Tensor] | None = None) -> None:
        """`like` has the dtypes of the means; a name that it lacks has the dtype of its first update."""
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._dtypes = {name: tensor.dtype for name, tensor in (like or {}).items()}

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Adds the tensors of one client with its weight, such as n_k.

        Raises:
            BadInput: an integer tensor of more than one element differs from that of another client.
        """
        sums, terms = [], []
        for name, tensor in values.items():
            if name not in self._sums:
                floating = tensor.is_floating_point()
                copy = tensor.to(torch.float64 if floating else tensor.dtype, copy=True)
                self._sums[name] = copy.mul_(weight) if floating else copy
                self._weights[name] = weight
                self._dtypes.setdefault(name, tensor.dtype)
            elif tensor.is_floating_point():
                sums.append(self._sums[name])
                terms.append(tensor)
                self._weights[name] += weight
            elif tensor.numel() == 1:
                self._sums[name] = torch.maximum(self._sums[name], tensor)
            elif not torch.equal(self._sums[name], tensor):
                raise BadInput(
                    f"model: {name} has integers that differ between clients and have no mean: make it "
                    "floating-point, or remove its slice from method.uplink"
                )
        if sums:
            torch._foreach_add_(sums, terms, alpha=weight)

    def shift(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors without a weight to the sums, such as noise."""
        for name, tensor in tensors.items():
            self._sums[name] = self._sums[name] + tensor

    def result(self, total_weight: float | None = None) -> dict[str, Tensor]:
        """The means; a name that no client reported is absent.

        Args:
            total_weight: of all clients; those that did not report a name count in its mean with 0. None for
                the weight of those that reported it.
        """
        return {
            name: (total / (total_weight or self._weights[name])).to(self._dtypes[name])
            if total.is_floating_point()
            else total
            for name, total in self._sums.items()
        }
