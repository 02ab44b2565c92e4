"""Precision and recall: how far generated and real images lie in each other's manifold (arXiv 1904.06991)."""

import math

import torch
from torch import Tensor

NEIGHBOURS = 3
ROWS = 500  # of a matrix of distances at once, so that it stays in the processor's cache


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """What torch-fidelity computes, without distances of all pairs in memory or a search through all of them.

    Args:
        generated: features, float32, shape (n, dimension), n at least 16.
        real: likewise.

    Returns:
        The share of generated images inside the manifold of the real ones, and the reverse, in 0..1.
    """
    return _share_inside(generated, real), _share_inside(real, generated)


def _share_inside(points: Tensor, manifold: Tensor) -> float:
    """Of points that lie in a ball round one of the manifold, up to its third neighbour there."""
    distances = (torch.cdist(some, manifold) for some in manifold.split(ROWS))
    radii = torch.cat([kth_smallest(rows, NEIGHBOURS + 1) for rows in distances])  # nearest to it is itself
    inside = [(torch.cdist(some, manifold) <= radii).any(dim=1) for some in points.split(ROWS)]
    return torch.cat(inside).float().mean().item()


def kth_smallest(rows: Tensor, k: int) -> Tensor:
    """The k-th smallest value of each row, as `kthvalue` finds it; a row has at least k^2 values.

    The k smallest lie in the k groups of the least minima, and only these are searched.
    """
    groups = math.isqrt(rows.shape[1])
    grouped = rows[:, : rows.shape[1] // groups * groups].unflatten(1, (-1, groups))
    chosen = grouped.amin(dim=1, keepdim=True).topk(k, largest=False).indices
    searched = grouped.gather(2, chosen.expand(-1, grouped.shape[1], -1)).flatten(1)
    ungrouped = rows[:, grouped[0].numel() :]
    return torch.cat([searched, ungrouped], dim=1).kthvalue(k).values
