"""The learning rate over the rounds: warm-up, then constant or a cosine (arXiv 1608.03983)."""

import math


def rate(round_: int, rounds: int, warmup: int, *, cosine: bool) -> float:
    """The factor of the learning rate in all steps of a round, in (0, 1].

    Args:
        round_: 1..R.
        rounds: R.
        warmup: number of first rounds, in which the rate rises in equal steps.
        cosine: whether the rate then falls by half a cosine, which would reach 0 after the last round.
    """
    if round_ <= warmup:
        return round_ / (warmup + 1)
    if not cosine:
        return 1.0
    return (1 + math.cos(math.pi * (round_ - 1 - warmup) / (rounds - warmup))) / 2
