"""The round loop: broadcast, exchange, aggregate, step."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from fedlight.federation.server import Outcome, Server
from fedlight.federation.transport.transport import Transport


@dataclass(frozen=True)
class Round:
    """A round that is done, but not yet stored.

    Attributes:
        round: 1..R.
        outcome: what the server knows of it.
        training: seconds spent until the last update was received.
        merging: seconds spent in aggregation and step.
    """

    round: int
    outcome: Outcome
    training: float
    merging: float


def federate(server: Server, transport: Transport, rounds: int) -> Iterator[Round]:
    """Runs the rounds that are left one by one (FedAvg, arXiv 1602.05629, with FedDiffuse's slices).

    Raises:
        Diverged: a client's loss left the finite numbers.
        MemoryLost: a client cannot go on from this round.
    """
    while server.round < rounds:
        begun, merging = time.perf_counter(), 0.0
        for update in transport.exchange(server.broadcasts()):
            arrived = time.perf_counter()
            server.receive(update)
            merging += time.perf_counter() - arrived
        closed = time.perf_counter()
        outcome = server.finish_round()
        ended = time.perf_counter()
        yield Round(server.round, outcome, closed - begun - merging, merging + ended - closed)
