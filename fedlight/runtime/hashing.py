"""SHA-256 of tensors: equal if and only if the tensors are equal bit for bit."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and raw bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(_raw(state[name]))
    return digest.hexdigest()


def tensors_sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, dtypes and raw bytes, in the given order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
