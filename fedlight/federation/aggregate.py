"""The weighted mean of a round's updates, one tensor name at a time (FedAvg, arXiv 1602.05629)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlight.runtime.errors import BadInput


class WeightedMean:
    """Takes the updates one by one; memory is that of one model, whatever the number of clients.

    Sums are in float64. With whole-number weights, identical updates have themselves as their mean, bit for
    bit.

    Integers have no mean. One of a single element is a counter, such as BatchNorm's `num_batches_tracked`,
    which rightly differs between clients of different size: the largest is taken, so that no counter goes
    back, whatever the sequence of updates. A larger one, such as a table of indices, must be the same in all.
    """

    def __init__(self, like: Mapping[str, Tensor] | None = None) -> None:
        """`like` holds tensors of the dtypes of the means; another mean has that of its first update."""
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._dtypes = {name: tensor.dtype for name, tensor in (like or {}).items()}

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Adds the tensors of one client with its weight, such as n_k.

        Raises:
            BadInput: an integer tensor of more than one element is not what another client reported.
        """
        for name, tensor in values.items():
            if name not in self._sums:
                floating = tensor.is_floating_point()
                self._sums[name] = tensor.double().mul_(weight) if floating else tensor.clone()
                self._weights[name] = weight
                self._dtypes.setdefault(name, tensor.dtype)
            elif tensor.is_floating_point():
                self._sums[name].add_(tensor, alpha=weight)
                self._weights[name] += weight
            elif tensor.numel() == 1:
                self._sums[name] = torch.maximum(self._sums[name], tensor)
            elif not torch.equal(self._sums[name], tensor):
                raise BadInput(
                    f"model: {name} holds whole numbers that differ between clients and have no mean: make "
                    "it floating, or keep its slice out of method.uplink"
                )

    def shift(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds to the sums what has no weight, such as noise."""
        for name, tensor in tensors.items():
            self._sums[name] = self._sums[name] + tensor

    def result(self, whole: float | None = None) -> dict[str, Tensor]:
        """The means; a name that no client reported is absent.

        Args:
            whole: the weight of all clients; those that did not report a name count in its mean with 0.
        """
        return {
            name: (total / (whole or self._weights[name])).to(self._dtypes[name])
            if total.is_floating_point()
            else total
            for name, total in self._sums.items()
        }
