"""Seeded random streams: every draw of a cell comes from a stream that depends on its key only."""

import hashlib

import numpy as np


def derive_seed(*key: int | str) -> int:
    """Seed in 0..2^32-1 of the stream named by `key`, such as (2023, "client", 3, 7)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def stream(*key: int | str) -> np.random.Generator:
    """The NumPy generator of the stream named by `key`."""
    return np.random.default_rng(derive_seed(*key))
