"""The Frechet distance of two sets of features, written out."""

import numpy as np
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), A and B the covariances (arXiv 1706.08500)."""
    a, b = a.double().numpy(), b.double().numpy()
    mean = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
