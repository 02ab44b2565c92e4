"""FedAvg's merge: the mean of the reports, weighted by data size, one slice at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Merge:
    """Accumulates reports one by one; memory is that of one model, whatever the number of clients.

    Sums run in float64 with whole-number weights, so that identical reports merge to themselves bit
    for bit. Integer tensors (counters) take the first reporter's value.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, report: Mapping[str, Tensor], weight: int) -> None:
        """Adds one client's tensors with the weight n_k, its number of images."""
        for name, tensor in report.items():
            if name not in self._sums:
                floating = tensor.is_floating_point()
                self._sums[name] = tensor.double().mul_(weight) if floating else tensor.clone()
                self._weights[name] = weight
                self._dtypes[name] = tensor.dtype
            elif tensor.is_floating_point():
                self._sums[name].add_(tensor.double(), alpha=weight)
                self._weights[name] += weight

    def result(self) -> dict[str, Tensor]:
        """The merged tensors, each in the dtype of its reports; names that nobody reported are absent."""
        return {
            name: (total / self._weights[name]).to(self._dtypes[name]) if total.is_floating_point() else total
            for name, total in self._sums.items()
        }
